"""What every test runs under: one seed, offline, warnings as errors, no GPU unless there is one."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

MAKE_BELIEVE = bool(os.environ.get("DIFFSTEER_FAKE_CUDA"))

# The same examples in every run: a suite that is green stays green until the code changes.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where CUDA is missing, unless it is to be made believe."""
    if torch.cuda.is_available() or MAKE_BELIEVE:
        return
    skip = pytest.mark.skip(reason="needs CUDA")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """``DIFFSTEER_FAKE_CUDA=1 pytest -m gpu``: on a device that is none, see ``fake_cuda``."""
    if not MAKE_BELIEVE or "gpu" not in item.keywords or torch.cuda.is_available():
        return (yield)
    from fake_cuda import FakeCuda

    with FakeCuda(waits=True, doubles=True):
        return (yield)


@pytest.fixture
def small_disk():
    """``with small_disk(n)``: every write beyond ``n`` bytes of a file fails, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
