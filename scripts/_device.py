"""The devices that ``--device`` may name on this machine; torch only, for a quick start."""

from __future__ import annotations

import argparse

import _interrupt  # noqa: F401
import torch


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``; None stands for the accelerator if there is one."""
    parser.add_argument(
        "--device", type=device_name,
        help="cpu, cuda, cuda:1, mps ... (default: the accelerator if there is one)",
    )  # fmt: skip


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``, which ``_cli.dtype_for`` reads."""
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 (float16 on CUDA cards without it), but float32 on the CPU",
    )  # fmt: skip


def device_name(text: str) -> str:
    """``text``, if torch can use such a device here; for ``type=`` of an argument.

    Raises:
        argparse.ArgumentTypeError: if it is no device, or this machine has none.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device; give cpu, cuda, cuda:1, mps ..."
        ) from None
    count = _count(device.type)
    if (device.index or 0) < count:
        return text
    # The driver is not asked for more than a count, because a process that made a context on
    # cuda:0 would keep it beside the device that accelerate gives it later.
    here = [kind for kind in ("cuda", "mps", "xpu", "hpu") if _count(kind)]
    found = ", ".join(["cpu", *(f"{kind}:0 to {kind}:{_count(kind) - 1}" for kind in here)])
    raise argparse.ArgumentTypeError(f"torch finds no {text} here, only {found}")


def _count(kind: str) -> int:
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    if module is None or not hasattr(module, "device_count"):
        return 0
    return int(module.device_count()) if module.is_available() else 0
