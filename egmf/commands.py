"""How a command ends: with one line for a mistake of its user, with a traceback only for a fault of this project."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from egmf.configuration_egmf import ARCHITECTURE


MISTAKE = 2  # the exit status, as for arguments that argparse refuses
REPOSITORY = Path(__file__).resolve().parents[1]


def is_mistake(error: Exception) -> bool:
    """Whether the user can correct an error: a file, the network, or a value that our own code refuses.

    Our own code raises a ValueError for a wrong value, or an ImportError for a missing package, and names it. One that
    a library raises is not meant for users.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | ImportError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename).resolve()
    ours = (
        "site-packages" not in file.parts if file.is_relative_to(REPOSITORY) else "transformers_modules" in file.parts
    )
    return ours and str(last.line).startswith("raise ")


def run_command(main: Callable[[list[str]], Any], arguments: list[str]) -> None:
    """Runs a command and exits with its status; a user's mistake is printed without a traceback and gives status 2."""
    try:
        status = main(arguments)
        if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
            # A process that ends with an open group may abort after all its work: pytorch/pytorch#190489.
            distributed.destroy_process_group()
        sys.exit(status)
    except Exception as error:
        if not is_mistake(error):
            raise
        script = Path(sys.argv[0])
        name = f"python -m {script.parent.name}" if script.stem == "__main__" else script.name
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)


def add_model(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Adds the arguments that name a trained model: `model`, `--revision` and `--dtype`."""
    parser.add_argument("model", help="folder or Hub id of a trained model", **options)
    parser.add_argument("--revision", help="branch, tag or commit of the Hub id, whose code is run")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="by default as it was saved")


def loading_options(args: argparse.Namespace) -> dict[str, str]:
    """The options of `from_pretrained` and `pipeline` that [`add_model`]'s arguments name."""
    named = {"revision": args.revision, "dtype": args.dtype}
    return {name: value for name, value in named.items() if value is not None}


def check_model(name: str, revision: str | None = None) -> None:
    """Checks that a folder or Hub id has a trained model of this version's architecture.

    A checkpoint brings its own code, but the commands rely on what that code can do.

    Raises:
        ValueError: If the name is neither a folder nor a Hub id, or the model is another one or of another version.
        OSError: If the Hub id cannot be read.
    """
    check_name("model", name, "the `model` folder of a run")
    config = PreTrainedConfig.get_config_dict(name, **({"revision": revision} if revision else {}))[0]
    if config.get("model_type") != "egmf":
        kind = config.get("model_type")
        raise ValueError(f"model: got {name}, a model of type {kind}, wanted the `model` folder of a run")
    if (version := config.get("architecture", 1)) != ARCHITECTURE:
        wanted = f"one of {ARCHITECTURE}, or this project at the commit that trained it"
        raise ValueError(f"model: got {name}, a model of architecture {version}, wanted {wanted}")


def load_training_fields(model: str, revision: str | None) -> dict[str, Any]:
    """The recipe that a model was trained with, from `recipe.json` next to its weights; empty if there is none."""
    file = cached_file(model, "recipe.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}


def check_name(field: str, name: str, wanted: str) -> None:
    """Raises a ValueError if a field's name is neither a folder with a config.json nor a Hub id.

    Args:
        field: The field, for the message.
        name: Its value.
        wanted: What a folder must be, for the message.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"{field}: got {name}, a folder without config.json, wanted {wanted}")
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{field}: got {name!r}, wanted an existing folder or a Hub id (OWNER/NAME)") from None
