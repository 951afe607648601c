"""The page of `app.py`: a clip in, an answer to look at. This module alone imports gradio."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import route_utils

from egmf.readme import section
from egmf.space.answering import LONGEST_LABELS, LONGEST_WORDS, Question, Recognizer, Refusal, Uploads
from egmf.space.rendering import Answer, render_answer, render_timeline


HERE = Path(__file__).parent
REFRESH = 0.5  # seconds between two pictures of a growing timeline
OLDEST, SWEEP = 3600, 600  # seconds that an upload may wait for a question, and between two looks for such
WAITING = 20  # questions in the queue; more are told to come back
HEAD = """# {}
Choose or record a clip and ask what its speaker expresses. A clip may be at most {} MB and {} seconds long. The server
deletes it as soon as it is answered. **A label is what annotators saw in clips, not what the person felt:** read about
[use and misuse](#use-and-misuse) below."""
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"}


def build_page(
    recognizer: Recognizer, title: str, tasks: list[str], examples: list[tuple[str, str]], max_megabytes: int
) -> gr.Blocks:
    """The page as a Gradio app, not yet launched.

    Args:
        recognizer: Answers the questions.
        title: Heading of the page.
        tasks: Names of the tasks to choose from; the first is chosen.
        examples: Clips to choose from, with their words.
        max_megabytes: Size of the largest upload, as [`launch_page`] gets it.
    """
    files = [file for file, _ in examples]
    gr.set_static_paths(files)  # they are served where they are
    uploads, reads = Uploads(files), recognizer.media
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
    route_utils.GradioUploadFile = _Upload
    uploads.sweep_often(SWEEP, OLDEST)  # Gradio's `delete_cache` leaves what broken connections leave

    def show(video: str | None, sound: str | None, words: str, task: str, labels: str) -> Iterator[tuple[str, str]]:
        """The timeline and the answer as HTML, while they grow."""
        with _held(uploads, video or sound) as file:
            shown, answers = time.monotonic(), []
            for answers in recognizer(Question(file, words, task, labels)):
                if time.monotonic() - shown > REFRESH and _is_part(answers[-1]):
                    shown = time.monotonic()
                    yield render_timeline(answers), render_answer(answers, has_ended=False)
            yield render_timeline(answers), render_answer(answers)

    def answer(file: str | None, words: str, task: str, labels: str) -> list[Answer]:
        """The answers to a clip, as predict.py prints them: those to its segments, and at last that to the whole."""
        with _held(uploads, file) as held:
            *_, answers = recognizer(Question(held, words, task, labels))
            return answers

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(HEAD.format(title, max_megabytes, recognizer.max_seconds))
        with gr.Row(equal_height=False):
            with gr.Column():
                video, sound = _clip_inputs(reads)
                timeline = gr.HTML(elem_id="timeline")
                heard = recognizer.transcriber is not None
                words = gr.Textbox(
                    value="",
                    label="What is said",
                    info="Left empty, the words are recognised." if heard else "May stay empty.",
                    max_length=LONGEST_WORDS,
                    lines=2,
                    visible=recognizer.reads_text,
                )
                choices = [(_described(recognizer, name), name) for name in tasks]
                task = gr.Dropdown(choices, value=tasks[0], label="Task", visible=len(tasks) > 1)
                labels = gr.Textbox(
                    value="",
                    label="Your own labels",
                    info="Instead of those of the task: two or more, separated by commas.",
                    max_length=LONGEST_LABELS,
                )
                button = gr.Button("Answer", variant="primary", elem_id="ask")
            with gr.Column():
                panel = gr.HTML(elem_id="answer")
        if examples:
            rows = [[None, file, said] if _is_sound(file) else [file, None, said] for file, said in examples]
            gr.Examples(rows, [video, sound, words], label="Examples", cache_examples=False)
        gr.Markdown(f"## Use and misuse\n{section('Use and misuse')}", elem_id="use-and-misuse")

        # One clip at a time: a new one replaces the other, and the timeline of the last answer.
        for clip, other, place in ((video, sound, "video"), (sound, video, "sound")):
            clip.change(None, clip, None, js=f"(value) => {{ egmf.keep(value, '{place}'); }}")
            clip.input(lambda: (None, "", ""), None, [other, timeline, panel], queue=False, api_visibility="private")
        sent = "async (video, sound, ...rest) => [await egmf.send(video), await egmf.send(sound), ...rest]"
        button.click(
            show,
            [video, sound, words, task, labels],
            [timeline, panel],
            js=sent,
            show_progress="minimal",
            show_progress_on=panel,
            concurrency_id="model",
            api_visibility="private",
        )
        clip, answers = gr.File(visible=False, label="clip"), gr.JSON(visible=False, label="answers")
        gr.Button(visible=False).click(
            answer, [clip, words, task, labels], answers, concurrency_id="model", api_name="answer"
        )
        page.load(None, None, None, js="() => { egmf.announce('answer'); }")
        for component in (video, sound, clip):
            _refuse_urls(component)
    # Without `api_open`, programs wait in the queue as well; the model answers one question at a time.
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def launch_page(page: gr.Blocks, max_megabytes: int, **options: Any) -> None:
    """Serves the page until the program is stopped.

    Args:
        page: The page of [`build_page`].
        max_megabytes: Size of the largest upload.
        options: As for `gradio.Blocks.launch`.
    """
    page.launch(
        max_file_size=f"{max_megabytes}mb",
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=["api"],
        ssr_mode=False,
        share=False,
        enable_monitoring=False,
        **options,
    )


def _clip_inputs(reads: list[str]) -> tuple[gr.Video, gr.Audio]:
    """The inputs for a clip, as far as the model reads media."""
    with gr.Tabs(visible=bool(reads)):
        with gr.Tab("Video", visible="video" in reads):
            video = gr.Video(
                sources=["upload", "webcam"],
                label="Video",
                include_audio=True,
                webcam_options=gr.WebcamOptions(mirror=False),
                elem_id="video",
            )
        with gr.Tab("Sound", visible="audio" in reads):
            sound = gr.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="Sound",
                editable=False,
                waveform_options=gr.WaveformOptions(show_recording_waveform=False),
                elem_id="sound",
            )
    return video, sound


def _described(recognizer: Recognizer, name: str) -> str:
    task = recognizer.recognize.processor.tasks[name]
    answers = ", ".join(task.labels) if task.labels else f"a score from {task.low:+.1f} to {task.high:+.1f}"
    return f"{name}: {answers}"


def _is_sound(file: str) -> bool:
    return Path(file).suffix.lower() in SOUNDS


def _is_part(answer: Answer) -> bool:
    return "start" in answer and "segments" not in answer and not answer["error"]


class _Upload(route_utils.GradioUploadFile):
    """An upload with a path of its own. Gradio gives equal files of two users one, which the first answer deletes."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.sha.update(os.urandom(16))


def _error(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


@contextmanager
def _held(uploads: Uploads, path: str | None) -> Iterator[str | None]:
    try:
        with uploads.held(path) as file:
            yield file
    except Refusal as refusal:
        raise _error(str(refusal)) from None


def _refuse_urls(component: gr.Video | gr.Audio | gr.File) -> None:
    """Takes only uploads. Gradio would download a clip that a program names by its URL, of any size."""
    move = component.async_move_resource_to_block_cache

    async def move_upload(place: str | Path | None) -> str | None:
        if str(place).startswith(("http://", "https://")):
            raise _error("The clip is a URL; this page takes uploads.")
        return await move(place)

    component.async_move_resource_to_block_cache = move_upload
