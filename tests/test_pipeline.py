"""The pipeline and the processor as users of transformers call them: every form of input, streams, labels, chats."""

import base64
import copy
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from clips import tone, write_clip
from models import hubert, save_model_with_towers
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Wav2Vec2FeatureExtractor,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

from egmf.pipeline_egmf import AffectRecognitionPipeline
from egmf.processing_egmf import EGMFProcessor


LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")  # of the task meld


@pytest.fixture(scope="module")
def place(tmp_path_factory, llm_folder, assemble) -> Path:
    """A folder with a model, a clip and three sounds."""
    folder = tmp_path_factory.mktemp("place")
    save_model_with_towers(folder, llm_folder(), assemble)
    write_clip(folder / "one.mp4")
    for number in range(3):
        soundfile.write(folder / f"voice{number}.wav", tone(0.3, 200 + 100 * number), 16000)
    return folder


@pytest.fixture(scope="module")
def voices(place, recognize) -> tuple[list[str], list[dict]]:
    """Three files, and the answer to each alone."""
    files = [str(place / f"voice{number}.wav") for number in range(3)]
    return files, [recognize(file) for file in files]


def assert_same(answers, wanted) -> None:
    answers = list(answers)
    assert len(answers) == len(wanted)
    for answer, other in zip(answers, wanted, strict=True):
        assert answer["error"] is None and answer["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_the_clips_differ(voices):
    first, second, _ = (answer["probabilities"] for answer in voices[1])
    assert first != pytest.approx(second, abs=1e-5)


def test_a_generator_is_answered_as_it_is_read(recognize, voices):
    read = []

    def generate():
        for file in voices[0]:
            read.append(file)
            yield {"file": file}

    answers = recognize(generate())
    assert_same([next(answers)], voices[1][:1])
    assert len(read) == 1  # the second one has not been asked for
    assert_same(answers, voices[1][1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets(recognize, voices, workers):
    rows = datasets.Dataset.from_dict({"audio": voices[0], "label": ["?"] * 3})
    assert_same(recognize(rows, num_workers=workers), voices[1])
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    options = {"batch_size": 2, "num_workers": workers}
    assert_same(recognize(rows, **options), voices[1])
    assert_same(recognize(KeyDataset(rows, "audio"), **options), voices[1])
    assert_same(recognize(voices[0], **options), voices[1])
    assert_same(recognize((file for file in voices[0]), **options), voices[1])
    assert_same(recognize(rows.to_iterable_dataset(), **options), voices[1])
    with pytest.raises(ValueError, match=r"a row got the columns \['label'\], wanted some of"):
        list(recognize(rows.remove_columns("audio")))


def test_workers_report_what_cannot_be_read(recognize, voices, place):
    files = [voices[0][0], str(place / "broken.mp4")]
    first, second = recognize(files, num_workers=2, on_error="report")
    assert first["error"] is None and "broken.mp4" in second["error"]
    with pytest.raises(recognize.processor.media_error, match=r"Cannot read .*broken.mp4"):
        recognize(files, num_workers=1)


@pytest.fixture(scope="module")
def server(place):
    """The folder over HTTP, and the requests that came."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(f"{self.command} {self.path}")

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(place))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


def test_threads_keep_their_own_warnings(recognize, place):
    """`warnings.catch_warnings` would give a thread the warnings of another one."""
    files = [str(place / f"long{number}.wav") for number in range(4)]
    for number, file in enumerate(files):
        soundfile.write(file, tone(1.3, 200 + 100 * number), 16000)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(recognize, files * 3))
    for file, answer in zip(files * 3, answers, strict=True):
        assert [warning.partition(":")[0] for warning in answer["warnings"]] == [file]


def test_an_encoder_without_a_window_hears_two_minutes_at_most(llm_folder, assemble):
    """Whisper's window cuts a longer clip; the memory of other encoders would grow with the square of its length."""
    processor = EGMFProcessor(AutoTokenizer.from_pretrained(llm_folder()), Wav2Vec2FeatureExtractor())
    tower = {"audio_tower": hubert(), "audio_input_rate": 16000}
    model = assemble(pseudo_token_id=processor.pseudo_token_id, num_pseudo_tokens=8, **tower)
    recognize = AffectRecognitionPipeline(model=model, processor=processor, task="affect-recognition")
    options = {"task": "meld", "on_error": "report"}
    long, short = recognize([np.zeros(121 * 16000, np.float32), tone(0.5, 200)], **options)
    assert "it has 121 seconds of sound, and the model hears at most 120 at once" in long["error"]
    with pytest.raises(recognize.processor.media_error, match="at most 120 at once"):
        recognize.speaker_center([np.zeros(121 * 16000, np.float32)])
    assert short["error"] is None and short["seconds"] == 0.5


def test_bytes_and_urls(recognize, voices, server):
    url, asked = server
    content = [Path(file).read_bytes() for file in voices[0]]
    assert_same(recognize(content), voices[1])
    assert_same(
        [recognize({"audio": content[0]}), recognize({"bytes": content[1], "path": "gone.wav"})], voices[1][:2]
    )
    encoded = base64.b64encode(content[0]).decode()
    assert_same([recognize(f"data:audio/wav;base64,{encoded}")], voices[1][:1])
    with pytest.raises(
        recognize.processor.media_error, match=r"Cannot read 'data:audio/wav;base64,!+\.\.\.': it is no base64"
    ):
        recognize(f"data:audio/wav;base64,{'!' * 10**6}")
    (answer,) = recognize(["http://a..b/x.wav"], on_error="report")
    assert "Cannot read 'http://a..b/x.wav'" in answer["error"]
    assert asked == []
    assert_same([recognize(f"{url}/voice0.wav"), recognize({"audio": f"{url}/voice1.wav"})], voices[1][:2])
    assert asked == ["GET /voice0.wav", "GET /voice1.wav"]
    video = recognize({"video": f"{url}/one.mp4"}), recognize(f"{url}/one.mp4")
    assert_same(video, [video[1]] * 2)
    assert asked[2:] == ["GET /one.mp4"] * 2  # once for sound and pictures
    with pytest.raises(recognize.processor.media_error, match=r"/gone.wav': the server answers with status 404"):
        recognize(f"{url}/gone.wav")
    with pytest.raises(recognize.processor.media_error, match="Cannot read '3 bytes': it is not an audio or video"):
        recognize(b"abc")
    with pytest.raises(recognize.processor.media_error, match="Cannot read 'http://127.0.0.1:1/x'"):
        recognize("http://127.0.0.1:1/x")


def test_arrays(recognize, voices):
    samples, rate = soundfile.read(voices[0][0], dtype="float32")
    stereo = np.stack([1.5 * samples, 0.5 * samples])
    forms = [
        samples,
        torch.from_numpy(samples),
        {"array": samples, "sampling_rate": rate},
        {"raw": samples, "sampling_rate": rate, "path": "gone.wav"},
        {"array": stereo, "sampling_rate": rate},
        {"raw": stereo.T, "sampling_rate": rate},
        {"audio": {"raw": torch.from_numpy(stereo), "sampling_rate": rate}},
        {"audio": samples},
    ]
    assert_same(recognize(forms), voices[1][:1] * len(forms))
    words = {"text": "no", "speaker": "Ross"}
    with_words = recognize({"raw": samples, "sampling_rate": rate, **words})
    assert_same([with_words], [recognize({"file": voices[0][0], **words})])
    assert with_words["probabilities"] != pytest.approx(voices[1][0]["probabilities"], abs=1e-5)


def test_words_need_no_sample(recognize):
    assert recognize(text="so") == recognize({"text": "so"})


def test_beside_words_a_file_without_the_modality_is_a_missing_modality(recognize, voices, monkeypatch):
    monkeypatch.setattr(recognize.processor, "feature_extractor", None)
    wanted = recognize({"text": "so"})
    answer = recognize({"file": voices[0][0], "text": "so"})
    assert answer["probabilities"] == pytest.approx(wanted["probabilities"]) and "no video" in answer["warnings"][0]
    with pytest.raises(recognize.processor.media_error, match="it has no video"):
        recognize(voices[0][0])


@pytest.mark.parametrize("value", [3, None, [], {}, {"sampling_rate": 8000}, [["a.wav"]]], ids=repr)
def test_what_is_no_sample(recognize, value):
    if value == []:
        assert recognize(value) == []
    elif value == {}:
        assert "no text, no sound and no picture" in recognize(value)["warnings"][0]
    else:
        with pytest.raises(ValueError, match="affect-recognition: a sample got .*, wanted"):
            recognize(value)


def test_top_k(recognize, voices):
    answer = recognize(voices[0][0], top_k=3)
    best = sorted(voices[1][0]["probabilities"].items(), key=lambda item: -item[1])[:3]
    assert answer["probabilities"] == pytest.approx(dict(best)) and list(answer["probabilities"]) == list(dict(best))
    assert next(iter(answer["probabilities"])) == answer["label"]
    assert len(recognize(voices[0][0], top_k=99)["probabilities"]) == len(LABELS)
    with pytest.raises(ValueError, match="top_k: got 0, wanted a positive number"):
        recognize(voices[0][0], top_k=0)


@pytest.fixture
def without_words(recognize):
    """The same model, as if it had been trained on sound alone."""
    processor = copy.copy(recognize.processor)
    processor.trained_modalities = ["audio"]
    return type(recognize)(model=recognize.model, processor=processor, task="affect-recognition")


def test_a_model_that_was_trained_without_words_ignores_them(without_words, voices):
    said = {"file": voices[0][0], "text": "so it is", "speaker": "Ann", "context": ["no"]}
    answer, alone = without_words(said), voices[1][0]
    assert answer["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
    assert answer["warnings"] == ["the model was trained without words: text, speaker and context are ignored"]
    assert without_words(voices[0][0])["warnings"] == []
    with pytest.raises(ValueError, match="transcriber: got one, wanted none: the model was trained without words"):
        without_words(voices[0][0], transcriber="openai/whisper-tiny")


def test_a_model_of_features_says_that_files_have_none(egmf, processor):
    recognize = AffectRecognitionPipeline(model=egmf, processor=processor, task="affect-recognition")
    answer = recognize({"text": "so it is"}, task="meld")
    assert answer["warnings"] == ["the model reads audio and vision as precomputed features, and none were given"]


def test_candidate_labels(recognize, voices):
    some = ["joy", "anger", "fear"]
    answer = recognize(voices[0][0], candidate_labels=some)
    all_of_them = voices[1][0]["probabilities"]
    total = sum(all_of_them[label] for label in some)
    assert list(answer["probabilities"]) == some and answer["warnings"] == []
    assert answer["probabilities"] == pytest.approx({label: all_of_them[label] / total for label in some}, abs=1e-5)
    own = recognize(voices[0][0], candidate_labels=["bored", "joy", "thrilled to bits"])
    assert own["label"] in own["probabilities"] and sum(own["probabilities"].values()) == pytest.approx(1)
    assert own["warnings"] == ["the model was not trained on the labels 'bored', 'thrilled to bits'"]
    others = recognize(voices[0][0], candidate_labels=["happy", "calm"])  # of a task that it was not trained on
    assert others["warnings"] == ["the model was not trained on the labels 'happy', 'calm'"]
    scores = recognize(voices[0][0], task="mosei", candidate_labels=["bad", "good"])
    assert list(scores["probabilities"]) == ["bad", "good"]
    for wrong in ("joy", ["joy"], ["joy", 3]):
        with pytest.raises(ValueError, match="candidate_labels: got .*, wanted a list of two or more labels"):
            recognize(voices[0][0], candidate_labels=wrong)
    with pytest.raises(ValueError, match="wanted two or more different `labels`"):
        recognize(voices[0][0], candidate_labels=["joy", "joy", "fear"])


def test_options_of_the_pipeline_are_defaults_of_its_calls(recognize, voices):
    own = type(recognize)(recognize.model, processor=recognize.processor, top_k=2, candidate_labels=LABELS[:4])
    assert set(own(voices[0][0])["probabilities"]) < set(LABELS[:4])
    assert len(own(voices[0][0], top_k=1)["probabilities"]) == 1
    said = {"text": "so what", "speaker": "Ann"}
    own = type(recognize)(recognize.model, processor=recognize.processor, on_error="report", **said)
    wanted = recognize({"file": voices[0][0], **said})
    answers = own([voices[0][0], {"file": voices[0][0], "text": None}, "gone.wav"])
    assert_same(answers[:2], [wanted] * 2)
    assert "gone.wav" in answers[2]["error"]
    assert_same([own(voices[0][0], text="no")], [recognize({"file": voices[0][0], **said, "text": "no"})])
    with pytest.raises(recognize.processor.media_error):
        own("gone.wav", on_error="raise")


def test_a_file_beside_another_clip(recognize, voices):
    """Rows of data sets name a file of the machine that made them."""
    row = {"file": "/data/somebody/1.flac", "audio": voices[0][0], "id": 1}
    assert_same(recognize(datasets.Dataset.from_list([row])), voices[1][:1])
    with pytest.raises(ValueError, match="a sample got file and audio, wanted one of them"):
        recognize({"file": voices[0][0], "audio": voices[0][1]})
    with pytest.raises(ValueError, match="got dict, wanted a file"):
        recognize({"audio": {}})
    assert recognize({"audio": {"bytes": None, "path": None}, "text": "so"})["label"]


def test_tasks_are_added_to_those_of_the_checkpoint(place, recognize, tmp_path):
    own = {"stress": {"kind": "classification", "labels": ["calm", "tense"], "prompt": "Calm or tense?"}}
    processor = type(recognize.processor).from_pretrained(place / "model", tasks=own, default_task="stress")
    processor.save_pretrained(tmp_path)
    shutil.copy(place / "model/config.json", tmp_path)
    pain = {"pain": own["stress"] | {"labels": ["none", "some"]}}
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, tasks=pain)
    assert again.default_task == "stress" and again.tasks["stress"].labels == ("calm", "tense")
    assert again.tasks["pain"].labels == ("none", "some")


@pytest.fixture(scope="module")
def chat(place) -> list[dict]:
    said = [{"type": "text", "text": "that is just great"}]
    media = [{"type": "video", "path": str(place / "one.mp4")}, {"type": "audio", "audio": str(place / "voice0.wav")}]
    return [
        {"role": "user", "content": "It broke.", "name": "Joey"},
        {"role": "user", "content": [*media, *said], "name": "Ross"},
    ]


def test_chat_template(place, recognize, chat):
    processor = recognize.processor
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    context = [{"speaker": "Joey", "text": "It broke."}]
    media = {"video": str(place / "one.mp4"), "audio": str(place / "voice0.wav")}
    wanted = processor(text="that is just great", speaker="Ross", context=context, **media)
    assert inputs.keys() == wanted.keys() >= {"pixel_values", "input_features"}
    for name, value in wanted.items():
        torch.testing.assert_close(inputs[name], value, rtol=0, atol=0, equal_nan=True)
    text = processor.apply_chat_template(chat)
    assert "Joey: It broke.\n" in text and "Ross: that is just great\n" in text and text.endswith("Emotion:")
    with pytest.raises(ValueError, match="return_dict: got False for a chat with sound or pictures, wanted True"):
        processor.apply_chat_template(chat, tokenize=True)
    ids = processor.apply_chat_template(chat[:1], tokenize=True)
    assert torch.equal(ids, processor(text="It broke.", speaker="Joey")["input_ids"])
    both = processor.apply_chat_template([chat, chat[:1]], tokenize=True, return_dict=True, task="mosei")
    assert both["audio_mask"].any(1).tolist() == [True, False]
    tokens = recognize.model.generate(**inputs, max_new_tokens=3)
    assert tokens.shape[0] == 1


def test_what_generic_callers_pass_is_accepted(recognize, chat):
    """The options of chats and processors that change nothing here, as transformers' own pipelines pass them."""
    processor = recognize.processor
    options = {"tokenize": True, "return_dict": True, "continue_final_message": False, "tools": None}
    inputs = processor.apply_chat_template(chat, **options, processor_kwargs={"task": "mosei", "padding": True})
    wanted = processor.apply_chat_template(chat, tokenize=True, return_dict=True, task="mosei")
    assert torch.equal(inputs["input_ids"], wanted["input_ids"])
    assert processor(text=["so", "no, no"], padding="longest", images=None)["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match="chat_template: got 'x', wanted None"):
        processor.apply_chat_template(chat, "x")
    with pytest.raises(ValueError, match="padding=True.*got 'left', 'max_length'"):
        processor(text="so", padding="max_length")


def test_half_precision_leaves_the_clock_exact(recognize, chat):
    inputs = recognize.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    times = inputs["vision_times"].clone()
    half = inputs.to("cpu", torch.bfloat16)
    assert half["pixel_values"].dtype == torch.bfloat16
    assert half["vision_times"].dtype == torch.float32
    torch.testing.assert_close(half["vision_times"], times, rtol=0, atol=0, equal_nan=True)


def test_pictures_of_a_turned_camera_are_upright(recognize, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # orientation: turned by 90 degrees
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    for video in (str(tmp_path / "a.jpg"), Image.open(tmp_path / "a.jpg"), [Image.open(tmp_path / "a.jpg")] * 2):
        assert recognize.processor.load_media(None, video).video.frames.shape[1:] == (80, 40, 3)
    with pytest.raises(ValueError, match="got pictures of the shapes .* wanted one size"):
        recognize.processor.load_media(None, [Image.new("RGB", (8, 4)), Image.new("RGB", (4, 8))])


def test_pictures_of_pil_and_columns_of_images(recognize, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    wanted = recognize({"video": str(tmp_path / "a.png"), "text": "so"})
    rows = datasets.Dataset.from_list([{"image": str(tmp_path / "a.png"), "text": "so"}]).cast_column(
        "image", datasets.Image()
    )
    chat = [{"role": "user", "content": [{"type": "text", "text": "so"}, {"type": "image", "image": picture}]}]
    inputs = recognize.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert torch.equal(
        inputs["pixel_values"], recognize.processor(text="so", video=str(tmp_path / "a.png"))["pixel_values"]
    )
    for sample in ({"image": picture, "text": "so"}, {"video": picture, "text": "so"}, rows):
        found = recognize(sample)
        found = found if isinstance(found, dict) else next(iter(found))
        assert found["probabilities"] == pytest.approx(wanted["probabilities"]) and not found["error"]
        assert found["gate_weights"]["modality"]["local"]["vision"] > 0
    assert recognize(picture)["gate_weights"]["modality"]["local"]["text"] == 0
    assert recognize({"text": "so", "image": None}) == recognize({"text": "so"})


def test_a_saved_pipeline_loads_again(recognize, tmp_path):
    tasks = {"tone": {"kind": "classification", "labels": ["warm", "cold"]}}
    processor = AutoProcessor.from_pretrained(recognize.model.name_or_path, trust_remote_code=True, tasks=tasks)
    assert "tasks" not in processor.tokenizer.init_kwargs
    own = type(recognize)(model=recognize.model, processor=processor, task="affect-recognition")
    own.save_pretrained(tmp_path)
    again = pipeline("affect-recognition", model=str(tmp_path), trust_remote_code=True)
    assert again({"text": "so"}, task="tone") == own({"text": "so"}, task="tone")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "system", "content": "Be brief."}, "got the role 'system', wanted user or assistant"),
        ({"role": "user"}, "wanted a dict with a role and a content"),
        (
            {"role": "user", "content": [{"type": "image", "url": "x.png"}, {"type": "video", "url": "x.mp4"}]},
            "got the content .*wanted text, and at most",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "got the content"),
        ({"role": "user", "content": 3}, "got the content"),
        ({"role": "user", "content": [{"type": "audio", "url": "x"}]}, "got audio, wanted media only in the last"),
    ],
)
def test_faulty_chats(recognize, chat, message, reason):
    with pytest.raises(ValueError, match=rf"conversation\[0\]: .*{reason}"):
        recognize.processor.apply_chat_template([message, *chat])


def test_one_message_is_no_chat(recognize):
    with pytest.raises(ValueError, match="conversation: got .*wanted a list"):
        recognize.processor.apply_chat_template({"role": "user", "content": "hi"})


def test_the_multimodal_auto_class_loads_the_checkpoint_as_auto_model_does(place, tmp_path, chat):
    folder = shutil.copytree(place / "model", tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    one, other = (
        auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModel, AutoModelForMultimodalLM)
    )
    assert type(one) is type(other)
    assert torch.equal(one(**inputs).logits, other(**inputs).logits)
    other.save_pretrained(tmp_path / "again")  # both load what either saves
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(one(**inputs).logits, again(**inputs).logits)
