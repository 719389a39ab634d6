"""Refuse wrong arguments of ``steer`` with a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .observe import parameters_of, plain

_DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
_CASCADE = ("prior", "decoder")


def check_arguments(pipe: Any, rule: Any, weak: Any, order: Any, sign: Any) -> None:
    """Refuse what is no pipeline, rule, second model, order or sign.

    Raises:
        TypeError: for a wrong type.
        ValueError: for a value out of range.
    """
    scheduler = getattr(pipe, "scheduler", None)
    for name in ("step", "set_timesteps"):
        if isinstance(pipe, type) or not callable(getattr(type(scheduler), name, None)):
            raise TypeError(
                f"steer takes a diffusers pipeline, an object whose .scheduler has {name}(); got "
                f"{_describe(pipe)}. Load one first: pipe = DiffusionPipeline.from_pretrained(...) "
                "(a Modular pipeline also needs pipe.load_components())"
            )
    if isinstance(rule, str):
        raise TypeError(
            f"rule must be an object, got the string {rule!r}; write for example "
            "steer(pipe, ClassifierFreeGuidance(scale=5.0))"
        )
    if isinstance(rule, type) or not callable(rule):
        raise TypeError(
            "rule must be a guidance method such as ClassifierFreeGuidance(scale=5.0), got "
            f"{_describe(rule)}"
        )
    named = weak is None or isinstance(weak, (str, Path))
    if not named and (isinstance(weak, type) or not callable(weak) or hasattr(weak, "scheduler")):
        raise TypeError(
            "weak must be a module (such as weak_pipe.transformer), a function that is called "
            f"like the denoiser, or the folder of a model, got {_describe(weak)}"
        )
    if order not in (None, "uc", "cu"):
        raise ValueError(
            "order must be 'uc' (unconditional prediction first), 'cu' (conditional first) or "
            f"None, got {order!r}"
        )
    if sign not in (None, 1, -1):
        raise ValueError(f"sign must be 1, -1 or None, got {sign!r}")


def find_denoisers(pipe: Any, denoiser: Any) -> list[nn.Module]:
    """The modules that predict: the ones given, or those with a usual name.

    Raises:
        TypeError: if there are none, or ``denoiser`` is no module.
    """
    if denoiser is not None:
        given = list(denoiser) if isinstance(denoiser, Sequence) else [denoiser]
        for module in given:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    "denoiser must be a module, or a list of modules, got "
                    f"{_describe(module)}; write for example steer(pipe, rule, "
                    "denoiser=pipe.transformer)"
                )
        return given
    for names in (_DENOISERS, _CASCADE):
        found = [getattr(pipe, name, None) for name in names]
        modules = [module for module in found if isinstance(module, nn.Module)]
        if modules:
            return modules
    raise TypeError(
        f"{_describe(pipe)} has none of {', '.join(_DENOISERS + _CASCADE)}; name the module "
        "that predicts: steer(pipe, rule, denoiser=module)"
    )


def check_negative(negative: Any, modules: list[nn.Module]) -> None:
    """Refuse negative inputs that the denoiser has no argument for.

    Raises:
        TypeError: if ``negative`` is no mapping, or names an unknown argument.
    """
    if negative is None:
        return
    if isinstance(negative, Tensor) or not isinstance(negative, Mapping) or not negative:
        raise TypeError(
            "negative must be a dictionary of denoiser arguments, e.g. "
            f"{{'encoder_hidden_states': tensor}}, got {_describe(negative)}"
        )
    names = parameters_of(modules[0])
    unknown = sorted(set(negative) - set(names))
    if unknown:
        raise TypeError(
            f"negative: {type(plain(modules[0])).__name__} has no argument "
            f"{', '.join(unknown)}; it takes {', '.join(names)}"
        )


def _describe(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
