"""A folder of generated images and the ``run.json`` that says how each of them was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .files import is_whole_image, write_json, write_png
from .grid import image_grid

FORMAT = "diffsteer-images-1"
GRID_IMAGES = 100


class FolderError(ValueError):
    """An image folder that cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class ImageRequest:
    """One image to make: a seed, and either a class or a prompt."""

    seed: int
    label: int | None = None
    name: str | None = None
    prompt: str | None = None

    @property
    def file(self) -> str:
        """Where the image goes, relative to the folder."""
        what = self.prompt or self.name or f"class {self.label}"
        slug = re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")[:40]
        return f"images/{self.seed:06d}_{slug or 'image'}.png"

    def record(self) -> dict[str, Any]:
        """The image's entry in ``run.json``."""
        return {"file": self.file, **asdict(self)}


class ImageFolder:
    """A folder of images that knows what it should hold, and can be filled in several goes.

    ``run.json`` lists every image from the start and says ``"complete": true`` only when all of
    them are there and whole. A folder is continued only under the configuration it was begun with.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.run_file = self.path / "run.json"

    def read(self) -> dict[str, Any] | None:
        """The folder's ``run.json``, or None where there is none.

        Raises:
            FolderError: if the file is damaged or of another program.
        """
        try:
            run = json.loads(self.run_file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise FolderError(
                f"out: {self.run_file} cannot be read ({error}); choose another folder"
            ) from error
        if not isinstance(run, dict) or run.get("format") != FORMAT:
            raise FolderError(
                f"out: {self.run_file} is not of the format {FORMAT}; choose another folder"
            )
        return run

    def prepare(
        self,
        requests: Sequence[ImageRequest],
        config: dict[str, Any],
        *,
        id2label: dict[int, str] | None = None,
        overwrite: bool = False,
    ) -> list[ImageRequest]:
        """Begin the folder, or continue it; the images that are still to be made.

        Args:
            requests: all images that the folder shall hold; a run can be extended by more.
            config: what decides how they look; may not change while a folder is filled.
            id2label: names of the classes, for readers of the folder.
            overwrite: begin anew: remove the images of the run that is there.

        Raises:
            FolderError: if the folder holds something else, or another run, or the images asked
                for do not include the ones that it was begun with.
        """
        config = plain(config)
        earlier = self.read()
        if earlier is None and self.path.exists() and any(self.path.iterdir()):
            raise FolderError(
                f"out: the folder {self.path} is not empty and holds no run.json of this program; "
                "choose another folder, or empty it"
            )
        if earlier is not None and (overwrite or not self._holds_any(earlier)):
            self._remove(earlier)  # a run that failed before its first image is in nobody's way
            earlier = None
        if earlier is not None:
            self._check_same(earlier, config, requests)
        for left in self.path.glob("images/.*.part"):  # of runs that were killed while they wrote
            left.unlink(missing_ok=True)
        run = {
            "format": FORMAT,
            "complete": False,
            "config": config,
            "id2label": plain(id2label),
            "images": [request.record() for request in requests],
            "sessions": earlier["sessions"] if earlier else [],
        }
        missing = self.missing(requests)
        if earlier is None or missing or earlier["images"] != run["images"]:
            write_json(self.run_file, run)
        return missing

    def missing(self, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
        """The requests whose image is not there, or not whole."""
        return [request for request in requests if not is_whole_image(self.path / request.file)]

    def add(self, request: ImageRequest, image: Image.Image) -> None:
        """Put one image into the folder, whole or not at all."""
        write_png(self.path / request.file, image.convert("RGB"))

    def finish(self, requests: Sequence[ImageRequest], session: dict[str, Any]) -> None:
        """Check that all images are there, draw ``grid.png``, and mark the run complete.

        Raises:
            FolderError: if an image is missing.
        """
        missing = self.missing(requests)
        if missing:
            raise FolderError(
                f"out: {len(missing)} of {len(requests)} images are missing in {self.path}, the "
                f"first is {missing[0].file}; run the same command again to make them"
            )
        write_png(self.path / "grid.png", image_grid(*self._grid(requests)))
        run = self.read() or {}
        run["sessions"] = [*run["sessions"], plain(session)]
        write_json(self.run_file, {**run, "complete": True})

    def open(self, requests: Sequence[ImageRequest]) -> Iterator[Image.Image]:
        """The images of the requests, in their order."""
        for request in requests:
            with Image.open(self.path / request.file) as image:
                yield image.convert("RGB")

    def _grid(self, requests: Sequence[ImageRequest]) -> tuple[list[Image.Image], int]:
        shown = requests[:GRID_IMAGES]
        classes = len({request.label for request in shown})
        columns = classes if 2 <= classes <= 20 else round(len(shown) ** 0.5 + 0.4)
        return list(self.open(shown)), max(columns, 1)

    def _check_same(
        self, earlier: dict[str, Any], config: dict[str, Any], requests: Sequence[ImageRequest]
    ) -> None:
        before = earlier["config"]
        names = [*before, *(name for name in config if name not in before)]
        changed = [
            f"{name} was {_short(before.get(name))}, now {_short(config.get(name))}"
            for name in names
            if before.get(name) != config.get(name)
        ]
        remedy = "choose another folder, or --overwrite to remove that run's images and begin anew"
        if changed:
            raise FolderError(
                f"out: {self.path} holds a run with another configuration: {'; '.join(changed)}; "
                + remedy
            )
        asked = {request.file: request.record() for request in requests}
        for image in earlier["images"]:
            if asked.get(image["file"]) != image:
                raise FolderError(
                    f"out: {self.path} was begun with other seeds, labels or prompts: it has "
                    f"{image['file']}, which is not asked for now; ask for all of its images "
                    f"(more is fine), {remedy}"
                )

    def _holds_any(self, earlier: dict[str, Any]) -> bool:
        return any((self.path / image["file"]).exists() for image in earlier["images"])

    def _remove(self, earlier: dict[str, Any]) -> None:
        """Remove what the earlier run made, and nothing else."""
        for image in earlier["images"]:
            file = self.path / image["file"]
            if file.resolve().is_relative_to(self.path.resolve()):
                file.unlink(missing_ok=True)
        (self.path / "grid.png").unlink(missing_ok=True)
        self.run_file.unlink()


def plain(value: Any) -> Any:
    """``value`` as JSON keeps it: rules and other dataclasses by class name and arguments.

    Infinities and NaN become strings, which every JSON reader understands.
    """
    if is_dataclass(value) and not isinstance(value, type):
        arguments = {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        return {"class": type(value).__name__, "arguments": arguments}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if callable(value):  # a classifier knows its own name
        return str(
            getattr(value, "id", None) or getattr(value, "__qualname__", type(value).__name__)
        )
    return str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
