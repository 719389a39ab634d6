"""The pages say what is true: their code runs, their links lead somewhere, their flags exist."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
FENCE = re.compile(r"^( *)```(\w*)[ \t]*(.*?)$\n(.*?)^\1```[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]\n]*\]\(<?([^)\s>]+)>?[^)\n]*\)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    note: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of ``page``, with the line their text starts at."""
    source = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            source.count("\n", 0, found.start(4)) + 1,
            found[2],
            found[3],
            textwrap.dedent(found[4]),
        )
        for found in FENCE.finditer(source)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_pages_are_found_and_every_fence_is_closed() -> None:
    assert ROOT / "README.md" in PAGES and ROOT / "docs" / "README.md" in PAGES
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), f"{name_of(page)}: a fence is left open"


# -- code ----------------------------------------------------------------------------------------


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A module of its own for the page, in an empty folder: what a reader who pastes it has."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    yield vars(module)


def python_blocks(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language == "python" and "notest" not in b.note.split()]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_the_code_of_a_page_runs(page: Path, namespace: dict[str, object]) -> None:
    for block in python_blocks(page):
        # Empty lines in front, so that a traceback shows the line of the page.
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, str(page), "exec"), namespace)


# -- links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of ``page``, as code hosts make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    dead = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.is_relative_to(ROOT) or not goal.exists():
            dead.append(target)
        elif anchor and goal.suffix == ".md" and anchor not in anchors(goal):
            dead.append(target)
    assert not dead


def test_every_page_can_be_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / t.partition("#")[0]).resolve() for t in LINK.findall(index)}
    pages = {page for page in PAGES if page.parent == ROOT / "docs"}
    assert not pages - linked - {ROOT / "docs" / "README.md"}


# -- commands ------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """The shell commands of ``page``: the lines of its shell blocks, continued lines joined."""
    for block in blocks(page):
        if block.language in ("bash", "sh", "shell", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                yield line.removeprefix("$ ").strip()


@cache
def help_of(script: str, *words: str) -> str:
    """What ``python SCRIPT WORDS --help`` prints, without a process: importing torch is slow."""
    shown = io.StringIO()
    before, folder = sys.argv, str((ROOT / script).parent)
    sys.argv = [script, *words, "--help"]
    sys.path.insert(0, folder)  # what the interpreter does for a script
    try:
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before
        sys.path.remove(folder)
    assert stop.value.code in (0, None), f"{script} --help exits with {stop.value.code}"
    return shown.getvalue()


def calls_in(page: Path) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Each call of a script in the commands of ``page``: script and sub-command, and its flags."""
    for command in commands(page):
        words = shlex.split(command, comments=True)
        for place, word in enumerate(words):
            if re.fullmatch(r"(scripts|benchmarks)/\w+\.py", word):
                flags = {w.partition("=")[0] for w in words[place:] if w.startswith("--")}
                sub = [w for w in words[place + 1 : place + 2] if re.fullmatch(r"[a-z]+", w)]
                yield (word, *sub), flags


def test_every_script_and_file_that_a_page_names_is_there() -> None:
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"(?<![\w/.])((?:scripts|benchmarks|tests|docs)/[\w/]+\.\w+)", text):
            if not (ROOT / path).exists():
                missing.append(f"{name_of(page)}: {path}")
    assert not missing


def test_every_flag_that_a_page_shows_exists() -> None:
    wrong = []
    for page in PAGES:
        for call, flags in calls_in(page):
            known = set(re.findall(r"--[\w-]+", help_of(*call)))
            wrong += [f"{name_of(page)}: {' '.join(call)} has no {f}" for f in flags - known]
    assert not wrong


def test_every_script_explains_itself() -> None:
    for path in sorted((ROOT / "scripts").glob("[!_]*.py")):
        assert "usage:" in help_of(f"scripts/{path.name}")


def test_every_make_target_that_a_page_shows_exists() -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for page in PAGES:
        for command in commands(page):
            if command.startswith("make "):
                words = shlex.split(command, comments=True)[1:]
                named |= {word for word in words if re.fullmatch(r"[\w-]+", word)}
        named |= set(re.findall(r"`make (\w+)[^`]*`", page.read_text(encoding="utf-8")))
    assert {"test", "demo"} <= named
    assert not named - known
