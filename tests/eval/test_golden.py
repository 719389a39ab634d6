"""The values that the peers' own programs print, and 40-digit truths, at their tolerances."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import golden_features
import pytest
import torch

from diffsteer.eval.adm_float16 import adm_squared_distances, prdc_adm_float16
from diffsteer.eval.cmmd import cmmd
from diffsteer.eval.frechet import frechet_distance_from_features, frechet_distance_of_moments
from diffsteer.eval.inception_score import inception_score
from diffsteer.eval.kernel import kernel_distance, kernel_distance_subsets
from diffsteer.eval.memorisation import authentic, realism
from diffsteer.eval.moments import Moments
from diffsteer.eval.prdc import prdc
from diffsteer.eval.vendi import vendi

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.fixture(scope="module")
def features():
    """Every golden feature set as tensors, its bytes verified."""
    made = {}
    for name, make in golden_features.SETS.items():
        arrays = make()
        digests = [hashlib.sha256(a.tobytes()).hexdigest() for a in arrays]
        assert digests == GOLDEN["sha256"][name]
        made[name] = [torch.from_numpy(a) for a in arrays]
    return made


@pytest.mark.parametrize(
    "name, tolerance",
    [("base", {"rel": 1e-10}), ("lowrank", {"rel": 1e-9}), ("offset", {"abs": 1e-12})],
)
@pytest.mark.parametrize("path", ["features", "moments"])
def test_frechet_distance_is_the_forty_digit_truth(features, name, tolerance, path):
    real, fake = features[name]
    if path == "features":
        value = frechet_distance_from_features(real, fake)
    else:
        value = frechet_distance_of_moments(Moments.of(real), Moments.of(fake))
    assert value == pytest.approx(float(GOLDEN["frechet_truth"][name]), **{"rel": 0, **tolerance})


@pytest.mark.parametrize("name", ["base", "offset"])
@pytest.mark.parametrize(
    "peer, single",
    [
        ("dgm_eval_fd(float64 reps)", False),
        ("dgm_eval_fd_eff(float64 reps)", False),
        ("edm_edm2(float64 sums)", False),
        ("torchmetrics_1.9(float64 in)", False),
        ("torch_fidelity_0.4(float32)", True),
        ("adm_evaluator(float32)", True),
        ("clean_fid(float32)", True),
    ],
)
def test_frechet_distance_of_the_peers(features, name, peer, single):
    """Programs that take means in float32 print our distance but for the rounded means."""
    real, fake = features[name]
    value = frechet_distance_of_moments(Moments.of(real), Moments.of(fake))
    if single:  # numpy's order of summation decides the rounding
        gap = Moments.of(real).mean - Moments.of(fake).mean
        rounded = real.numpy().mean(0) - fake.numpy().mean(0)
        value += float(rounded.dot(rounded)) - float(gap.dot(gap))
    assert value == pytest.approx(GOLDEN["frechet_peers"][name][peer], rel=1e-8 if single else 1e-9)


def test_moments(features):
    real = Moments.of(features["base"][0])
    golden = GOLDEN["stats_base_real"]
    assert float(real.mean[0]) == pytest.approx(golden["mu_0"], rel=1e-11)
    assert float(real.covariance[0, 0]) == pytest.approx(golden["sigma_00"], rel=1e-11)
    assert float(real.mean.sum()) == pytest.approx(golden["mu_sum"], rel=1e-11)
    assert float(real.covariance.trace()) == pytest.approx(golden["trace"], rel=1e-11)
    assert float(real.covariance[0, 1]) == pytest.approx(golden["sigma_01"], rel=1e-11)
    assert float(real.covariance.norm()) == pytest.approx(golden["fro"], rel=1e-11)


def test_kernel_distance_over_all_samples(features):
    real, fake = features["base"]
    golden = GOLDEN["kid"]
    value = kernel_distance(real, fake).value
    assert value == pytest.approx(golden["full_unbiased_mmd2_f64(no subsets)"]["mean"], rel=1e-10)
    itself = kernel_distance(real, real).value
    assert itself == pytest.approx(
        golden["full_unbiased_real_vs_real(should be <0, not 0)"]["mean"], rel=1e-9
    )


@pytest.mark.parametrize(
    "convention, seed, key",
    [
        ("torch-fidelity", 2020, "torch_fidelity(same, float64 features)"),
        ("clean-fid", 0, "dgm_eval(np.random.seed(0),100x1000,float64)"),
        ("torchmetrics", 0, "torchmetrics(manual_seed(0),100x1000,float64)"),
    ],
)
def test_kernel_distance_over_the_subsets_of_the_peers(features, convention, seed, key):
    real, fake = features["base"]
    found = kernel_distance_subsets(real, fake, seed=seed, convention=convention)
    assert found.value == pytest.approx(GOLDEN["kid"][key]["mean"], rel=1e-9)
    assert found.stderr == pytest.approx(GOLDEN["kid"][key]["std"], rel=1e-6)


@pytest.mark.parametrize("size", [500, 5000])
def test_kernel_distance_over_the_blocks_of_k_diffusion(features, size):
    key = "k_diffusion(max_size=500)" if size == 500 else "k_diffusion(max_size=5000, no RNG)"
    options = {"subset_size": size, "convention": "k-diffusion"}
    found = kernel_distance_subsets(*features["base"], **options)
    assert found.value == pytest.approx(GOLDEN["kid"][key]["mean"], rel=1e-9)


@pytest.mark.parametrize("name", ["base", "dups", "ones"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("chunk", [701, 2048])
def test_precision_and_recall_of_adm_in_float16(features, name, k, chunk):
    golden = GOLDEN["prdc"][name][f"adm_fp16_emulated(k={k}, <=, squared)"]
    found = prdc_adm_float16(*features[name], k, chunk=chunk)
    assert found.precision == pytest.approx(golden["precision"], rel=1e-11)
    assert found.recall == pytest.approx(golden["recall"], rel=1e-11)


@pytest.mark.parametrize("name", ["base", "dups", "ones"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("chunk", [37, 1024])
def test_precision_recall_density_coverage_to_the_last_count(features, name, k, strict, chunk):
    real, fake = features[name]
    found = prdc(real, fake, k, strict=strict, chunk=chunk)
    golden = GOLDEN["prdc"][name][f"exact_f64_direct(k={k},{'<' if strict else '<='})"]
    for score in ("precision", "recall", "density", "coverage"):
        assert getattr(found, score) == pytest.approx(golden[score], rel=1e-11), score


@pytest.mark.parametrize(
    "count, key, options",
    [
        (1000, "torch_fidelity(splits=10,shuffle=True,RandomState(2020),f64,ddof0)", {}),
        (1000, "dgm_eval(splits=10,shuffle=True,drops N%10,f64 probs)", {"remainder": "drop"}),
        (1000, "dgm_eval(splits=10,shuffle=False,drops N%10,f64 probs)", {"seed": None}),
        (1000, "torch_fidelity(splits=10,shuffle=False,RandomState(2020),f64,ddof0)",
         {"seed": None}),
        (1000, "single_split_f64", {"splits": 1}),
        (1003, "single_split_f64", {"splits": 1}),
        (1003, "torch_fidelity(splits=10,shuffle=True,RandomState(2020),f64,ddof0)", {}),
        (1003, "dgm_eval(splits=10,shuffle=True,drops N%10,f64 probs)", {"remainder": "drop"}),
        (1003, "torch_fidelity(splits=10,shuffle=False,RandomState(2020),f64,ddof0)",
         {"seed": None}),
        (1003, "dgm_eval(splits=10,shuffle=False,drops N%10,f64 probs)",
         {"seed": None, "remainder": "drop"}),
    ],
)  # fmt: skip
def test_inception_score(features, count, key, options):
    golden = GOLDEN["inception_score"][f"N={count}"][key]
    found = inception_score(features["logits"][0][:count], **options)
    assert found.value == pytest.approx(golden["mean"], rel=1e-10)
    assert found.stderr == pytest.approx(golden.get("std", 0.0), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("count", [1000, 1003])
@pytest.mark.parametrize(
    "key, size",
    [("adm(split_size=100)", 100), ("adm(split_size=5000 -> 1 split, no shuffle, f32)", 5000)],
)
def test_inception_score_of_adm_has_a_short_last_split(features, count, key, size):
    golden = GOLDEN["inception_score"][f"N={count}"][key]
    found = inception_score(features["logits"][0][:count], split_size=size, seed=None)
    assert found.value == pytest.approx(golden["mean"], rel=1e-6)  # ADM works in float32


@pytest.mark.parametrize("count", [1000, 1003])
def test_inception_score_of_torchmetrics_in_its_own_order(features, count):
    """Its ``randperm`` and ``chunk`` are our splits of fixed size; its spread has ddof 1."""
    golden = GOLDEN["inception_score"][f"N={count}"]["torchmetrics(manual_seed(0),float64)"]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    logits = features["logits"][0][:count][order]
    found = inception_score(logits, split_size=-(-count // 10), seed=None)
    assert found.value == pytest.approx(golden["mean"], rel=1e-10)
    assert found.stderr * (10 / 9) ** 0.5 == pytest.approx(golden["std"], rel=1e-8)


@pytest.mark.parametrize("name", ["base", "dups", "ones"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(
    "peer, strict",
    [
        ("prdc_dgm_eval(k={k}, strict <)", True),
        ("prdc_clova(k={k})", True),
        ("torch_fidelity_full(k={k}, <=, float32 cdist mm)", False),
        ("torch_fidelity_part(k={k}, <=, float64)", False),
        ("adm_fp32(k={k}, <=, squared)", False),
    ],
)
def test_neighbours_of_the_peers(features, name, k, peer, strict):
    found = prdc(*features[name], k, strict=strict)
    for score, golden in GOLDEN["prdc"][name][peer.format(k=k)].items():
        assert getattr(found, score) == pytest.approx(golden, rel=3e-8), score  # float32 prints


def test_vendi(features):
    fake = features["base"][1][:500].double()
    golden = GOLDEN["vendi_base_fake_first500"]
    for order, key in [(1, "q=1"), (2, "q=2"), (float("inf"), "q=inf")]:
        assert vendi(fake, order=order) == pytest.approx(
            golden[f"dgm_eval(linear,{key})"], rel=1e-9
        )
    whole = vendi(features["base"][0].double())
    assert whole == pytest.approx(golden["vendi_score.score_dual(q=1, 2000 real)"], rel=1e-9)


def test_cmmd(features):
    value = cmmd(*(rows.double() for rows in features["base"]))
    assert value == pytest.approx(GOLDEN["cmmd"]["cmmd_pytorch_f64"], rel=1e-8)


def test_realism_and_authenticity(features):
    real, fake = features["base"]
    scores, golden = realism(real, fake, 3), GOLDEN["realism_base_k3"]
    assert float(scores.mean()) == pytest.approx(golden["mean"], rel=1e-6)  # a float32 program
    assert scores[:5].tolist() == pytest.approx(golden["first5"], rel=1e-5)
    percent = 100 * float(authentic(real, fake).double().mean())
    assert percent == pytest.approx(GOLDEN["authpct_base"], abs=1e-9)


def test_adms_distances_fall_back_where_float16_overflows():
    u, v = torch.full((3, 10), 200.0), torch.zeros(2, 10)
    assert adm_squared_distances(u, v).tolist() == [[4e5, 4e5]] * 3
    near = adm_squared_distances(torch.tensor([[1.0, 0.001]]), torch.tensor([[0.0, 0.0]]))
    assert float(near) == 1.0  # where it fits it is rounded to float16
