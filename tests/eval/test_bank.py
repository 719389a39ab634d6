"""A suite in bounded memory: the same rows whatever the order, moments of all samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eval_samples import tensors, tiny_extractor
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsteer.eval import EvalSuite, Moments, frechet_distance_from_features, prdc
from diffsteer.eval import bank as bank_module
from diffsteer.eval.bank import FeatureBank
from diffsteer.eval.features import extract

METRICS = ("fd", "kid", "pr", "dc", "is", "accuracy", "colour", "diversity", "vendi")


@pytest.fixture(scope="module")
def features():
    """60 real and 60 generated samples of a tiny network."""
    net = tiny_extractor()
    labels = torch.arange(60) % 4
    return [extract(tensors(60, seed), [net], labels=labels) for seed in (1, 2)]


def parts_of(features, order, sizes):
    cuts = [min(c, len(order)) for c in torch.tensor([0, *sizes]).cumsum(0).tolist()]
    return [features.rows(order[a:b]) for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def suite_of(real, fake, **options):
    suite = EvalSuite(METRICS, extractors=tiny_extractor(), **options)
    for parts, is_real in ((real, True), (fake, False)):
        for part in parts:
            suite.add(part, real=is_real)
    return suite


@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 25), max_size=6))
def test_any_split_and_order_gives_the_same_digits(features, random, sizes):
    order = torch.tensor(random.sample(range(60), 60))
    expected = suite_of([features[0]], [features[1]]).compute()
    split = [parts_of(side, order, sizes) for side in features]
    found = suite_of(*split).compute()
    assert found.values == expected.values and found.stderr == expected.stderr


@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 25), max_size=6))
def test_bounded_memory_keeps_the_same_rows_for_any_split_and_order(features, random, sizes):
    order = torch.tensor(random.sample(range(60), 60))
    expected = suite_of([features[0]], [features[1]], max_rows=30).compute()
    split = [parts_of(side, order, sizes) for side in features]
    found = suite_of(*split, max_rows=30).compute()
    assert found.values.keys() == expected.values.keys()
    for name, value in found.values.items():
        if name.startswith("fd"):  # sums over batches round by their order
            assert value == pytest.approx(expected.values[name], rel=1e-12)
        else:
            assert value == expected.values[name], name
    whole = suite_of([features[0]], [features[1]]).compute().values
    for name in ("fd-tiny", "accuracy", "saturation", "is-tiny"):  # every sample counts in these
        assert found.values[name] == pytest.approx(whole[name], rel=1e-9)
    assert found.scores["fd-tiny"].count == 60 and found.scores["recall"].count == 30


def test_the_kept_rows_are_the_first_in_the_order_of_content(features, monkeypatch):
    monkeypatch.setattr(bank_module, "_SETTLE", 8)
    bank = FeatureBank(20)
    for part in features[1].canonical().rows(torch.arange(60).flip(0)).keys.split(7):
        bank.add(features[1].rows(torch.isin(features[1].keys, part)))
    first = features[1].canonical().rows(torch.arange(20))
    assert torch.equal(bank.rows().keys, first.keys)
    assert torch.equal(bank.rows().taps["tiny/features"], first.taps["tiny/features"])
    assert len(bank.samples()) == 60 and "tiny/features" not in bank.samples().taps
    found = suite_of([features[0]], [features[1]], max_rows=20).compute().values
    x, y = (side.canonical().taps["tiny/features"] for side in features)
    assert found["recall"] == prdc(x[:20], y[:20], 3).recall
    assert found["fd-tiny"] == pytest.approx(frechet_distance_from_features(x, y), rel=1e-9)


def test_half_precision_rows_cost_no_precision_of_moments(features):
    halved = suite_of([features[0]], [features[1]], row_dtype=torch.float16)
    assert halved.seen().taps["tiny/features"].dtype == torch.float16
    found, full = halved.compute().values, suite_of([features[0]], [features[1]]).compute().values
    assert found["fd-tiny"] == pytest.approx(full["fd-tiny"], rel=1e-9)
    assert found["kid-tiny"] == pytest.approx(full["kid-tiny"], rel=1e-2)
    assert found["kid-tiny"] != full["kid-tiny"]


def test_merge_sync_and_reset(features):
    expected = suite_of([features[0]], [features[1]], max_rows=30).compute().values
    first = suite_of([features[0].rows(torch.arange(25))], [features[1]], max_rows=30)
    second = suite_of([features[0].rows(torch.arange(25, 60))], [], max_rows=30)
    first.sync()  # without a process group: nothing happens
    first.merge_state(second)
    found = first.compute().values
    assert {n: v for n, v in found.items() if n != "fd-tiny"} == {
        n: v for n, v in expected.items() if n != "fd-tiny"
    }
    assert found["fd-tiny"] == pytest.approx(expected["fd-tiny"], rel=1e-12)
    first.reset(keep_reference=True)
    first.add(features[1])
    assert first.compute().values["recall"] == expected["recall"]
    full = suite_of([features[0]], [features[1]])
    with pytest.raises(ValueError, match="keeps every row"):
        full.merge_state(second)
    second.merge_state(full)  # the other way round there is nothing missing
    assert second.compute().meta["n_real"] == 95


def test_what_a_sum_cannot_do_is_said(features):
    bank = FeatureBank(30)
    images = tensors(9, 3)
    for _ in range(2):
        bank.add(extract(images, [tiny_extractor()], index=torch.arange(9)))
    with pytest.raises(ValueError, match=r"9 samples were repeated.*even_batches=False"):
        bank.samples()
    loud = features[0].rows(torch.arange(4))
    loud.taps["tiny/features"] = loud.taps["tiny/features"] * 1e6
    narrow = FeatureBank(dtype=torch.float16)
    narrow.add(loud)
    with pytest.raises(ValueError, match="float16"):
        narrow.rows()
    with pytest.raises(ValueError, match="max_rows"):
        FeatureBank(0)
    with pytest.raises(ValueError, match="bfloat16"):
        FeatureBank(dtype=torch.bfloat16)


def test_moments_travel_as_one_row():
    x = torch.randn(9, 5)
    found, sums = Moments.unpacked(Moments.of(x).packed()), Moments.of(x)
    assert found.count == 9 and torch.equal(found.scatter, sums.scatter)
    assert torch.equal(found.mean, sums.mean)


def test_sums_of_later_samples_are_added_to_those_of_earlier_ones(features, monkeypatch):
    monkeypatch.setattr(bank_module, "_SETTLE", 10)
    bank = FeatureBank(max_rows=20)
    for part in parts_of(features[1], torch.arange(60), [13, 13, 13, 13]):
        bank.add(part)
    (sums,) = bank.moments().values()
    whole = Moments.of(features[1].taps["tiny/features"])
    assert sums.count == 60
    torch.testing.assert_close(sums.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.scatter, whole.scatter, rtol=1e-12, atol=1e-12)


def test_copies_of_an_image_with_other_labels_have_an_order_of_their_own(features):
    copies = features[0].rows(torch.zeros(6, dtype=torch.int64))
    for column in ("labels", "prompts"):
        marked = replace(copies, **{column: torch.tensor([3, 0, 5, 1, 4, 2])})
        assert getattr(marked.canonical(), column).tolist() == [0, 1, 2, 3, 4, 5]
