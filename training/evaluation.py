"""Scores of the averaged weights while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..eval import EvalSuite, PeriodicEvaluation
from ..eval.classifiers import CIFAR10_CLASSES
from .config import TrainConfig
from .data import EpochOrder, Images

__all__ = ["evaluation_during"]

REAL_IMAGES = 2000  # of other data than CIFAR-10, for the reference
GUIDANCE_SCALE = 1.5
STEPS = 20


def evaluation_during(
    config: TrainConfig, images: Images, pipeline: Callable[[], Any]
) -> Callable[[int], dict[str, float] | None]:
    """What to call after every update: scores every ``config.eval_every``, else None.

    The embedded CIFAR-10 network measures the distance to CIFAR-10's test images and the class
    accuracy if the classes are CIFAR-10's; to images of the training data otherwise. All ranks must
    call it.

    Args:
        config: the settings.
        images: the training data.
        pipeline: gives a pipeline with the weights as they are.
    """
    if not config.eval_every:
        return lambda step: None
    ready: dict[str, Any] = {}

    def generate(seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        labels = torch.tensor(seeds) % len(images.names)
        call = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": STEPS}
        made = ready["pipe"](labels, seeds=list(seeds), output_type="pt", **call)
        return made.images, labels

    evaluation = PeriodicEvaluation(
        _suite(config, images),
        generate,
        config.eval_every,
        seeds=range(config.eval_images),
        batch_size=min(config.batch_size, config.eval_images),
    )

    def scores(step: int) -> dict[str, float] | None:
        if step % config.eval_every == 0:
            ready["pipe"] = pipeline()
        values = evaluation(step)
        ready.clear()
        return values

    return scores


def _suite(config: TrainConfig, images: Images) -> EvalSuite:
    if tuple(images.names) == tuple(CIFAR10_CLASSES):
        return EvalSuite(("fd", "accuracy"))
    suite = EvalSuite(("fd",))
    count = min(REAL_IMAGES, len(images))
    chosen = EpochOrder(len(images), config.seed).stretch(0, count)
    pixels, _ = images.take(chosen, torch.zeros(count, dtype=torch.bool))
    suite.update((pixels + 1) / 2, real=True)
    return suite
