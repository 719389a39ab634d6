"""Odd input, row by row: what is an error, what is a warning, and that the rest goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_samples import tensors, tiny_extractor
from PIL import Image

from diffsteer.eval import (
    EvalSuite,
    Moments,
    Reading,
    Settings,
    Statistics,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance_subsets,
    prdc,
)


def result_of(fake, real=None, metrics=("fd", "kid", "pr", "is", "colour"), **options):
    suite = EvalSuite(metrics, extractors=tiny_extractor(), **options)
    if real is not None:
        suite.update(real, real=True)
    suite.update(fake)
    return suite.compute()


def said(result, *words):
    return any(all(word in warning for word in words) for warning in result.warnings)


def test_fewer_samples_than_features_names_both_counts_and_the_remedy():
    result = result_of(tensors(5, 2), tensors(60, 1))
    assert said(result, "5 generated", "60 real", "6 features", "biased upward", "kid")
    assert result.values["fd-tiny"] > 0


def test_other_counts_than_the_reference_are_said_also_of_statistics():
    rows = tiny_extractor()(tensors(60, 1)).features
    known = Statistics.of_moments(Moments.of(rows), extractor=tiny_extractor().id)
    assert said(result_of(tensors(40, 2), reference=known), "40 generated against 60 real")
    assert not said(result_of(tensors(60, 2), reference=known), "generated against")
    # A file that does not say how many: nothing can be compared.
    unknown = Statistics(known.mean, known.covariance, extractor=known.extractor)
    assert not said(result_of(tensors(40, 2), reference=unknown), "generated against")


def test_precision_and_recall_say_that_the_two_counts_differ():
    result = result_of(tensors(40, 2), tensors(60, 1), settings=Settings(neighbours_real=50))
    assert said(result, "50 real with 40 generated", "depend on both")
    same = result_of(tensors(40, 2), tensors(60, 1), settings=Settings(neighbours_real=40))
    assert not said(same, "depend on both counts")


def test_floats_that_were_cast_to_uint8_are_suspected():
    assert said(result_of((tensors(20, 2) > 99).to(torch.uint8)), "flat", "cast to uint8")
    assert not said(result_of(tensors(20, 2)), "flat")


def test_too_few_samples_for_neighbours_and_splits():
    result = result_of(tensors(3, 2), tensors(9, 1))
    assert "k = 3" in result.skipped["pr"] and "3 generated" in result.skipped["pr"]
    assert "10 splits" in result.skipped["is"] and "got 3" in result.skipped["is"]
    assert "saturation" in result.values
    with pytest.raises(ValueError, match=r"k = 3 need more than 3 .* 2 fake"):
        prdc(torch.randn(9, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="splits must be between 1 and the sample count 4"):
        inception_score(torch.randn(4, 3))


def test_one_sample_is_scored_where_one_is_enough():
    result = result_of(tensors(1, 2), tensors(9, 1))
    assert "at least 2" in result.skipped["fd"] and "at least 2" in result.skipped["kid"]
    assert result.scores["saturation"].count == 1 and result.scores["saturation"].stderr != 0
    assert "saturation" not in result.stderr  # one value has no error


def test_subsets_larger_than_the_sample_are_lowered_and_said():
    result = result_of(tensors(40, 2), tensors(50, 1), settings=Settings(kid_subsets=5))
    assert said(result, "subsets of 40 instead of 1000") and "kid-tiny-subsets" in result.values
    with pytest.raises(ValueError, match="subset_size"):
        kernel_distance_subsets(torch.randn(9, 2), torch.randn(9, 2), subset_size=10)


@pytest.mark.parametrize("images", [tensors(4) / 127.5 - 1, tensors(4).float()])
def test_floats_of_another_range_are_refused_before_anything_is_counted(images):
    suite = EvalSuite(("colour",), extractors=tiny_extractor())
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        suite.update(images)
    assert len(suite.seen()) == 0


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"workers": -1}, {"on_error": "ignore"}, {"alpha": "black"}]
)
def test_readings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Reading(**options)


def test_samples_sorted_by_class_have_the_same_inception_score():
    images = tensors(40, 2)
    by_class = tiny_extractor()(images).logits.argmax(1).argsort()
    first, second = result_of(images), result_of(images[by_class])
    assert first.values["is-tiny"] == second.values["is-tiny"] > 1


def test_a_distance_of_zero_is_noted_and_one_far_below_zero_is_an_error(monkeypatch):
    same = result_of(tensors(40, 2), tensors(40, 2), metrics=("fd",))
    assert same.values["fd-tiny"] == pytest.approx(0, abs=1e-9) and said(same, "same images")
    from diffsteer.eval import frechet

    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: 4 * matrix.diagonal())
    with pytest.raises(ValueError, match="far below zero"):
        frechet.frechet_distance(*[torch.zeros(3), torch.eye(3)] * 2)


def test_a_broken_covariance_is_an_error():
    zero, one = torch.zeros(3), torch.eye(3)
    for wrong in (one * torch.nan, one + torch.ones(3, 3).triu(1), one.diag_embed()[0] - 2 * one):
        with pytest.raises(ValueError):
            frechet_distance(zero, wrong, zero, one)


@pytest.fixture
def odd_folder(tmp_path):
    """Two usual images, and one of every kind that is not."""
    folder = tmp_path / "odd"
    folder.mkdir()
    picture = np.array(tensors(1, 5)[0].permute(1, 2, 0))
    for name in ("a", "b"):
        Image.fromarray(picture).save(folder / f"{name}.png")
    Image.fromarray(picture[..., 0]).save(folder / "grey.png")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.dstack([picture, picture[..., 0]])).save(folder / "glass.png")
    Image.fromarray(picture).quantize(8).save(folder / "palette.png")
    Image.fromarray(picture).save(folder / "lossy.jpg")
    Image.fromarray(picture).convert("CMYK").save(folder / "ink.jpg")
    Image.fromarray(picture[:9]).save(folder / "wide.png")
    (folder / "thumbs.db").write_bytes(b"")
    return folder


def test_every_kind_of_file_is_counted_and_none_is_dropped(odd_folder):
    suite = EvalSuite(("colour",), extractors=tiny_extractor())
    result = evaluate(odd_folder, suite=suite, reading=Reading(workers=0))
    assert result.scores["saturation"].count == 9
    for words in ("1 grey", "1 16-bit", "1 transparent", "1 palette", "2 JPEG", "1 CMYK",
                  "2 sizes (8 of 16x16, 1 of 16x9)", "1 files are no images",
                  "2 of 9 generated samples are exact copies"):  # fmt: skip
        assert said(result, words), (words, result.warnings)
    with pytest.raises(ValueError, match=r"glass\.png.*transparent"):
        evaluate(odd_folder, suite=suite, reading=Reading(workers=0, alpha="error"))
