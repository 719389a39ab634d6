"""Grids of guidance methods: from repeated options of a command line, or from a JSON or YAML file.

A group is a method and, for each of its options, the values to try; its points are all of their
combinations. The options are those of the methods' own dataclasses, as in generate.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import _cli

from diffsteer.pipelines import SweepPoint

Group = dict[str, list[str]]  # "rule" has one text; every other entry is an axis
INTERVALS = ("interval", "flow_interval")
OUTSIDE = ("base", *INTERVALS, "steps")  # not arguments of a method


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--rule``, what belongs to it, and ``--grid``."""
    choices = _cli.rule_choices()
    group = parser.add_argument_group("grid", "options after a --rule belong to it; all values "
                                      "are combined; give as many --rule as you like")  # fmt: skip
    parser.set_defaults(groups=[], everywhere={})
    group.add_argument(
        "--rule", action=_Begin, choices=["none", *choices], help="begin a group: the method"
    )
    group.add_argument("--grid", type=Path, help="a JSON or YAML file with further groups")
    add = group.add_argument
    add("--steps", nargs="+", action=_Axis, help="solver steps; before any --rule, of all (20)")
    add("--base", nargs="+", action=_Axis, metavar="METHOD[:NAME=VALUE,...]",
        help="the method inside one that takes another: apg:scale=6,eta=0.5")  # fmt: skip
    ends = {"nargs": "+", "action": _Axis, "metavar": "LOW:HIGH"}
    add("--interval", **ends, help="guide where LOW < sigma/alpha <= HIGH only, or none")
    add("--flow-interval", **ends, help="the same in flow sigmas, in [0, 1]")
    names = dict.fromkeys(name for rule in choices.values() for name in _cli.options_of(rule))
    for name in names:
        owners = [method for method, rule in choices.items() if name in _cli.options_of(rule)]
        add(_flag(name), nargs="+", action=_Axis, metavar="VALUE", help="of " + ", ".join(owners))


def groups_of(args: argparse.Namespace) -> list[Group]:
    """The groups of the command line, then those of the file.

    Raises:
        ValueError: if there is none, or the file is no such list.
        OSError: if the file cannot be read.
    """
    groups = [*args.groups, *(read_grid(args.grid) if args.grid else [])]
    if not groups:
        raise ValueError("nothing to sweep: give --rule (none, cfg, apg ...) or --grid FILE")
    return [{**args.everywhere, **group} for group in groups]


def read_grid(path: Path) -> list[Group]:
    """The groups of a file: a list of ``{"rule": "apg", "scale": [2, 4], "eta": 0.5}``.

    Raises:
        ValueError: if it is something else.
        OSError: if it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise ValueError(f"--grid {path}: {error}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"--grid {path} must hold a list of groups, each with a rule")
    return [_group(entry, path) for entry in content]


def points_of(groups: Sequence[Group], **defaults: Any) -> list[SweepPoint]:
    """All points of the groups, in order; a rule that cannot be built is named.

    Args:
        groups: from ``groups_of``.
        **defaults: values that take the place of a method's own defaults, where it has them.

    Raises:
        ValueError: if an option does not belong to its method, or a value is no good.
    """
    points = []
    for group in groups:
        axes = {name: texts for name, texts in group.items() if name != "rule"}
        for values in product(*axes.values()):
            points.append(_point(group["rule"][0], dict(zip(axes, values, strict=True)), defaults))
    return points


def _point(method: str, chosen: dict[str, str], defaults: dict[str, Any]) -> SweepPoint:
    last = {key: chosen[key] for key in ("steps",) if key in chosen}
    shown = {**{key: text for key, text in chosen.items() if key != "steps"}, **last}
    name = _join([method, *(f"{key}={text}" for key, text in shown.items())])
    options = {key: text for key, text in chosen.items() if key not in OUTSIDE}
    if method == "none":
        extra = [key for key in chosen if key != "steps"]
        if extra:
            raise ValueError(f"{name}: --rule none takes no {_flag(extra[0])}")
        return SweepPoint(name, None, _steps(chosen))
    try:
        ends = {key: _ends(chosen[key]) for key in INTERVALS if key in chosen}
        rule = _cli.make_rule(method, options, base=chosen.get("base"), **ends, **defaults)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    same = {key: text for key, text in chosen.items() if key not in ("scale", "steps")}
    if "base" in same:
        same["base"] = re.sub(r"(?<=[:,])scale=[^,]*,?", "", same["base"]).rstrip(":,")
    family = _join([method, *(f"{key}={text}" for key, text in same.items())])
    return SweepPoint(name, rule, _steps(chosen), family, _scale(rule))


def _steps(chosen: dict[str, str]) -> int:
    text = chosen.get("steps", "20")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--steps must be whole numbers of at least 1, got {text!r}")
    return int(text)


def _ends(text: str) -> tuple[float, float] | None:
    if text == "none":
        return None
    low, colon, high = text.partition(":")
    try:
        if colon:
            return float(low), float(high)
    except ValueError:
        pass
    raise ValueError(f"an interval looks like LOW:HIGH, got {text!r}")


def _scale(rule: Any) -> float | None:
    """The number that says how strongly a rule, or the one inside it, guides."""
    while rule is not None:
        scale = getattr(rule, "scale", None)
        if isinstance(scale, int | float):
            return float(scale)
        rule = getattr(rule, "rule", None)
    return None


def _join(parts: Sequence[str]) -> str:
    return "-".join(re.sub(r"[^\w.=-]+", "_", part) for part in parts)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("reading YAML needs pyyaml (pip install pyyaml); or use JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _group(entry: Any, path: Path) -> Group:
    known = ["none", *_cli.rule_choices()]
    if not isinstance(entry, dict) or entry.get("rule") not in known:
        raise ValueError(
            f"--grid {path}: each group is a mapping with a rule ({', '.join(known)}), got {entry}"
        )
    group: Group = {"rule": [entry["rule"]]}
    for key, value in entry.items():
        if key != "rule":
            name = str(key).replace("-", "_")
            group[name] = _texts(value, name in INTERVALS)
    return group


def _texts(value: Any, pairs: bool) -> list[str]:
    """The values of an axis as a command line would have them."""
    if pairs and _is_pair(value):
        value = [value]
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("an option of a grid needs at least one value")
    return [":".join(map(str, v)) if pairs and _is_pair(v) else _text(v) for v in values]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and not isinstance(value[0], list | str)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Begin(argparse.Action):
    """A new group."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.groups = [*namespace.groups, {"rule": [values]}]


class _Axis(argparse.Action):
    """Values for the latest group; steps and intervals before the first group are for all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if namespace.groups:
            *earlier, last = namespace.groups
            namespace.groups = [*earlier, {**last, self.dest: values}]
        elif self.dest == "steps":
            namespace.everywhere = {**namespace.everywhere, self.dest: values}
        else:
            raise ValueError(f"{option} belongs to a method; put it after its --rule")
