"""Resizes against the programs they name, and extractors that say what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_samples import TinyNet, tensors, tiny_extractor
from PIL import Image

from diffsteer.eval import Extractor, cifar_extractor
from diffsteer.eval.reference import statistics_for
from diffsteer.eval.resize import RESIZES, resized, tf1_bilinear


def tf1_by_hand(image, side):
    """TensorFlow 1's kernel, pixel by pixel: output (i, j) looks at (i, j) * size / side."""
    height, width = image.shape[1:]
    out = np.empty((3, side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * np.float32(height / side), j * np.float32(width / side)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[:, top, left] + (image[:, top, right] - image[:, top, left]) * (x - left)
            lower = image[:, bottom, left] + (image[:, bottom, right] - image[:, bottom, left]) * (
                x - left
            )
            out[:, i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize("size, side", [((5, 7), 11), ((16, 16), 6), ((8, 8), 8)])
def test_tf1_bilinear_is_the_asymmetric_kernel(size, side):
    image = tensors(1, 3, size)[0]
    expected = tf1_by_hand(image.double().numpy(), side)
    np.testing.assert_allclose(tf1_bilinear(image, side).numpy(), expected, atol=1e-4)


def test_pillow_bicubic_is_pillows_and_the_float_form_is_not_rounded():
    picture = np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    expected = np.array(Image.fromarray(picture).resize((7, 7), Image.Resampling.BICUBIC))
    found = RESIZES["pil-bicubic"](image, 7)
    assert (found.permute(1, 2, 0).numpy() == expected).all()
    smooth = RESIZES["pil-bicubic-float"](image, 7)
    assert float((smooth - found).abs().max()) <= 1.5 and bool((smooth != smooth.round()).any())


@pytest.mark.parametrize("rule", RESIZES)
def test_every_resize_keeps_flat_images_and_right_sizes(rule):
    flat = torch.full((3, 10, 14), 77, dtype=torch.uint8)
    torch.testing.assert_close(RESIZES[rule](flat, 5), torch.full((3, 5, 5), 77.0))
    images = tensors(2)
    assert torch.equal(resized(images, 16, rule), images.float())


@pytest.mark.parametrize("rule", [rule for rule in RESIZES if not rule.startswith("pil")])
def test_an_image_is_resized_alike_in_a_batch_and_alone(rule):
    images = tensors(5, 3, (10, 40))
    torch.testing.assert_close(
        RESIZES[rule](images, 16), resized(images, 16, rule), rtol=0, atol=1e-4
    )


def test_the_named_resizes_differ():
    # Hard edges: bicubic rules differ by who clamps their overshoot.
    image = (tensors(1, 4, (32, 32)) % 2) * 255
    results = [resized(image, 20, rule) for rule in RESIZES]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert float((first - second).abs().max()) > 0.05


def test_unknown_resize_is_named():
    with pytest.raises(ValueError, match="nearest"):
        resized(tensors(1), 8, "nearest")


def test_identity_names_weights_resize_and_precision():
    base = tiny_extractor()
    assert base.id == tiny_extractor().id
    others = [tiny_extractor(seed=2), tiny_extractor(resize="tf1-bilinear"),
              tiny_extractor(side=8), tiny_extractor(dtype=torch.bfloat16)]  # fmt: skip
    assert len({base.id, *(other.id for other in others)}) == 5


def test_any_module_is_an_extractor():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 5))
    found = Extractor(network, space="mine", side=8)(tensors(11))
    assert found.features.shape == (11, 5) and found.logits is None
    with pytest.raises(ValueError, match=r"\(B, d\)"):
        Extractor(torch.nn.Conv2d(3, 2, 1), space="mine", side=8)(tensors(2))
    with pytest.raises(TypeError, match="uint8"):
        Extractor(TinyNet(), space="mine", side=16)(tensors(2).float())


def test_the_embedded_network_sees_each_image_by_itself():
    from diffsteer.eval import cifar_extractor

    extractor = cifar_extractor()
    images = tensors(20, 5, (32, 32))
    whole, order = extractor(images), torch.randperm(20)
    parts = [extractor(images[order[:7]]), extractor(images[order[7:]])]
    again = torch.cat([part.features for part in parts])
    torch.testing.assert_close(again, whole.features[order], rtol=1e-5, atol=1e-5)
    assert whole.features.shape == (20, extractor.network.feature_size) and whole.logits.shape == (
        20,
        10,
    )
    expected = extractor.network(images.float() / 255)
    torch.testing.assert_close(whole.logits, expected, rtol=1e-4, atol=1e-4)


def test_the_embedded_reference_is_of_the_embedded_network():
    extractor = cifar_extractor()
    assert ("-mirrored@" in extractor.id) == extractor.network.config.mirrored
    known, remarks = statistics_for(extractor, None)  # refuses another identity
    assert not remarks and known.count == 10_000 and known.features.shape == (5000, known.dim)
    assert known.dim == extractor.network.feature_size and len(known.labels) == 5000
    assert "/" not in str(known.header["warnings"])  # no path of the machine that made it
    # The rows are a random subset of the images that the moments are of.
    gap = (known.features.double().mean(0) - known.mean) / known.covariance.diagonal().sqrt()
    assert float(gap.abs().max()) < 5 / 5000**0.5
