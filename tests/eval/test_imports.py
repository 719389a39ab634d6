"""The numeric core works where torchvision or torchmetrics are broken or absent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BROKEN:
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Broken())
import torch
from diffsteer.eval import EvalSuite, frechet_distance_from_features, prdc
from diffsteer.eval.scores import METRICS
x = torch.randn(9, 3)
assert frechet_distance_from_features(x, x) < 1e-9
assert prdc(x, x).precision == 1
heavy = {"diffusers", "transformers", "datasets", "accelerate", "scipy", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


@pytest.mark.parametrize("broken", [("torchvision", "torchmetrics", "torch_fidelity", "pyarrow")])
def test_evaluation_imports_with_broken_neighbours(broken):
    program = f"BROKEN = {broken!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
