"""Shows a model in a browser: a clip in, an answer to look at. Also the program of a Space, see `publish.py --space`.

    python app.py runs/quickstart/model
    python app.py OWNER/NAME --example clip.mp4 "That is just great." --transcriber openai/whisper-small

A Space starts it without arguments: `space.json` beside this file has them.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from transformers import pipeline

from egmf.arguments import positive
from egmf.commands import add_model, check_model, loading_options, run_command
from egmf.space.answering import Recognizer


SETTINGS = Path(__file__).with_name("space.json")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model(parser, nargs="?")
    parser.add_argument(
        "--example", dest="examples", nargs=2, action="append", metavar=("FILE", "WORDS"), help="a clip to choose"
    )
    parser.add_argument("--transcriber", metavar="MODEL", help="speech recognition model for clips without words")
    parser.add_argument(
        "--max_megabytes", type=positive, default=100, help="size of the largest upload; 100 by default"
    )
    parser.add_argument("--max_seconds", type=positive, default=600, help="length of the longest clip; 600 by default")
    parser.add_argument("--port", type=int, help="port of the page; by default a free one from 7860")
    if SETTINGS.is_file():
        settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
        settings["examples"] = [(SETTINGS.parent / file, words) for file, words in settings["examples"]]
        parser.set_defaults(**settings)
    args = parser.parse_args(arguments)
    if args.model is None:
        parser.error("model: got none, wanted the folder or the Hub id of a trained model")
    return args


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # which deletes what was uploaded
    check_model(args.model, args.revision)
    examples = [(str(Path(file).resolve()), words) for file, words in args.examples or []]
    for file, _ in examples:
        if not Path(file).is_file():
            raise ValueError(f"--example: got {file}, wanted an existing file")
    try:
        from egmf.space.page import build_page, launch_page  # imports gradio, which nothing else needs
    except ImportError as error:
        raise ImportError(f"gradio: got {error}, wanted `pip install -r requirements-space.txt`") from None
    recognize = pipeline("affect-recognition", model=args.model, trust_remote_code=True, **loading_options(args))
    recognizer = Recognizer(recognize, args.max_seconds, args.transcriber)
    processor = recognize.processor
    tasks = processor.trained_tasks or [*filter(None, [processor.default_task])] or list(processor.tasks)
    title = "EGMF" if Path(args.model).is_dir() else args.model
    page = build_page(recognizer, title, tasks, examples, args.max_megabytes)
    launch_page(page, args.max_megabytes, server_port=args.port)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
