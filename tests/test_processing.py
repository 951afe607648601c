"""The processor: layout and masks, answers as tokens, constraints, distributions, errors, saving and loading."""

import json
import time

import numpy as np
import pytest
import torch
from models import CALM
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from egmf.processing_egmf import BUILTIN_TASKS, AffectTask, EGMFProcessor


def byte_tokenizer(spare: str | None = None, bos: bool = False, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: it accepts every text and has one token per byte."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *([pad] if pad else []), *([spare] if spare else [])]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos:
        bos_id = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=pad)


def tokenizers() -> list:
    return [
        pytest.param(lambda: byte_tokenizer(), id="bytes"),
        pytest.param(lambda: byte_tokenizer(spare="<|reserved_0|>", bos=True), id="bytes-spare-bos"),
        pytest.param(lambda: byte_tokenizer(pad=None), id="bytes-no-pad"),
    ]


@pytest.fixture(params=tokenizers())
def processor(request) -> EGMFProcessor:
    return EGMFProcessor(request.param(), num_pseudo_tokens=3, tasks={"calm": CALM})


@pytest.fixture
def small() -> EGMFProcessor:
    return EGMFProcessor(byte_tokenizer(), num_pseudo_tokens=2, tasks={"calm": CALM})


def decode(processor: EGMFProcessor, ids: torch.Tensor) -> str:
    return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# Tasks


def test_scores_are_signed_tenths():
    answers = BUILTIN_TASKS["mosei"].answers
    assert len(answers) == len(set(answers)) == 61
    assert (answers[0], answers[29], answers[30], answers[31], answers[-1]) == ("-3.0", "-0.1", "+0.0", "+0.1", "+3.0")
    assert len(BUILTIN_TASKS["simsv2"].answers) == 21


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.6, "+0.6"),
        (-1.3, "-1.3"),
        (0, "+0.0"),
        (-0.04, "+0.0"),
        (-0.0, "+0.0"),
        (0.25, "+0.2"),
        (0.35, "+0.4"),
        (-0.25, "-0.2"),
        (np.float32(0.35), "+0.4"),
        (0.3333333432674408, "+0.3"),
        (torch.tensor(1.5), "+1.5"),
        (3.0000001, "+3.0"),
    ],
)
def test_scores_round_half_to_even(value, text):
    assert BUILTIN_TASKS["mosei"].format(value) == text


def test_a_coarser_step_is_kept():
    task = AffectTask("halves", "regression", low=-1, high=1, step=0.5)
    assert task.answers == ("-1.0", "-0.5", "+0.0", "+0.5", "+1.0")
    assert [task.format(value) for value in (0.25, 0.75, 0.3)] == ["+0.0", "+1.0", "+0.5"]


@pytest.mark.parametrize("task", BUILTIN_TASKS.values(), ids=BUILTIN_TASKS)
def test_every_answer_is_parsed_to_what_it_says(task):
    for answer in task.answers:
        assert task.format(task.parse(f" {answer}\n")) == answer
    assert AffectTask.from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize("text", ["", "0.6", "+0.60", "-0.0", "+3.1", "nan", "positive", "+0.6 +0.6", "＋0.6"])
def test_what_is_no_legal_answer_is_none(text):
    assert BUILTIN_TASKS["mosei"].parse(text) is None
    assert BUILTIN_TASKS["meld"].parse(text) is None


def test_labels_are_matched_exactly():
    assert [BUILTIN_TASKS["meld"].parse(text) for text in ("joy", "Joy", "joyful", "jo")] == ["joy", None, None, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.1, -4, None, "+0.6", "joy", True, [1.0]])
def test_format_refuses_other_scores(value):
    with pytest.raises(ValueError, match=r"Task 'mosei': got the score .*, wanted a finite number in \[-3.0, 3.0\]"):
        BUILTIN_TASKS["mosei"].format(value)


@pytest.mark.parametrize("value", ["happiness", "Joy", 3, None])
def test_format_refuses_other_labels(value):
    with pytest.raises(ValueError, match="Task 'meld': got the label .*, wanted one of .*'neutral', 'surprise'"):
        BUILTIN_TASKS["meld"].format(value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ranking"}, r"wanted a pair \(kind, language\) .* got \('ranking', 'en'\)"),
        ({"kind": "classification", "labels": ["a", "b"], "language": "fr"}, "got .*'fr'"),
        ({"kind": "classification"}, "two or more different `labels`"),
        ({"kind": "classification", "labels": "ab"}, "two or more different `labels`"),
        ({"kind": "classification", "labels": ["a", "a"]}, "two or more different `labels`"),
        ({"kind": "classification", "labels": ["a", " b"]}, "without outer spaces"),
        ({"kind": "classification", "labels": ["a", "b"], "low": 0.0}, "no `low`, `high`, `step`"),
        ({"kind": "regression", "low": 0.0, "high": 1.0}, r"got None and \(0.0, 1.0, None\)"),
        ({"kind": "regression", "low": 1.0, "high": 0.0, "step": 0.1}, "`low` < `high`"),
        ({"kind": "regression", "low": 0.0, "high": 1.0, "step": 0.05}, "a positive multiple of 0.1"),
        ({"kind": "regression", "low": 0.0, "high": 1.0, "step": 0.3}, "multiples of `step`"),
        ({"kind": "regression", "low": 0.0, "high": 1.0, "step": 0.1, "labels": ["a"]}, "no `labels`"),
        ({"kind": "classification", "labels": ["a", "b"], "lables": 1}, "lables"),
        ({"labels": ["a", "b"]}, "kind"),
    ],
)
def test_fields_that_describe_no_task(fields, message):
    with pytest.raises(ValueError, match=f"Task 'mine': .*{message}"):
        AffectTask.from_dict({"name": "mine", **fields})


# Layout


def test_sequence_is_laid_out_as_documented(processor):
    inputs = processor(
        text="  I am\nso glad! ",
        speaker="Joey",
        context=[{"speaker": "Ross", "text": "Well?"}, "Hm.", {"speaker": None, "text": "Yes."}, ""],
        task="meld",
        answer="joy",
    )
    task, tokenizer = BUILTIN_TASKS["meld"], processor.tokenizer
    start = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    prompt = f"{tokenizer.bos_token if start else ''}{task.prompt}\nRoss: Well?\nHm.\nYes.\n"
    middle = f"{processor.pseudo_token * 3}\nJoey:"
    end = f"\nEmotion: joy{tokenizer.eos_token}"
    ids = inputs["input_ids"][0]
    assert decode(processor, ids) == f"{prompt}{middle} I am so glad!{end}"
    assert decode(processor, ids[inputs["utterance_mask"][0] == 1]) == " I am so glad!"
    labels = inputs["labels"][0]
    assert decode(processor, ids[labels != -100]) == f" joy{tokenizer.eos_token}"
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    before = ids[: (ids == processor.pseudo_token_id).nonzero()[0, 0]]
    assert decode(processor, before) == prompt
    assert processor.model_input_names[0] == "input_ids"


def test_the_answer_only_adds_its_tokens(processor):
    without = processor("Fine.", task="meld")
    taught = processor("Fine.", task="meld", answer="anger")
    target = [*processor.answer_ids("meld", "anger"), processor.tokenizer.eos_token_id]
    assert taught["input_ids"][0].tolist() == without["input_ids"][0].tolist() + target
    assert "labels" not in without


def test_chinese_task_has_no_spaces(processor):
    inputs = processor("我很高兴", speaker="小明", context=["你好"], task="cherma", answer="高兴")
    text = decode(processor, inputs["input_ids"][0])
    assert text.endswith(f"\n小明：我很高兴\n情绪：高兴{processor.tokenizer.eos_token}")
    assert decode(processor, inputs["input_ids"][0][inputs["utterance_mask"][0] == 1]) == "我很高兴"


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_absent_text_is_legal(small, text):
    inputs = small(text, audio_features=np.ones((2, 3)), task="meld")
    assert inputs["utterance_mask"].sum() == 0
    assert (inputs["input_ids"] == small.pseudo_token_id).sum() == 2
    assert torch.equal(small(text, speaker="A", task="meld")["utterance_mask"].sum(), torch.tensor(0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batching_change_no_sample(processor, side):
    texts, speakers, answers = ["No.", None, "A much longer one, really."], [None, "B", "C"], ["fear", "joy", "anger"]
    audio = [np.random.randn(4, 5), None, np.random.randn(2, 5)]
    context = [["one", "two"], None, []]
    task = ["meld", "meld", BUILTIN_TASKS["meld"]]
    given = {"speaker": speakers, "context": context, "audio_features": audio, "task": task, "answer": answers}
    batch = processor(texts, **given, padding_side=side)
    for i, text in enumerate(texts):
        single = processor(text, **{name: values[i] for name, values in given.items()})
        kept = batch["attention_mask"][i] == 1
        assert kept[-1 if side == "left" else 0]
        assert kept.sum() == single["input_ids"].shape[1]
        for name in ("input_ids", "utterance_mask", "labels"):
            assert torch.equal(batch[name][i][kept], single[name][0]), name
        assert (batch["labels"][i][~kept] == -100).all()
        assert (batch["utterance_mask"][i][~kept] == 0).all()
        assert not (batch["input_ids"][i][~kept] == processor.pseudo_token_id).any()
        if audio[i] is not None:
            frames = batch["audio_mask"][i] == 1
            assert torch.equal(batch["audio_features"][i][frames], single["audio_features"][0])
    assert torch.equal(batch["input_ids"], processor(texts, **given, text_kwargs={"padding_side": side})["input_ids"])


def test_mixed_tasks_in_one_batch(small):
    inputs = small(["yes", "好"], task=["mosei", "cherma"], answer=[0.61, "平静"])
    pairs = zip(inputs["input_ids"], inputs["labels"], strict=True)
    answers = [decode(small, ids[labels != -100]) for ids, labels in pairs]
    assert answers == [" +0.6</s>", "平静</s>"]


def test_special_tokens_in_a_text_stay_text(processor):
    tokenizer = processor.tokenizer
    evil = f"{processor.pseudo_token} {tokenizer.eos_token}{tokenizer.bos_token}"
    inputs = processor(evil, speaker=evil, context=[{"speaker": evil, "text": evil}], task="meld")
    clean = processor("x", speaker="x", context=["x"], task="meld")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token in special:
        assert (inputs["input_ids"] == token).sum() == (clean["input_ids"] == token).sum()
    assert decode(processor, inputs["input_ids"][0][inputs["utterance_mask"][0] == 1]) == f" {evil}"


def test_special_tokens_that_are_ordinary_pieces_are_left_out():
    words = {"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4, "<reserved>": 5}
    backend = Tokenizer(models.Unigram([(word, 0.0 if i < 3 else -1.0) for word, i in words.items()], unk_id=0))
    backend.add_special_tokens(["</s>", "<pad>", "<reserved>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    plain = tokenizer("a</s><reserved>b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert 1 in plain and 5 in plain  # What the processor guards against.
    processor = EGMFProcessor(tokenizer)
    assert processor.pseudo_token == "<reserved>"
    inputs = processor("a</s><reserved>b", task="meld")
    assert inputs["input_ids"][0][inputs["utterance_mask"][0] == 1].tolist() == [3, 4]
    assert (inputs["input_ids"] == 5).sum() == 8


def test_context_is_dropped_whole_and_oldest_first(small):
    def lines(context: list[str]) -> str:
        text = decode(small, small("now", task="meld", context=context)["input_ids"][0])
        return text.split(BUILTIN_TASKS["meld"].prompt + "\n")[1].split(small.pseudo_token)[0]

    # One token per byte: the budget is counted in characters, newlines included.
    for budget, expected in [(21, "far away\nnearer\nnear\n"), (20, "nearer\nnear\n"), (4, ""), (0, "")]:
        small.max_context_tokens = budget
        assert lines(["far away", "nearer", "near"]) == expected
    started = time.monotonic()
    assert lines(["near"] * 20_000) == ""
    assert time.monotonic() - started < 20  # linear in the number of lines


# Features


def test_features_are_padded_on_the_right(small):
    audio = [np.ones((2, 3)), None, torch.ones(4, 3, dtype=torch.bfloat16)]
    times = [[0.0, 0.5], None, None]
    inputs = small(["a", "b", "c"], audio_features=audio, audio_times=times, task="meld")
    assert inputs["audio_features"].shape == (3, 4, 3) and inputs["audio_features"].dtype == torch.float32
    assert inputs["audio_mask"].tolist() == [[1, 1, 0, 0], [0] * 4, [1] * 4]
    assert inputs["audio_mask"].dtype == torch.int64
    assert torch.equal(inputs["audio_features"].sum(-1), 3.0 * inputs["audio_mask"])
    assert inputs["audio_times"][0, :2].tolist() == [0.0, 0.5]
    assert inputs["audio_times"].isnan().sum() == 10
    assert "vision_features" not in inputs


@pytest.mark.parametrize("features", [np.ones((2, 3)), torch.ones(2, 3), [[1, 2, 3], [1, 2, 3]]])
def test_features_alone_tell_a_sample_from_a_batch(small, features):
    assert small(vision_features=features, task="meld")["vision_features"].shape == (1, 2, 3)
    for batch in ([features, None], [None, features]):
        assert small(vision_features=batch, task="meld")["vision_features"].shape == (2, 2, 3)
    assert small(audio_features=np.ones((5, 2, 3)), task="meld")["audio_mask"].shape == (5, 2)


def test_nothing_but_context_and_nothing_at_all(small):
    assert small(context=["Hello."], task="meld")["input_ids"].shape[0] == 1
    assert small(task="meld")["input_ids"].shape[0] == 1
    assert small(task=["meld", "mosi"])["input_ids"].shape[0] == 2


def test_numpy_output(small):
    for kind in ("np", None):
        inputs = small("a", audio_features=np.ones((1, 1)), task="meld", return_tensors=kind)
        assert all(isinstance(value, np.ndarray) for value in inputs.values())


BAD = np.ones((5, 73))
BAD[0, :2] = np.nan
ONES = np.ones((2, 3))
ERRORS = [
    ({"text": "a"}, "`task` got None, wanted an AffectTask or one of .*'meld'"),
    ({"text": "a", "task": "melt"}, "`task` got 'melt', wanted .*'cherma', .*'meld', .*'mosei'"),
    ({"text": "a", "task": "meld", "answer": "happy"}, "Task 'meld': got the label 'happy'"),
    ({"text": ["a"], "task": "meld", "answer": [None]}, "Task 'meld': got the label None"),
    ({"text": "a", "task": "mosei", "answer": 7.0}, "Task 'mosei': got the score 7.0"),
    ({"text": ["a", "b"], "task": "meld", "speaker": ["A"]}, "`speaker` has 1 entries, wanted 2 as in `text`"),
    ({"text": ["a"], "task": ["meld", "mosi"]}, "`text` has 1 entries, wanted 2 as in `task`"),
    ({"text": ["a", "b"], "task": "meld", "speaker": "A"}, "`speaker` got 'A', wanted a list with one entry"),
    ({"text": ["a", "b"], "task": "mosei", "answer": 1.0}, "`answer` got 1.0, wanted a list with one entry"),
    ({"text": [], "task": "meld"}, "`text` has 0 entries, wanted at least 1"),
    ({"text": [1], "task": "meld"}, r"`text\[0\]` got int 1, wanted a string or None"),
    ({"text": "a", "task": "meld", "speaker": 3}, r"`speaker\[0\]` got int 3, wanted a string or None"),
    ({"text": "a", "task": "meld", "context": "Hello"}, r"`context\[0\]` got 'Hello', wanted a list of strings or"),
    ({"text": ["a"], "task": "meld", "context": ["Hello"]}, r"`context\[0\]` got 'Hello', wanted a list of strings"),
    ({"text": "a", "task": "meld", "context": [3]}, r"`context\[0\]` got 3 in it, wanted a list of strings or"),
    ({"text": "a", "task": "meld", "context": [{"words": "a"}]}, r"`context\[0\]` got .*'words'.* in it"),
    ({"text": "a", "task": "meld", "padding_side": "top"}, "`padding_side` 'left' or 'right'.* got 'top'"),
    ({"text": "a", "task": "meld", "audio_feature": ONES}, "no other option, got 'left', True and .*audio_feature"),
    (
        {"text": ["a"] * 4, "task": "meld", "audio_features": [None] * 3 + [BAD]},
        r"`audio_features\[3\]` has 2 NaN and 0 infinite values in 5 x 73, wanted finite",
    ),
    (
        {"text": "a", "task": "meld", "vision_features": ONES * np.inf},
        r"`vision_features\[0\]` has 0 NaN and 6 infinite",
    ),
    ({"text": "a", "task": "meld", "audio_features": [1.0]}, r"`audio_features\[0\]` got the shape \(1,\)"),
    ({"text": ["a"], "task": "meld", "audio_features": [[[ONES]]]}, r"got the shape \(1, 1, 2, 3\), wanted an array"),
    ({"text": "a", "task": "meld", "audio_features": [[1.0], [1.0, 2.0]]}, r"`audio_features\[0\]` got list"),
    ({"text": "a", "task": "meld", "audio_features": "x.wav"}, r"`audio_features\[0\]` got str .* wanted an array"),
    ({"text": "a", "task": "meld", "audio_features": ONES[:0]}, r"is empty \(0 x 3\).* pass None for a missing"),
    (
        {"text": ["a", "b"], "task": "meld", "audio_features": [ONES, BAD[1:]]},
        r"`audio_features\[1\]` has 73 columns, wanted 3 as in `audio_features\[0\]`",
    ),
    (
        {"text": "a", "task": "meld", "audio_features": ONES, "audio_times": [0.0]},
        r"`audio_times\[0\]` has 1 times, wanted 2",
    ),
    (
        {"text": "a", "task": "meld", "audio_features": ONES, "audio_times": [0.0, float("inf")]},
        r"`audio_times\[0\]` has 2 times, wanted 2, finite or NaN",
    ),
    (
        {"text": "a", "task": "meld", "vision_times": [0.0]},
        r"`vision_times\[0\]` is given without `vision_features\[0\]`",
    ),
]


@pytest.mark.parametrize(("given", "message"), ERRORS)
def test_errors_name_what_came_and_what_was_wanted(small, given, message):
    with pytest.raises(ValueError, match=message):
        small(**given)


# Answers


@pytest.mark.parametrize("name", [*BUILTIN_TASKS, "calm"])
def test_answers_have_their_own_tokens(processor, name):
    task = processor.tasks[name]
    cue = processor.tokenizer(task.cue, add_special_tokens=False)["input_ids"]
    spelled = [processor.answer_ids(name, answer) for answer in task.answers]
    assert len({tuple(ids) for ids in spelled}) == len(task.answers)
    for answer, ids in zip(task.answers, spelled, strict=True):
        space = " " if task.language == "en" else ""
        assert decode(processor, cue + ids) == task.cue + space + answer
        assert processor.decode_answers([[*ids, processor.tokenizer.eos_token_id, 7]], name)[0].text == answer
        assert processor.answer_ids(task, task.parse(answer)) == ids
    assert processor.max_answer_tokens(name) == max(map(len, spelled)) + 1
    candidates = processor.candidates(name)
    for i, one in enumerate(candidates):
        assert not any(other[: len(one)] == one for j, other in enumerate(candidates) if i != j)
        assert one[: len(spelled[i])] == spelled[i]


def test_only_a_prefix_is_closed_by_eos(processor):
    closed = [ids[-1] == processor.tokenizer.eos_token_id for ids in processor.candidates("calm")]
    assert closed == [True, False, False]
    assert not any(ids[-1] == processor.tokenizer.eos_token_id for ids in processor.candidates("mosei"))


def test_an_answer_that_cannot_be_spelled():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = EGMFProcessor(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))
    task = AffectTask("mine", "classification", labels=("a", "b"))
    with pytest.raises(ValueError, match="Task 'mine': the tokenizer turns answer 'b' into '<unk>'"):
        processor.candidates(task)


@pytest.mark.parametrize("name", [*BUILTIN_TASKS, "calm"])
def test_constraint_admits_exactly_the_legal_answers(processor, name):
    inputs = processor(["a", "a longer one"], task=name)
    constraint = processor.logits_processor(name, inputs)
    tokenizer = processor.tokenizer
    vocabulary = len(tokenizer)
    ends = {tokenizer.eos_token_id} | ({tokenizer.pad_token_id} - {None})
    found, paths = [], [[]]
    while paths:
        path = paths.pop()
        ids = torch.cat([inputs["input_ids"], torch.tensor([path, path], dtype=torch.long)], dim=1)
        scores = constraint(ids, torch.zeros(2, vocabulary))
        assert torch.equal(scores[0], scores[1])
        allowed = scores[0].isfinite().nonzero().flatten().tolist()
        if tokenizer.eos_token_id in path:
            assert set(allowed) == ends
            found.append(processor.decode_answers([path], name)[0].text)
        else:
            paths += [[*path, token] for token in allowed]
    assert sorted(found) == sorted(processor.tasks[name].answers)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 4}])
def test_generation_stays_legal(small, settings):
    tokenizer = small.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tasks = ["calm", "mosei", "cherma"]
    inputs = small(["a", "longer", "b"], task=tasks)
    for seed in range(5):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_processor=small.logits_processor(tasks, inputs),
            max_new_tokens=max(small.max_answer_tokens(task) for task in tasks),
            **settings,
        )
        repeats = settings.get("num_return_sequences", 1)
        each = [task for task in tasks for _ in range(repeats)]
        answers = small.decode_answers(generated[:, inputs["input_ids"].shape[1] :], each)
        assert len(answers) == 3 * repeats
        assert all(answer.value is not None for answer in answers)


def test_an_illegal_answer_is_kept_as_text_without_value(small):
    ids = small.tokenizer([" joyful", " joy</s>x", "</s>"])["input_ids"]
    answers = small.decode_answers(ids, "meld")
    assert answers == [("joyful", None), ("joy", "joy"), ("", None)]
    # Gemma and Llama also end their answers with tokens of their chat templates.
    small.tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    again = EGMFProcessor(small.tokenizer, pseudo_token=small.pseudo_token)
    assert again.decode_answers(small.tokenizer([" joy<end_of_turn>x"])["input_ids"], "meld") == [("joy", "joy")]
    with pytest.raises(ValueError, match="`task` has 2 entries, wanted one, or one per row of 3"):
        small.decode_answers(ids, ["meld", "meld"])


def test_summary_of_scores(small):
    task = AffectTask("five", "regression", low=-0.2, high=0.2, step=0.1)
    rows = [[0.05, 0.15, 0.3, 0.4, 0.1], [0.0, 0.5, 0.0, 0.5, 0.0]]
    probabilities = torch.tensor(rows, dtype=torch.float64)
    first, second = small.summarize(probabilities.log() + 3.0, task)  # Need not be normalised.
    assert first.top == "+0.1" and first.probabilities == pytest.approx(
        {"-0.2": 0.05, "-0.1": 0.15, "+0.0": 0.3, "+0.1": 0.4, "+0.2": 0.1}
    )
    assert first.expected == pytest.approx(0.035)
    assert first.median == 0.0
    assert first.interval == (-0.2, 0.2)
    assert second.median == -0.1 and second.interval == (-0.1, 0.1)


def test_summary_of_labels(small):
    (summary,) = small.summarize(np.log([[0.2, 0.8]]), "mosi")
    assert summary.top == "positive" and summary.probabilities == pytest.approx({"negative": 0.2, "positive": 0.8})
    assert summary.expected is summary.median is summary.interval is None
    with pytest.raises(ValueError, match=r"has the shape \(1, 3\), wanted \(batch, 2\) for task 'mosi'"):
        small.summarize(torch.zeros(1, 3), "mosi")
    for bad in ([float("nan"), 0.0], [-float("inf")] * 2, [float("inf"), 0.0]):
        with pytest.raises(ValueError, match="`log_probs` got a row with NaN"):
            small.summarize([bad], "mosi")


# The pseudo token, and the way to disk


def test_pseudo_token_is_a_spare_one_or_a_new_one():
    assert EGMFProcessor.find_pseudo_token(byte_tokenizer()) is None  # Its "<pad>" is in use.
    tokenizer = byte_tokenizer(spare="<unused_7>")
    size = len(tokenizer)
    processor = EGMFProcessor(tokenizer)
    assert processor.pseudo_token == "<unused_7>" and len(tokenizer) == size
    tokenizer = byte_tokenizer()
    processor = EGMFProcessor(tokenizer)
    assert processor.pseudo_token == "<|pseudo|>" and len(tokenizer) == size
    assert processor.pseudo_token_id == size - 1
    processor = EGMFProcessor(byte_tokenizer(), pseudo_token="<here>")
    assert decode(processor, [processor.pseudo_token_id]) == "<here>"


def test_unfit_tokenizers_and_tasks():
    with pytest.raises(ValueError, match="`pseudo_token` \\('<pad>'\\) other than"):
        EGMFProcessor(byte_tokenizer(), pseudo_token="<pad>")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs an `eos_token`"):
        EGMFProcessor(tokenizer)
    with pytest.raises(ValueError, match="`tasks\\['mine'\\]` holds a task of another name, 'calm'"):
        EGMFProcessor(byte_tokenizer(), tasks={"mine": CALM})
    for value in (0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=rf"`temperatures\['meld'\]` got {value}, wanted a positive number"):
            EGMFProcessor(byte_tokenizer(), temperatures={"meld": value})
    with pytest.raises(ValueError, match="`task` got 'melt', wanted"):
        EGMFProcessor(byte_tokenizer(), temperatures={"melt": 2.0})


MINE = {"kind": "classification", "labels": ["bored", "定"], "prompt": "Bored?", "cue": "Says:"}


def test_round_trip(processor, tmp_path):
    processor.tasks["mine"] = AffectTask.from_dict({"name": "mine", **MINE})
    processor.max_context_tokens = 17
    processor.save_pretrained(tmp_path)
    again = EGMFProcessor.from_pretrained(tmp_path)
    assert {**again.to_dict(), "auto_map": None} == {**processor.to_dict(), "auto_map": None}
    assert again.tasks == processor.tasks and isinstance(again.tasks["mine"], AffectTask)
    assert len(again.tokenizer) == len(processor.tokenizer)
    assert again.chat_template == processor.chat_template
    for name, value in processor("A </s> b", context=["c"], task="mine", answer="定").items():
        assert torch.equal(again("A </s> b", context=["c"], task="mine", answer="定")[name], value)
    again.save_pretrained(tmp_path / "twice")
    for file in ("processor_config.json", "tokenizer.json", "processing_egmf.py"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / file).read_bytes(), file
