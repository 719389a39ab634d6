"""Run a script: the user's errors in one line, Ctrl-C, the end of a process group."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import _interrupt  # noqa: F401
import torch
from torch import distributed

USER_ERRORS = (
    *(ValueError, TypeError, OSError, NotImplementedError, ImportError),
    *(FloatingPointError, torch.OutOfMemoryError),
)


def new_parser(description: str | None, usage: str = "") -> argparse.ArgumentParser:
    """A parser of a script: its docstring as it is, whole names only, and ``--traceback``."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {usage}   (--help lists them)" if usage else None,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a script; the user's errors are one line on standard error and exit code 2.

    With ``--traceback`` among the arguments, errors are raised as they are.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not sys.stderr.isatty():
        _hush()
    try:
        main(argv)
        _part(in_peace=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if "--traceback" in arguments:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    finally:
        _part(in_peace=False)
    return 0


def _part(*, in_peace: bool) -> None:
    """End the process group, if there is one.

    Left to the end of the interpreter, gloo's threads abort a finished process now and then.
    ``in_peace`` waits for the other ranks, under which nobody may end the group.
    """
    if distributed.is_available() and distributed.is_initialized():
        if in_peace:
            from accelerate import PartialState  # loaded already: it made the group

            PartialState().wait_for_everyone()
        distributed.destroy_process_group()


def _hush() -> None:
    """No bars of loaders in log files."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # datasets are imported late
    if "diffusers" not in sys.modules:  # a script without pipelines: nothing to hush
        return
    from diffusers.utils import logging

    logging.disable_progress_bar()
    if find_spec("transformers"):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _message(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, torch.OutOfMemoryError):
        text = f"out of memory; lower --batch-size ({text})"
    return " ".join(text.split())
