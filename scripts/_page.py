"""Results put into a page of the documents, between marks that name the script."""

from __future__ import annotations

from pathlib import Path

from diffsteer.pipelines import files

END = "<!-- up to here -->"


def begin(script: str) -> str:
    """The mark after which ``script`` writes."""
    return f"<!-- from here on written by scripts/{script} -->"


def rewrite(page: Path, script: str, text: str) -> None:
    """Put ``text`` between the marks of the page; the rest of it stays.

    Raises:
        ValueError: if the page has no such marks.
        OSError: if it cannot be read or written.
    """
    before, mark = page.read_text(encoding="utf-8"), begin(script)
    head, _, rest = before.partition(mark)
    if before.count(mark) != 1 or rest.count(END) != 1:
        raise ValueError(f"--page {page} must hold one line {mark!r} and then one line {END!r}")
    files.write_bytes(page, f"{head}{mark}\n\n{text}\n{END}{rest.partition(END)[2]}".encode())
