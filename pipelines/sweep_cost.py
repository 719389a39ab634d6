"""What one image costs under a rule: run it once and count."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.step import Guidance, Step, needs_uncond
from .generation import batch_inputs, check_call
from .image_folder import ImageRequest
from .observe import first_tensor
from .steer import steer
from .validate import find_denoisers

OFF = {"true_cfg_scale": 1.0, "guidance_scale": 1.0}


@dataclass(frozen=True)
class PointCost:
    """The price of one image, counted in a run of one image.

    Attributes:
        nfe: predictions asked of networks: one noisy sample, one branch, one model. The unit of
            papers, whatever the batching.
        rows: rows that went through the networks. More than ``nfe`` where a pipeline that batches
            both branches computes one that nobody asked for.
        guided: whether the pipeline has to evaluate its unconditional branch for this rule.
        classifier_calls: how often the rule called its classifier; 0 without one.
        classifier_seconds: time of its classifier, per step, for ``batch_size`` images, with the
            gradient where the rule takes one; None without a classifier.
        batch_size: see ``classifier_seconds``.
    """

    nfe: int
    rows: int
    guided: bool
    classifier_calls: int = 0
    classifier_seconds: float | None = None
    batch_size: int = 1


def point_cost(
    pipe: Any,
    request: ImageRequest,
    rule: Guidance | None,
    *,
    steps: int,
    weak: Any = None,
    call: dict[str, Any] | None = None,
    batch_size: int = 1,
) -> PointCost:
    """Make one image and count; a rule that cannot run here fails here, before the first point.

    A rule that says that it does without the unconditional prediction (``needs_uncond``) is run
    without it, which ``PointCost.guided`` says.

    Args:
        pipe: the pipeline.
        request: the image.
        rule: the guidance method, or None.
        steps: solver steps.
        weak: a second model, see ``steer``.
        call: further arguments of the pipeline's call.
        batch_size: to time the classifier at.

    Raises:
        MissingPrediction: if the rule needs what the pipeline does not have.
        ValueError: if the pipeline or the rule refuses the arguments.
    """
    spared = None
    if rule is not None and not needs_uncond(rule):
        spared = guidance_off(pipe, call or {})
    guided = rule is not None and spared is None
    arguments = (call or {}) if spared is None else spared
    return _count(pipe, request, rule, steps, weak, arguments, batch_size, guided=guided)


def guidance_off(pipe: Any, call: dict[str, Any]) -> dict[str, Any] | None:
    """``call`` with the pipeline's own guidance switched off; None where the user has set it."""
    taken = inspect.signature(pipe.__call__).parameters
    name = next((name for name in OFF if name in taken), None)
    return None if name is None or name in call else {**call, name: OFF[name]}


def _count(
    pipe: Any,
    request: ImageRequest,
    rule: Guidance | None,
    steps: int,
    weak: Any,
    call: dict[str, Any],
    batch_size: int,
    *,
    guided: bool,
) -> PointCost:
    extra = check_call(pipe, [request], guided=rule is not None, call=call)
    log = _Log()
    counted = None if rule is None else _Counted(log.watch(rule))
    weak_rows = [weak] if isinstance(weak, nn.Module) else []
    arguments = {**extra, **batch_inputs([request], extra)}
    with _rows([*find_denoisers(pipe, None), *weak_rows]) as rows:
        with nullcontext() if counted is None else steer(pipe, counted, weak=weak):
            pipe(**arguments, num_inference_steps=steps)
    seconds = log.seconds(batch_size)
    return PointCost(
        nfe=sum(rows) if counted is None else counted.nfe,
        rows=sum(rows),
        guided=guided,
        classifier_calls=log.calls,
        classifier_seconds=None if seconds is None else seconds * log.calls / steps,
        batch_size=batch_size,
    )


@contextmanager
def _rows(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    """The rows of every output of ``modules``, one entry a call."""
    rows: list[int] = []

    def count(_: Any, __: Any, output: Any) -> None:
        rows.append(first_tensor(output).shape[0])

    handles = [module.register_forward_hook(count) for module in modules]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


class _Counted:
    """A rule that counts the predictions it is given and asks for."""

    def __init__(self, rule: Guidance) -> None:
        self.rule, self.nfe = rule, 0
        self.commutes = bool(getattr(rule, "commutes", False))
        self.moves = bool(getattr(rule, "moves", False))

    def __call__(self, step: Step) -> Tensor:
        self.nfe += 1 if step.uncond is None else 2
        own = replace(
            step,
            evaluate=self._counting(step.evaluate),
            evaluate_weak=self._counting(step.evaluate_weak),
        )
        guided = self.rule(own)
        step.moved = own.moved
        return guided

    def _counting(self, function: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
        if function is None:
            return None

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            value = function(*args, **kwargs)
            self.nfe += 1
            return value

        return counted


class _Log:
    """What a rule's classifier is given."""

    def __init__(self) -> None:
        self.calls = 0
        self.classifier: Callable[[Tensor], Tensor] | None = None
        self.images: Tensor | None = None
        self.gradient = False

    def watch(self, rule: Any) -> Any:
        """The same rule, however nested, with its classifier watched."""
        if not is_dataclass(rule) or isinstance(rule, type):
            return rule
        changes: dict[str, Any] = {}
        for item in fields(rule):
            value = getattr(rule, item.name)
            if item.name == "classifier":
                changes["classifier"] = self._watched(value)
            elif item.name in ("rule", "outside") and value is not None:
                inner = self.watch(value)
                changes |= {} if inner is value else {item.name: inner}
        return replace(rule, **changes) if changes else rule

    def _watched(self, classifier: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        self.classifier = classifier

        def watched(images: Tensor) -> Tensor:
            self.calls += 1
            if self.images is None:
                self.images, self.gradient = images.detach(), images.requires_grad
            return classifier(images)

        return watched

    def seconds(self, batch_size: int, repeats: int = 3) -> float | None:
        """The fastest of a few calls on ``batch_size`` images, or None if it was never called."""
        if self.images is None or self.classifier is None:
            return None
        images = self.images[:1].expand(batch_size, *self.images.shape[1:]).clone()
        times = []
        for _ in range(repeats):
            _wait_for(images.device)
            start = time.perf_counter()
            with torch.set_grad_enabled(self.gradient):
                logits = self.classifier(images.requires_grad_(self.gradient))
                if self.gradient:
                    torch.autograd.grad(logits.sum(), images)
            _wait_for(images.device)
            times.append(time.perf_counter() - start)
        return min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
