"""Build guard: a checkout that lost its symbolic links would build a hollow wheel in silence."""

from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).parent / "src" / "diffsteer"
FOLDERS = ("core", "guidance", "samplers", "pipelines", "eval", "training")

lost = [name for name in FOLDERS if not (PACKAGE / name / "__init__.py").is_file()]
if lost:
    raise SystemExit(
        f"src/diffsteer/{{{','.join(lost)}}} should be links to the folders of the same name at "
        "the root of the repository, but this checkout lost its symbolic links. Run `git config "
        "core.symlinks true && git checkout -- src` (on Windows, turn developer mode on first)."
    )

setup()
