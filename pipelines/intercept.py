"""Stand between a pipeline and its scheduler while steering."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

OnStep = Callable[[Callable[..., Any], "Arguments"], Any]


class Arguments:
    """The arguments of one ``scheduler.step``, by name, whichever way they were passed."""

    def __init__(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._names, self.args, self.kwargs = names, list(args), dict(kwargs)

    def __getitem__(self, name: str) -> Any:
        position = self._names.index(name) if name in self._names else len(self.args)
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        position = self._names.index(name)
        if position < len(self.args):
            self.args[position] = value
        else:
            self.kwargs[name] = value


class Interception:
    """Swap the scheduler's class for a subclass of the same name that reports its steps.

    A swapped class, unlike a wrapper stored on the instance, stays true under ``isinstance``,
    ``inspect.signature`` (pipelines look for ``eta`` and ``generator``), ``save_pretrained`` and
    ``copy.deepcopy``; a copy of the scheduler behaves like the original class.
    """

    def __init__(self, scheduler: Any, on_step: OnStep, on_begin: Callable[[], None]) -> None:
        self.scheduler, self._on_step, self._on_begin = scheduler, on_step, on_begin
        self._original: Any = None

    def attach(self) -> None:
        """Swap the class.

        Raises:
            RuntimeError: if the scheduler is being steered already, or its ``step`` was replaced by
                hand.
        """
        original = type(self.scheduler)
        if getattr(original, "_diffsteer", False):
            raise RuntimeError(
                f"{original.__name__} is being steered already. Leave the first `with "
                "steer(...)` block, or compose the rules into one (GuidanceInterval(rule, "
                "...)); pipelines made with from_pipe share their scheduler"
            )
        if "step" in vars(self.scheduler):
            raise RuntimeError(
                "scheduler.step was replaced on the instance, so steer would not see the steps; "
                "delete that attribute first (del pipe.scheduler.step)"
            )
        self._original = original
        self.scheduler.__class__ = self._subclass(original)

    def detach(self) -> None:
        """Give the scheduler its class back."""
        if self._original is not None:
            self.scheduler.__class__ = self._original
            self._original = None

    def _subclass(self, original: Any) -> type:
        target, names = self.scheduler, list(inspect.signature(original.step).parameters)[1:]

        @functools.wraps(original.step)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            real = functools.partial(original.step, scheduler)
            if scheduler is not target or self._original is None:
                return real(*args, **kwargs)
            return self._on_step(real, Arguments(names, args, kwargs))

        @functools.wraps(original.set_timesteps)
        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            result = original.set_timesteps(scheduler, *args, **kwargs)
            if scheduler is target and self._original is not None:
                self._on_begin()
            return result

        body = {
            "step": step,
            "set_timesteps": set_timesteps,
            "_diffsteer": True,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        return type(original.__name__, (original,), body)
