"""What a reward is: a callable of images, prompts and metadata, in any of the usual spellings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Metadata", "Reward", "RewardError", "as_reward", "scores_tensor"]

Metadata = Mapping[str, Any]
Scores = Sequence[float | None] | Tensor
KNOWN = ("images", "completions", "prompts", "metadata")


class Reward(Protocol):
    """Scores a batch of images; higher is better.

    Images are (B, 3, H, W), floats in [0, 1]; one prompt and one mapping of metadata an image. One
    score an image comes back, as a sequence or a tensor of shape (B,); None where the reward does
    not apply to an image.
    """

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], /
    ) -> Scores:
        """One score an image."""
        ...


class RewardError(ValueError):
    """A reward that cannot be used; the message names it and says what to do."""


def as_reward(function: Callable[..., Any]) -> Reward:
    """A reward from any callable that scores images.

    Understood are, by the names of the parameters:

    - ``f(images, prompts, metadata)``, also under other names if there are exactly three;
    - ``f(images)``, also under another name if there is exactly one;
    - keyword callables as in TRL, ``f(prompts, images, answer, **kwargs)`` or with ``completions``
      for the images: every other parameter is a column of the metadata (a list with one entry an
      image, None where an image has none), and ``**kwargs`` takes all columns.

    A result ``(scores, info)``, as DDPO and Flow-GRPO rewards give it, loses its info.

    Args:
        function: the callable; a reward of this package comes back as it is.

    Returns:
        A reward.

    Raises:
        TypeError: ``function`` cannot be called, or is a class.
    """
    if isinstance(function, type) or not callable(function):
        what = (
            f"the class {function.__name__}; make an instance of it"
            if isinstance(function, type)
            else f"a {type(function).__name__}"
        )
        raise TypeError(f"a reward must be a callable f(images, prompts, metadata), got {what}")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in functions without a signature
        return function
    kinds = inspect.Parameter
    named = {
        name: p for name, p in parameters.items()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }  # fmt: skip
    needed = [p for p in parameters.values() if p.default is kinds.empty and p.kind < 2]
    if list(parameters)[:3] == ["images", "prompts", "metadata"] and len(needed) <= 3:
        return function
    if not set(named) & set(KNOWN) and len(needed) in (1, 3):
        return function if len(needed) == 3 else _OfImages(function)
    takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    required = tuple(name for name, p in named.items() if p.default is kinds.empty)
    return _ByKeyword(function, tuple(named), required, takes_all)


class _OfImages:
    """A callable of the images alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], /
    ) -> Scores:
        return self.function(images)


class _ByKeyword:
    """A callable that takes prompts, images and columns of the metadata by name."""

    def __init__(
        self,
        function: Callable[..., Any],
        names: tuple[str, ...],
        required: tuple[str, ...],
        takes_all: bool,
    ) -> None:
        self.function, self.names = function, names
        self.required, self.takes_all = required, takes_all

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], /
    ) -> Scores:
        columns = sorted({name for item in metadata for name in item})
        values: dict[str, Any] = {
            name: [item.get(name) for item in metadata] for name in columns if name not in KNOWN
        }
        values |= {"images": images, "completions": images, "prompts": list(prompts)}
        values["metadata"] = list(metadata)
        missing = [name for name in self.required if name not in values]
        if missing:
            raise TypeError(
                f"the reward asks for {missing[0]!r}, which is no column of the metadata "
                f"({', '.join(columns) or 'there are none'})"
            )
        given = (*self.names, *values) if self.takes_all else self.names
        spared = () if "completions" in self.names else ("completions",)  # once is enough
        return self.function(
            **{name: values[name] for name in given if name in values and name not in spared}
        )


def scores_tensor(result: Any, count: int, name: str) -> tuple[Tensor, Tensor]:
    """What a reward gave, as numbers.

    Args:
        result: a sequence of numbers and None, a tensor, an array, or one of these and a mapping.
        count: how many images were scored, B.
        name: of the reward, for errors.

    Returns:
        Scores (B,), float32 on the CPU, NaN where there is none; and whether the reward failed
        there, (B,) bool: a score that is no finite number is a failure, None is not.

    Raises:
        RewardError: the number of scores is not B, or they are no numbers.
    """
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result = result[0]
    try:
        if not isinstance(result, Tensor):
            result = result.tolist() if hasattr(result, "tolist") else list(result)
            absent = torch.tensor([value is None for value in result], dtype=torch.bool)
            result = torch.tensor(
                [float("nan") if value is None else float(value) for value in result]
            )
        else:
            absent = torch.zeros(result.shape, dtype=torch.bool)
        values = result.detach().to("cpu", torch.float32)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward {name!r} must give one number or None an image, got "
            f"{type(result).__name__}: {error}"
        ) from error
    if tuple(values.shape) != (count,):
        raise RewardError(
            f"reward {name!r} must give one score an image, {count} in all, got shape "
            f"{tuple(values.shape)}"
        )
    failed = ~values.isfinite() & ~absent
    return values.masked_fill(failed | absent, float("nan")), failed
