"""Run a script of ``scripts/`` inside the test process, as its command line would."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name: str) -> ModuleType:
    """Import ``scripts/<name>.py`` under its own name, as Python does when it is run."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


def run(name: str, *arguments: object) -> int:
    """The exit code of ``python scripts/<name>.py <arguments>``."""
    return int(load("_cli").run(load(name).main, [str(argument) for argument in arguments]))
