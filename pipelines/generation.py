"""Fill a folder with images: seed by seed, resumable, on one machine or many."""

from __future__ import annotations

import inspect
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..core.noise import seeded_generators
from ..core.step import Guidance, needs_uncond
from .image_folder import FolderError, ImageFolder, ImageRequest
from .labels import label_ids
from .steer import steer

GUIDED = 4.0  # turns a pipeline's own guidance on; steer() replaces what it does


def plan_images(
    seeds: Sequence[int],
    *,
    pipe: Any = None,
    classes: Any = None,
    prompts: Sequence[str] | None = None,
) -> list[ImageRequest]:
    """One request a seed; classes or prompts are dealt out in turn.

    Args:
        seeds: all different: a seed names an image.
        pipe: the class-conditional pipeline that ``classes`` belong to.
        classes: class indices or names of ``pipe``, or None for all of its classes.
        prompts: prompts instead of classes.

    Raises:
        ValueError: if a seed occurs twice or is negative, a class is unknown, or there is nothing
            to make.
    """
    if not seeds:
        raise ValueError("seeds: give at least one")
    doubles = sorted({seed for seed in seeds if seeds.count(seed) > 1}) if _doubled(seeds) else []
    if doubles or min(seeds) < 0:
        wrong = f"{doubles[0]} is given twice" if doubles else f"{min(seeds)} is negative"
        raise ValueError(f"seeds: {wrong}; a seed names an image, so give different ones from 0 up")
    if prompts is not None:
        if not prompts:
            raise ValueError("prompts: give at least one")
        return [ImageRequest(s, prompt=prompts[i % len(prompts)]) for i, s in enumerate(seeds)]
    count, ids = class_table(pipe)
    labels = list(range(count)) if classes is None else label_ids(classes, count, ids)
    names = {index: name for name, index in reversed(ids.items())}
    dealt = [labels[i % len(labels)] for i in range(len(seeds))]
    return [ImageRequest(s, label, names.get(label)) for s, label in zip(seeds, dealt, strict=True)]


def class_table(pipe: Any) -> tuple[int, dict[str, int]]:
    """Number of classes of a class-conditional pipeline, and the index of each class name."""
    if hasattr(pipe, "label2id"):
        return pipe.num_classes, pipe.label2id
    return int(pipe.transformer.config.num_embeds_ada_norm), dict(getattr(pipe, "labels", {}))


def takes_classes(pipe: Any) -> bool:
    """Whether the pipeline is conditioned on class labels rather than on prompts."""
    return "class_labels" in inspect.signature(pipe.__call__).parameters


def generate_images(
    pipe: Any,
    requests: Sequence[ImageRequest],
    out: Path,
    *,
    rule: Guidance | None = None,
    weak: Any = None,
    steps: int = 20,
    batch_size: int = 16,
    config: dict[str, Any] | None = None,
    call: dict[str, Any] | None = None,
    overwrite: bool = False,
    state: Any = None,
    progress: bool | None = None,
    title: str | None = None,
) -> Path:
    """Make the images that are not in the folder yet; ``out/run.json`` then says how.

    Every image depends on its own seed alone, so batch size, number of ranks and interruptions
    change nothing (to rounding). Each rank makes every n-th image; rank 0 keeps ``run.json``.

    Args:
        pipe: a diffusers pipeline that makes images from prompts or class labels.
        requests: what to make, see ``plan_images``.
        out: the folder; an unfinished run in it is continued.
        rule: a guidance method for ``steer``; None is the conditional model without guidance.
        weak: a second model for the rule, see ``steer``.
        steps: solver steps.
        batch_size: images a call.
        config: further entries for the configuration in ``run.json``, e.g. the model's name.
        call: further arguments of the pipeline's call, e.g. height or negative_prompt.
        overwrite: remove the images of the run that is in the folder, and begin anew; not before
            the first new ones are made.
        state: accelerate's ``PartialState`` when several processes share the work.
        progress: show a progress bar; by default on rank 0 if standard error is a terminal.
        title: of the progress bar.

    Returns:
        The folder.

    Raises:
        FolderError: if the folder holds something else or another run.
        ValueError: if an argument is out of range or the pipeline cannot do what is asked.
        OSError: if an image cannot be written; the finished ones stay.
    """
    _check_counts(steps=steps, batch_size=batch_size)
    rank, ranks = (state.process_index, state.num_processes) if state else (0, 1)
    guided = rule is not None and needs_uncond(rule)  # else an evaluation would be wasted
    extra = check_call(pipe, requests, guided=guided, call=call or {})
    extra["num_inference_steps"] = steps
    folder, began, mine = ImageFolder(out), time.time(), requests[rank::ranks]
    missing: list[ImageRequest] = []
    with steer(pipe, rule, weak=weak) if rule is not None else nullcontext():
        if rank == 0:
            settings = {**(config or {}), **run_settings(pipe, rule, steps, call or {})}
            missing = _begun(folder, pipe, requests, settings, overwrite, mine[:batch_size], extra)
        _wait(state)
        todo = folder.missing(mine)
        with _progress(len(mine), len(todo), rank, progress, title) as bar:
            for start in range(0, len(todo), batch_size):
                _add(folder, _made(pipe, todo[start : start + batch_size], extra))
                bar.update(min(batch_size, len(todo) - start))
    _wait(state)
    if rank == 0 and (missing or not (folder.read() or {}).get("complete")):
        folder.finish(requests, _session(pipe, len(missing), batch_size, ranks, began))
    _wait(state)
    return folder.path


def _begun(
    folder: ImageFolder,
    pipe: Any,
    requests: Sequence[ImageRequest],
    settings: dict[str, Any],
    overwrite: bool,
    first: Sequence[ImageRequest],
    extra: dict[str, Any],
) -> list[ImageRequest]:
    """Begin or continue the folder; the requests that it did not have."""
    # Images are removed only for images: what fails at once finds that out before.
    made = _made(pipe, first, extra) if overwrite and folder.read() else []
    names = getattr(pipe, "id2label", None)
    missing = folder.prepare(requests, settings, id2label=names, overwrite=overwrite)
    _add(folder, made)
    return missing


def _made(
    pipe: Any, batch: Sequence[ImageRequest], extra: dict[str, Any]
) -> list[tuple[ImageRequest, Any]]:
    images = _images(pipe, {**extra, **batch_inputs(batch, extra)}, len(batch))
    return list(zip(batch, images, strict=True))


def _add(folder: ImageFolder, made: Sequence[tuple[ImageRequest, Any]]) -> None:
    for request, image in made:
        folder.add(request, image)


def _images(pipe: Any, arguments: dict[str, Any], count: int) -> Sequence[Any]:
    output = pipe(**arguments)
    images = getattr(output, "images", None)
    if images is None or len(images) != count or not hasattr(images[0], "convert"):
        raise ValueError(
            f"pipe: {type(pipe).__name__} was asked for {count} images and gave "
            f"{type(output).__name__}; only pipelines that make one image a prompt can be used here"
        )
    flagged = getattr(output, "nsfw_content_detected", None) or []
    black = [
        g.initial_seed() for g, bad in zip(arguments["generator"], flagged, strict=False) if bad
    ]
    if black:
        raise ValueError(
            f"pipe: its safety checker blackened the images of the seeds {black}; change the "
            "prompt, leave these seeds out, or save the pipeline without a safety checker"
        )
    return images


def batch_inputs(batch: Sequence[ImageRequest], extra: dict[str, Any]) -> dict[str, Any]:
    """What differs from batch to batch of a pipeline's calls: seeds, and classes or prompts."""
    inputs: dict[str, Any] = {"generator": seeded_generators([request.seed for request in batch])}
    if batch[0].prompt is None:
        return {**inputs, "class_labels": [request.label for request in batch]}
    if isinstance(extra.get("negative_prompt"), str):
        inputs["negative_prompt"] = [extra["negative_prompt"]] * len(batch)
    return {**inputs, "prompt": [request.prompt for request in batch]}


def check_call(
    pipe: Any, requests: Sequence[ImageRequest], *, guided: bool, call: dict[str, Any]
) -> dict[str, Any]:
    """The arguments that every call of the pipeline gets.

    Raises:
        ValueError: if the pipeline does not take them, or has no guidance to steer.
    """
    name, taken = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    wanted = "prompt" if requests[0].prompt is not None else "class_labels"
    if wanted not in taken:
        other = "classes" if wanted == "prompt" else "a prompt"
        raise ValueError(f"{wanted}: {name} takes no {wanted}; give {other} instead")
    for needed in ("num_inference_steps", "generator"):
        if needed not in taken:
            raise ValueError(f"pipe: {name} takes no {needed}, so it cannot be used here")
    unknown = sorted(set(call) - set(taken))
    if unknown:
        raise ValueError(
            f"call: {name} takes no argument {unknown[0]!r}; it takes {', '.join(taken)}"
        )
    if "true_cfg_scale" in taken:  # Flux, Qwen: guidance_scale is an input of the network there
        on = {"true_cfg_scale": GUIDED, "negative_prompt": ""}
        return {**(on if guided else {"true_cfg_scale": 1.0}), **call}
    if "guidance_scale" in taken:
        return {"guidance_scale": GUIDED if guided else 1.0, **call}
    if guided:
        raise ValueError(f"guidance: {name} has no classifier-free guidance to steer; use none")
    return dict(call)


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def run_settings(pipe: Any, rule: Any, steps: int, call: dict[str, Any]) -> dict[str, Any]:
    """What decides how images look, besides the model: the ``config`` of ``run.json``."""
    scheduler = getattr(pipe, "scheduler", None)
    config = {} if scheduler is None else dict(scheduler.config)
    return {
        "pipeline": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "guidance": rule,
        "steps": steps,
        "call": call,
        "scheduler": {
            "class": type(scheduler).__name__,
            **{key: value for key, value in sorted(config.items()) if not key.startswith("_")},
        },
    }


def _session(pipe: Any, made: int, batch_size: int, ranks: int, began: float) -> dict[str, Any]:
    """What may differ from part to part of an interrupted run."""
    packages = ("diffsteer", "torch", "diffusers", "transformers", "accelerate")
    return {
        "command": sys.argv,
        "generated": made,
        "seconds": round(time.time() - began, 2),
        "batch_size": batch_size,
        "ranks": ranks,
        "device": str(pipe.device),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _doubled(seeds: Sequence[int]) -> bool:
    return len(set(seeds)) < len(seeds)


def _wait(state: Any) -> None:
    if state is not None:
        state.wait_for_everyone()


def _progress(total: int, todo: int, rank: int, wanted: bool | None, title: str | None) -> Any:
    shown = rank == 0 and (sys.stderr.isatty() if wanted is None else wanted)
    return tqdm(total=total, initial=total - todo, unit="image", desc=title, disable=not shown)


__all__ = ["FolderError", "ImageRequest", "class_table", "generate_images", "plan_images"]
