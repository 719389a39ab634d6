"""Many settings over the same seeds: generate, score, go on where it stopped, compare.

Each point of a sweep is a folder of images (see ``image_folder``) with its scores and a
``point.json`` that says what it cost. A finished point is not touched again; a half-done one goes
on; one that another classifier or other metrics have scored is scored again, not made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..eval.cache import FeatureCache
from ..eval.report import EvalResult, read_result
from ..eval.run import Reading, evaluate, set_reference
from ..eval.suite import EvalSuite
from .files import write_json
from .generation import generate_images, run_settings
from .image_folder import FolderError, ImageFolder, ImageRequest, plain
from .sweep_cost import PointCost, guidance_off, point_cost
from .sweep_point import SweepPoint
from .sweep_report import write_report

FORMAT = "diffsteer-point-1"


@dataclass(frozen=True)
class PointResult:
    """A finished point: where its images are, what they cost, how they score."""

    point: SweepPoint
    folder: Path
    cost: PointCost
    result: EvalResult

    @property
    def seconds_per_image(self) -> float | None:
        """Wall-clock time of an image over all sessions that made them; None where unknown."""
        sessions = (ImageFolder(self.folder).read() or {}).get("sessions", [])
        made = sum(session["generated"] for session in sessions)
        return sum(session["seconds"] for session in sessions) / made if made else None


def run_sweep(
    pipe: Any,
    requests: Sequence[ImageRequest],
    out: Path,
    points: Sequence[SweepPoint],
    *,
    suite: EvalSuite | None = None,
    reference: str | Path | None = None,
    reading: Reading | None = None,
    cache: FeatureCache | None = None,
    weak: Any = None,
    batch_size: int = 16,
    config: dict[str, Any] | None = None,
    call: dict[str, Any] | None = None,
    overwrite: bool = False,
    state: Any = None,
) -> list[PointResult]:
    """Make and score every point that is not finished; then write tables, plots and a picture.

    Every point is priced on one image before the first is made, so a rule that cannot run here
    stops the sweep before it has begun. ``out`` gets ``points/<name>/``, ``sweep.json``,
    ``sweep.csv``, ``grid.png`` and plots; see ``sweep_report``.

    Args:
        pipe: see ``generate_images``.
        requests: the same seeds, and classes or prompts, for every point.
        out: the folder; a sweep in it is continued, and may get further points.
        points: all with different names.
        suite: metrics and feature networks; by default ``EvalSuite()``.
        reference: real images or statistics, see ``eval.evaluate``; None is the embedded CIFAR-10
            test set.
        reading: how images are read.
        cache: keeps extracted features, for whoever looks at the points again.
        weak: a second model, see ``steer``.
        batch_size: images a call; changes no image.
        config: what else decides how images look, e.g. the model's name.
        call: further arguments of the pipeline's call.
        overwrite: make the images of these points anew.
        state: accelerate's ``PartialState`` when several processes share the work.

    Returns:
        The results, in the order of ``points``.

    Raises:
        FolderError: if the folder holds something else, or a point's folder another configuration.
        ValueError: if there is no point, two have one name, or a point cannot be made.
    """
    _check_points(points)
    _check_folder(out)
    main = state is None or state.is_main_process
    shared = _Shared(
        pipe, list(requests), Path(out), suite or EvalSuite(), reading or Reading(), weak,
        batch_size, config or {}, call or {}, state, _fingerprint(reference), cache,
    )  # fmt: skip
    costs, results = shared.left_over(points, overwrite=overwrite)
    report = partial(shared.report, points, costs, results, write=main)
    if reference is not None and len(results) < len(points):
        set_reference(shared.suite, reference, shared.reading)
    for point in points:
        if point.name not in results:
            report(complete=False)
            shared.make(point, costs[point.name], overwrite=overwrite)
            results[point.name] = shared.score(point, costs[point.name])
    return report(complete=True)


@dataclass(frozen=True)
class _Known:
    """What an earlier command left of a point: its cost, and its score if that still holds."""

    cost: PointCost
    result: EvalResult | None


@dataclass(frozen=True)
class _Shared:
    """What all points have in common."""

    pipe: Any
    requests: list[ImageRequest]
    out: Path
    suite: EvalSuite
    reading: Reading
    weak: Any
    batch_size: int
    config: dict[str, Any]
    call: dict[str, Any]
    state: Any
    reference: str
    cache: FeatureCache | None

    def folder(self, point: SweepPoint) -> Path:
        return self.out / "points" / point.name

    def about(self, *, complete: bool) -> dict[str, Any]:
        return {
            "complete": complete,
            "config": plain({**self.config, "call": self.call}),
            "seeds": [request.seed for request in self.requests],
            "evaluation": self.evaluation(),
        }

    def evaluation(self) -> dict[str, Any]:
        """What decides a score besides the images."""
        return plain(
            {
                "metrics": self.suite.metrics,
                "settings": asdict(self.suite.settings),
                "extractors": [extractor.id for extractor in self.suite.extractors],
                "reference": self.reference,
                "reading": {"num": self.reading.num, "seed": self.reading.seed},
                "seeds": len(self.requests),
            }
        )

    def point_call(self, cost: PointCost) -> dict[str, Any]:
        """The call's arguments: without the unconditional branch where nobody asks for it."""
        off = None if cost.guided else guidance_off(self.pipe, self.call)
        return self.call if off is None else off

    def settings(self, point: SweepPoint, cost: PointCost) -> dict[str, Any]:
        call = self.point_call(cost) if point.rule is not None else self.call
        return plain({**self.config, **run_settings(self.pipe, point.rule, point.steps, call)})

    def left_over(
        self, points: Sequence[SweepPoint], *, overwrite: bool
    ) -> tuple[dict[str, PointCost], dict[str, EvalResult]]:
        """What every point costs, and the scores of those that an earlier command finished."""
        known = {point.name: None if overwrite else self.known(point) for point in points}
        costs = {name: found.cost for name, found in known.items() if found is not None}
        costs |= {point.name: self.price(point) for point in points if point.name not in costs}
        return costs, {
            name: found.result for name, found in known.items() if found and found.result
        }

    def report(
        self,
        points: Sequence[SweepPoint],
        costs: dict[str, PointCost],
        results: dict[str, EvalResult],
        *,
        complete: bool,
        write: bool,
    ) -> list[PointResult]:
        """The finished points, in order, and what tells of them beside the images."""
        done = [
            PointResult(point, self.folder(point), costs[point.name], results[point.name])
            for point in points
            if point.name in results
        ]
        if write:
            about = self.about(complete=complete)
            write_report(self.out, done, self.requests, about, pictures=complete)
        return done

    def known(self, point: SweepPoint) -> _Known | None:
        """The finished point, if it was made under these settings and all images are there."""
        try:
            record = json.loads((self.folder(point) / "point.json").read_text())
            cost = PointCost(**record["cost"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        run = ImageFolder(self.folder(point)).read() or {}
        images = [request.record() for request in self.requests]
        whole = run.get("complete") and run.get("images") == images
        if not whole or run.get("config") != self.settings(point, cost):
            return None
        if not all((self.folder(point) / image["file"]).is_file() for image in images):
            return None
        same = record.get("evaluation") == self.evaluation()
        return _Known(cost, self._result(point) if same else None)

    def _result(self, point: SweepPoint) -> EvalResult | None:
        try:
            return read_result(self.folder(point) / "metrics.json")
        except ValueError:
            return None

    def price(self, point: SweepPoint) -> PointCost:
        try:
            return point_cost(
                self.pipe, self.requests[0], point.rule, steps=point.steps, weak=self.weak,
                call=self.call, batch_size=min(self.batch_size, len(self.requests)),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"point {point.name}: {error}") from error

    def make(self, point: SweepPoint, cost: PointCost, *, overwrite: bool) -> None:
        generate_images(
            self.pipe, self.requests, self.folder(point), rule=point.rule, weak=self.weak,
            steps=point.steps, batch_size=self.batch_size, config=self.config,
            call=self.point_call(cost) if point.rule is not None else self.call,
            overwrite=overwrite, state=self.state, title=point.name,
        )  # fmt: skip

    def score(self, point: SweepPoint, cost: PointCost) -> EvalResult:
        folder = self.folder(point)
        result = evaluate(folder, suite=self.suite, reading=self.reading, cache=self.cache)
        if self.state is None or self.state.is_main_process:
            record = {
                "format": FORMAT,
                "point": {"name": point.name, "family": point.family, "scale": point.scale},
                "cost": asdict(cost),
                "evaluation": self.evaluation(),
            }
            write_json(folder / "metrics.json", result.as_dict())
            write_json(folder / "point.json", record)  # last: it says that the rest is there
        return result


def _fingerprint(reference: str | Path | None) -> str:
    """Enough to notice that another reference is meant, or that the file has changed."""
    if reference is None:
        return "embedded"
    path = Path(reference)
    if not path.exists():
        return str(reference)
    known = path.stat()
    return f"{reference}:{known.st_size}:{known.st_mtime_ns}"


def _check_points(points: Sequence[SweepPoint]) -> None:
    names = [point.name for point in points]
    if not names:
        raise ValueError("points: give at least one")
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"points: {doubles[0]} is there twice; every point needs its own name")


def _check_folder(out: Path) -> None:
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FolderError(f"out: {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / "sweep.json").is_file():
        raise FolderError(
            f"out: the folder {out} is not empty and holds no sweep.json; choose another folder"
        )
