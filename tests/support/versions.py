"""Marks for what older diffusers cannot do yet; the oldest that the package allows is 0.36."""

from __future__ import annotations

import diffusers
import pytest
from packaging.version import Version


def needs_diffusers(version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test where the installed diffusers is older than ``version``."""
    return pytest.mark.skipif(Version(diffusers.__version__) < Version(version), reason=why)
