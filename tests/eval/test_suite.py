"""One pass, all metrics; and what no peer has: order, batches and names change no digit."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from eval_samples import TinyNet, tensors, tiny_extractor

from diffsteer.eval import (
    EvalSuite,
    Extractor,
    Moments,
    Settings,
    Statistics,
    cifar_extractor,
    frechet_distance_from_features,
    kernel_distance,
    prdc,
)
from diffsteer.eval.report import read_result, table
from diffsteer.eval.scores import METRICS

EVERYTHING = tuple(name for name in METRICS if name != "sfid")


def suite_of(extractor, metrics=EVERYTHING, **options):
    return EvalSuite(metrics, extractors=extractor, **options)


def fed(extractor, fake, real=None, labels=None, batch=16, **options):
    suite = suite_of(extractor, **options)
    if real is not None:
        for part in real.split(batch):
            suite.update(part, real=True)
    for start in range(0, len(fake), batch):
        part = slice(start, start + batch)
        suite.update(fake[part], labels=None if labels is None else labels[part])
    return suite


def test_the_name_of_one_metric_is_a_metric_and_not_its_letters():
    assert suite_of(tiny_extractor(), "fd").metrics == ("fd",)
    with pytest.raises(ValueError, match=r"got \['fdd'\]"):
        suite_of(tiny_extractor(), "fdd")


@pytest.fixture
def pair():
    return tensors(60, 1), tensors(60, 2)


def test_values_are_those_of_the_functions(extractor, pair):
    real, fake = pair
    result = fed(extractor, fake, real, torch.arange(60) % 4).compute()
    x, y = extractor(real).features, extractor(fake).features
    assert result.values["fd-tiny"] == pytest.approx(frechet_distance_from_features(x, y), rel=1e-9)
    assert result.values["kid-tiny"] == pytest.approx(kernel_distance(x, y).value, rel=1e-9)
    assert result.values["recall"] == prdc(x, y, 3).recall
    top1 = (extractor(fake).logits.argmax(1) == torch.arange(60) % 4).double().mean()
    assert result.values["accuracy"] == pytest.approx(float(top1))
    assert not result.skipped and len(result.scores) == 19
    assert result.scores["fd-tiny"].label == "fd-tiny@60"


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_order_and_batches_change_no_digit(extractor, pair, batch):
    real, fake = pair
    labels = torch.arange(60) % 4
    expected = fed(extractor, fake, real, labels).compute()
    order = torch.randperm(60)
    found = fed(extractor, fake[order], real[order.flip(0)], labels[order], batch=batch).compute()
    assert found.values == expected.values
    assert found.stderr == expected.stderr


def test_merging_and_empty_batches_change_no_digit(extractor, pair):
    real, fake = pair
    expected = fed(extractor, fake, real).compute()
    first, second = fed(extractor, fake[:13], real), fed(extractor, fake[13:])
    first.update(fake[:0])
    first.merge_state(second)
    assert first.compute().values == expected.values
    with pytest.raises(ValueError, match="extractors"):
        first.merge_state(suite_of(tiny_extractor(seed=2)))


def test_repeats_of_an_index_count_once(extractor, pair):
    real, fake = pair
    expected = fed(extractor, fake, real).compute()
    suite = fed(extractor, fake[:0], real)
    suite.update(fake, index=range(60))
    suite.update(fake[:9], index=range(9))  # what a loader does to fill the last batch
    assert suite.compute().values == expected.values


def test_reset_keeps_the_reference_for_training(extractor, pair):
    real, fake = pair
    suite = fed(extractor, tensors(60, 5), real)
    before = suite.compute()
    suite.reset(keep_reference=True)
    suite.update(fake)
    assert suite.compute().values == fed(extractor, fake, real).compute().values != before.values
    suite.reset()
    suite.update(fake)
    assert "fd" in suite.compute().skipped


def test_the_reference_is_summed_and_factored_once(extractor, pair, monkeypatch):
    from diffsteer.eval import frechet

    factored = []
    plain = frechet.covariance_factor
    monkeypatch.setattr(frechet, "covariance_factor", lambda c: factored.append(1) or plain(c))
    suite = fed(extractor, tensors(60, 5), pair[0], metrics=("fd",))
    for seed in (6, 7, 8):
        suite.compute()
        suite.reset(keep_reference=True)
        suite.update(tensors(60, seed))
        suite.sync()
    assert len(factored) == 1
    found = suite.compute()
    suite.update(tensors(5, 9), real=True)  # another reference: computed again
    assert suite.compute().values != found.values and len(factored) == 2


def test_real_images_take_the_place_of_the_embedded_statistics_also_later():
    images = tensors(40, 1, (32, 32)), tensors(40, 2, (32, 32))
    suite = EvalSuite(("fd",))
    suite.update(images[0])
    before = suite.compute()
    suite.update(images[1], real=True)
    found = suite.compute()
    expected = fed(cifar_extractor(), *images, metrics=("fd",)).compute()
    assert found.values == expected.values != before.values
    assert found.meta["reference"] == "images"


def test_mixed_sizes_are_resized_one_by_one(extractor):
    small, large = tensors(9, 1), tensors(9, 2, (20, 24))
    suite = suite_of(extractor, ("fd", "colour"))
    suite.update([*small, *large], real=True)
    suite.update([*large, *small])
    assert suite.compute().values["fd-tiny"] == pytest.approx(0, abs=1e-9)


def test_floats_and_bytes_are_the_same_images(extractor, pair):
    real, fake = pair
    suite = fed(extractor, fake.float() / 255, real)
    assert suite.compute().values == fed(extractor, fake, real).compute().values


def test_moments_alone_leave_out_what_needs_rows(extractor, pair):
    real, fake = pair
    rows = extractor(real).features
    known = Statistics.of_moments(Moments.of(rows), extractor=extractor.id)
    result = fed(extractor, fake, reference=known, metrics=("fd", "kid", "pr", "colour")).compute()
    assert set(result.skipped) == {"kid", "pr"} and "--features" in result.skipped["kid"]
    expected = frechet_distance_from_features(rows, extractor(fake).features)
    assert result.values["fd-tiny"] == pytest.approx(expected, rel=1e-9)
    assert "accuracy" not in result.values


def test_two_extractors_in_one_pass_keep_their_names_apart(pair):
    real, fake = pair
    first, second = tiny_extractor(), tiny_extractor(seed=2, space="other", class_names=())
    labels = torch.arange(60) % 4
    result = fed([first, second], fake, real, labels).compute()
    assert {"fd-tiny", "fd-other", "precision", "precision-other"} <= set(result.values)
    alone = fed(second, fake, real).compute()
    assert result.values["fd-other"] == alone.values["fd-other"]
    assert "no classifier" in result.skipped["accuracy-other"]


@pytest.mark.parametrize(
    "count, words",
    [(6, "rank-deficient"), (40, "generated against"), (60, "exact copies of real")],
)
def test_suspicious_counts_and_copies_are_said(extractor, count, words):
    real = tensors(60, 1)
    suite = fed(extractor, tensors(count, 1 if count == 60 else 2), real)
    assert any(words in warning for warning in suite.compute().warnings)


def test_bytes_that_were_floats_are_said(extractor):
    suite = suite_of(extractor, ("colour",))
    suite.update((torch.rand(20, 3, 16, 16)).to(torch.uint8))
    suite.update(torch.ones(4, 3, 16, 16, dtype=torch.uint8))
    assert any("cast to uint8" in warning for warning in suite.compute().warnings)


def test_collapse_and_imbalance_are_said(extractor, pair):
    real, fake = pair
    fake = torch.cat([fake[:50], fake[:10]])
    warnings = fed(extractor, fake, real, torch.zeros(60).long()).compute().warnings
    assert any("10 of 60" in w for w in warnings)
    labels = torch.tensor([0] * 50 + [1] * 10)
    assert any("class shares" in w for w in fed(extractor, fake, real, labels).compute().warnings)
    fair = fed(extractor, pair[1], real, torch.arange(60) % 4).compute().warnings
    assert not any("class shares" in w for w in fair)


@pytest.mark.parametrize("alike", [True, False])
def test_class_shares_are_compared_with_those_of_the_reference(extractor, pair, alike):
    skewed, even = torch.tensor([0] * 50 + [1] * 10), torch.arange(60) % 2
    suite = suite_of(extractor, metrics=("colour",))
    suite.update(pair[0], labels=skewed, real=True)
    suite.update(pair[1], labels=skewed if alike else even)
    found = [w for w in suite.compute().warnings if "class shares" in w]
    assert found == [] if alike else "differ from those of the reference" in found[0]


def test_protocols_with_a_sample_count_warn_below_it(extractor, pair):
    real, fake = pair
    result = fed(extractor, fake, real, settings="adm").compute()
    assert any("60 samples, where the adm protocol has 50000" in w for w in result.warnings)
    assert result.meta["settings"]["protocol"] == "adm"


def test_fewer_samples_than_neighbours_is_said_and_the_rest_goes_on(extractor):
    result = fed(extractor, tensors(3, 2), tensors(3, 1)).compute()
    assert "k = 3" in result.skipped["pr"] and "3 real and 3 generated" in result.skipped["pr"]
    assert "colour" not in result.skipped and "fd-tiny" in result.values


def test_not_a_number_names_the_extractor(pair):
    network = TinyNet()
    network.conv.weight.data[0, 0, 0, 0] = math.nan
    broken = Extractor(network, space="tiny", side=16, name="brokennet")
    with pytest.raises(ValueError, match="brokennet gives NaN"):
        fed(broken, pair[1])


def test_overflow_in_half_precision_is_computed_again_in_float32(pair):
    class Loud(TinyNet):
        def forward(self, images):
            return super().forward(images).features * 3e5

    half = Extractor(Loud(), space="loud", side=16, dtype=torch.float16)
    full = Extractor(Loud(), space="loud", side=16)
    assert half.id.endswith("float16")
    # Weights stay rounded to half precision, so digits are those of half precision.
    torch.testing.assert_close(half(pair[0]).features, full(pair[0]).features, rtol=2e-2, atol=1e3)


def test_statistics_of_another_extractor_are_refused(extractor, pair, tmp_path):
    from diffsteer.eval import write_statistics

    other = tiny_extractor(seed=2)
    rows = Moments.of(other(pair[0]).features)
    path = tmp_path / "other.npz"
    write_statistics(path, Statistics.of_moments(rows, extractor=other.id))
    with pytest.raises(ValueError, match="--force"):
        suite_of(extractor, reference=path)
    forced = fed(extractor, pair[1], reference=path, force=True, metrics=("fd",)).compute()
    assert any("another extractor" in w for w in forced.warnings)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: EvalSuite(("fid9000",), extractors=e), "fid9000"),
        (lambda e: EvalSuite((), extractors=e), "none"),
        (lambda e: EvalSuite(extractors=e, settings="admm"), "admm"),
        (lambda e: Settings(k=0), "k must be at least 1"),
        (lambda e: suite_of(e).compute(), "no samples"),
        (lambda e: suite_of(e).update(tensors(3), labels=[1, 2]), r"labels must have shape \(3,\)"),
        (lambda e: suite_of(e, reference="/nowhere.npz"), "nowhere"),
    ],
)
def test_bad_arguments_name_themselves(extractor, call, message):
    with pytest.raises(ValueError, match=message):
        call(extractor)


def test_results_write_and_read_themselves(extractor, pair, tmp_path):
    result = fed(extractor, pair[1], pair[0], torch.arange(60) % 4).compute()
    path = tmp_path / "metrics.json"
    path.write_text(result.to_json())
    again = read_result(path)
    assert (
        again.values == pytest.approx(result.values) and again.scores.keys() == result.scores.keys()
    )
    assert json.loads(path.read_text())["higher_is_better"]["recall"] is True
    fewer = replace(again, scores={"recall": replace(again.scores["recall"], count=9)})
    text = table([("a", again), ("b", fewer)])
    assert "@9" in text and "fd-tiny@60 ↓" in text
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"metrics\.json"):
        read_result(path)


def test_curves_over_k_agree_with_the_scores_at_k(extractor, pair, tmp_path):
    real, fake = pair
    suite = fed(extractor, fake, real, metrics=("pr", "dc", "over_k"), settings=Settings(k=4))
    result = suite.compute()
    ks, values = result.curves["recall-over-k"]
    assert ks == [1, 2, 3, 4, 5, 10, 20] and values == sorted(values)
    assert values[3] == result.values["recall"]
    x, y = extractor(real).features, extractor(fake).features
    assert values[5] == prdc(x, y, 10).recall
    assert set(result.curves) == {f"{s}-over-k" for s in ("precision", "recall", "density",
                                                          "coverage")}  # fmt: skip
    few = fed(extractor, fake[:1], real, metrics=("over_k",)).compute()
    assert "at least 2" in few.skipped["over_k"]


def test_every_score_says_which_way_is_better_its_count_and_its_error(extractor, pair):
    real, fake = pair
    result = fed(extractor, fake, real, torch.arange(60) % 4).compute()
    without = {"fd-tiny", "recall", "coverage", "macro_precision", "cmmd-tiny", "vendi",
               "diversity"}  # fmt: skip
    for name, score in result.scores.items():
        assert score.count == 60, name
        neither = name in ("saturation", "contrast", "clipped")
        assert (score.higher_is_better is None) is neither, name
        lower = name.startswith(("fd", "kid", "cmmd"))
        assert neither or score.higher_is_better is not lower, name
        assert (score.stderr is None) is (name in without), name
    error = (result.values["precision"] * (1 - result.values["precision"]) / 59) ** 0.5
    assert result.stderr["precision"] == pytest.approx(error)
