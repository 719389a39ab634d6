"""What the scripts share: guidance options from the rules' own dataclasses, lists, user errors."""

from __future__ import annotations

import argparse
import json
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any

import _interrupt  # noqa: F401
import torch
from _device import add_device_option as add_device_option
from _device import add_dtype_option as add_dtype_option
from _device import device_name as device_name
from _run import new_parser as new_parser
from _run import run as run

from diffsteer.core import Guidance
from diffsteer.eval import load_classifier
from diffsteer.guidance import GuidanceInterval, ScaleSchedule, parse_scale, rules

Reader = Callable[[str], Any]


def rule_choices() -> dict[str, type]:
    """The guidance methods that a command line can build, by the name of their file."""
    ready = {name: rule for name, rule in rules().items() if _buildable(rule)}
    short = {name: rule.__module__.rpartition(".")[2] for name, rule in ready.items()}
    alone = [name for name in ready if list(short.values()).count(short[name]) == 1]
    return {(short[name] if name in alone else name): rule for name, rule in ready.items()}


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--guidance``, ``--base``, the intervals, and an option for each argument."""
    choices = rule_choices()
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--guidance", default="none", choices=["none", *choices], help="the method (default: none)"
    )
    group.add_argument(
        "--base", metavar="METHOD[:NAME=VALUE,...]",
        help="the method inside one that takes another: apg:scale=6,eta=0.5 (default: cfg)",
    )  # fmt: skip
    ends = {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
    group.add_argument("--interval", **ends, help="guide where LOW < sigma/alpha <= HIGH only")
    group.add_argument("--flow-interval", **ends, help="the same in flow sigmas, in [0, 1]")
    for name, owners in _options(choices).items():
        text = f"{_argument_help(choices[owners[0]], name)} [{_defaults(choices, owners, name)}]"
        group.add_argument(_flag(name), dest=f"rule_{name}", metavar="VALUE", help=text)


def build_rule(args: argparse.Namespace, **defaults: Any) -> Guidance | None:
    """The guidance method that the command line asks for, or None.

    Args:
        args: what a parser with ``add_rule_options`` gave.
        **defaults: values that take the place of the method's own defaults, where it has them.

    Raises:
        ValueError: if an option does not belong to the method or its value is no good.
    """
    given = {
        name.removeprefix("rule_"): text
        for name, text in vars(args).items()
        if name.startswith("rule_") and text is not None
    }
    others = [name for name in ("interval", "flow_interval", "base") if getattr(args, name)]
    if args.guidance == "none":
        if given or others:
            stray = _flag([*given, *others][0])
            raise ValueError(f"{stray} has no meaning without --guidance; choose a method")
        return None
    return make_rule(
        args.guidance, given, base=args.base, interval=args.interval,
        flow_interval=args.flow_interval, **defaults,
    )  # fmt: skip


def make_rule(
    method: str,
    options: dict[str, str],
    *,
    base: str | None = None,
    interval: Sequence[float] | None = None,
    flow_interval: Sequence[float] | None = None,
    **defaults: Any,
) -> Guidance:
    """A guidance method from texts.

    Args:
        method: one of ``rule_choices``.
        options: its arguments by name, as texts.
        base: the method inside, ``METHOD[:NAME=VALUE,...]``.
        interval: guide between these values of sigma / alpha only.
        flow_interval: the same in flow sigmas.
        **defaults: values that take the place of the method's own defaults, where it has them.

    Raises:
        ValueError: if an option does not belong to the method or its value is no good.
    """
    if interval and flow_interval:
        raise ValueError("--interval and --flow-interval say the same in two units; give one")
    rule = _make(method, options, base, defaults)
    if interval:
        return GuidanceInterval(rule, *interval)
    return GuidanceInterval.flow(rule, *flow_interval) if flow_interval else rule


def _make(method: str, given: dict[str, str], base: str | None, defaults: dict[str, Any]) -> Any:
    """Build a method from texts; what texts cannot say comes from ``base`` and the package."""
    cls = rule_choices()[method]
    names, readers = [item.name for item in fields(cls)], _readers(cls)
    stray = [name for name in given if name not in readers]
    if stray:
        raise ValueError(
            f"{_flag(stray[0])} is no option of --guidance {method}, whose options are "
            + ", ".join(map(_flag, readers))
        )
    parts = {name: value for name, value in defaults.items() if name in names}
    parts |= {name: _read(name, text, readers[name]) for name, text in given.items()}
    if base is not None and "rule" not in names:
        raise ValueError(f"--base has no meaning for --guidance {method}, which takes no method")
    if base is not None or "rule" in _required(cls):
        inner, _, text = (base or "cfg").partition(":")
        if inner not in rule_choices():
            raise ValueError(f"--base must be one of {', '.join(rule_choices())}, got {inner!r}")
        options = dict(item.partition("=")[::2] for item in text.split(",") if item)
        data = {name: value for name, value in defaults.items() if name == "latent_std"}
        parts["rule"] = _make(inner, options, None, data)  # the other numbers are the outer one's
    if "classifier" in _required(cls) and "classifier" not in parts:
        parts["classifier"] = load_classifier("guidance")
    return cls(**parts)


def integers(text: str, *, count: int | None = None) -> list[int]:
    """Integers from numbers and ranges, both ends included: ``0-9,20``, or ``100-`` and a count.

    Raises:
        ValueError: if the text is something else, or an open range has no count.
    """
    values: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(-(\d*))?", part)
        if not match:
            raise ValueError(f"expected numbers and ranges such as 0-9,20, got {text!r}")
        first, ranged, last = int(match[1]), match[2], match[3]
        if ranged and not last:
            if count is None:
                raise ValueError(f"the open range {part!r} needs to know how many: add --num")
            values += range(first, first + max(count - len(values), 0))
        else:
            if ranged and int(last) < first:
                raise ValueError(f"the range {part!r} ends before it begins")
            values += range(first, int(last) + 1) if ranged else [first]
    return values


def json_mapping(text: str) -> dict[str, Any]:
    """A JSON mapping; for ``type=`` of an argument.

    Raises:
        argparse.ArgumentTypeError: if the text is something else.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"expected a JSON mapping such as '{{\"height\": 512}}', got {text!r}"
        )
    return value


def default_device() -> str:
    """The accelerator if there is one (each rank's own under a launcher), else the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is None or "LOCAL_RANK" not in os.environ:
        return "cpu" if accelerator is None else accelerator.type
    return f"{accelerator.type}:{int(os.environ['LOCAL_RANK']) % torch.accelerator.device_count()}"


def dtype_for(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of that name; "auto" is float32 on the CPU, bfloat16 on an accelerator that has it.

    CUDA cards before Ampere emulate bfloat16, slowly: there it is float16.
    """
    if name == "auto":
        kind = torch.device(device).type
        if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return torch.float32 if kind == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _required(rule: type) -> list[str]:
    items = fields(rule)
    return [f.name for f in items if f.default is MISSING and f.default_factory is MISSING]


def _buildable(rule: type) -> bool:
    readers = _readers(rule)
    known = {*readers, "rule", "classifier"}
    return rule is not GuidanceInterval and bool(readers) and known.issuperset(_required(rule))


def options_of(rule: type) -> list[str]:
    """The arguments of a method that can be written on a command line."""
    return list(_readers(rule))


def _readers(rule: type) -> dict[str, Reader]:
    """How to read each argument that can be written on a command line."""
    hints = typing.get_type_hints(rule)
    readers = {item.name: _reader(hints[item.name]) for item in fields(rule)}
    return {name: reader for name, reader in readers.items() if reader is not None}


def _reader(hint: Any) -> Reader | None:
    if hint is bool:
        return {"true": True, "false": False}.__getitem__
    if hint in (int, float, str):
        return hint
    if typing.get_origin(hint) is typing.Literal:
        return {str(choice): choice for choice in typing.get_args(hint)}.__getitem__
    options = [option for option in typing.get_args(hint) if option is not NoneType]
    if ScaleSchedule in options:
        return parse_scale
    inner = _reader(options[0]) if len(options) == 1 else None
    if inner is None:
        return None
    return lambda text: None if text == "none" else inner(text)


def _read(name: str, text: str, reader: Reader) -> Any:
    try:
        return reader(text)
    except KeyError:
        known = ", ".join(getattr(reader, "__self__", {}))
        raise ValueError(f"{_flag(name)} must be one of {known}, got {text!r}") from None
    except ValueError as error:
        raise ValueError(f"{_flag(name)}: cannot read {text!r}: {error}") from None


def _options(choices: dict[str, type]) -> dict[str, list[str]]:
    """Each option and the methods that have it."""
    owners: dict[str, list[str]] = {}
    for method, rule in choices.items():
        for name in _readers(rule):
            owners.setdefault(name, []).append(method)
    return owners


def _defaults(choices: dict[str, type], owners: list[str], name: str) -> str:
    values = {m: next(f.default for f in fields(choices[m]) if f.name == name) for m in owners}
    words = {MISSING: "required", None: "none"}  # as they are written on a command line
    shown = (f"{m}: {words.get(v, v)}" for m, v in values.items())
    return ", ".join(shown)


def _argument_help(rule: type, name: str) -> str:
    """What the method's docstring says about an argument."""
    text = re.search(rf"^ +{name}: (.+?)(?=^ +\w+: |^\s*$)", rule.__doc__ or "", re.M | re.S)
    return " ".join(text[1].replace("``", "").replace("%", "%%").split()) if text else name
