"""Decoded latents are the images that the pipeline itself shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import Tiny, build
from torch import Tensor

from diffsteer import load_embedded, steer
from diffsteer.guidance import CalibratedClassifierGuidance, ClassifierFreeGuidance
from diffsteer.pipelines import ImageDecoder, image_decoder, latent_view
from diffsteer.pipelines.decoding import unscaled

SIZE = {"height": 16, "width": 16}
NAMES = ("sd", "sdxl", "sd3", "pixart", "sana", "flux", "qwen", "wan", "dit")


def shown(tiny: Tiny, frame: int = 0) -> Tensor:
    """What the pipeline returns to a user, (B, 3, H, W) in [0, 1]; of a clip one frame."""
    with torch.no_grad():
        arguments = {"num_inference_steps": 1, tiny.guidance_argument: 4.0, **tiny.inputs()}
        output = tiny.pipe(**{**arguments, "output_type": "pt"})[0]
    images = torch.as_tensor(output)
    if images.shape[-1] == 3:  # DiT before diffusers 0.42 knows no tensors
        images = images.permute(0, 3, 1, 2)
    return images[:, frame] if images.ndim == 5 else images


@pytest.mark.parametrize("name", NAMES)
def test_decodes_as_the_pipeline_does(name: str) -> None:
    tiny = build(name)
    if name == "flux":
        tiny.pipe.vae.register_to_config(shift_factor=0.1)
    if name == "sdxl":  # the variant with channel statistics
        tiny.pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0])
        tiny.pipe.vae.register_to_config(latents_std=[1.5, 2.0, 0.5, 1.0])
    latents = tiny.call(num_inference_steps=1)
    decode = image_decoder(tiny.pipe, **packed_size(tiny))
    with torch.no_grad():
        images = decode(latents)
    assert images.shape[1] == 3 and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, shown(tiny).float(), rtol=1e-4, atol=1e-5)


def test_any_frame_of_a_clip_can_be_decoded() -> None:
    tiny = build("wan")
    latents = tiny.call(num_inference_steps=1)
    with torch.no_grad():
        first, last = (image_decoder(tiny.pipe, frame=frame)(latents) for frame in (0, -1))
    assert not torch.allclose(first, last, atol=1e-2)
    torch.testing.assert_close(last, shown(tiny, -1).float(), rtol=1e-4, atol=1e-5)


def packed_size(tiny: Tiny) -> dict[str, int]:
    inputs = tiny.inputs()
    return {side: inputs[side] for side in ("height", "width") if side in inputs}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_gradient_reaches_the_latents_also_where_the_image_is_clipped(name: str) -> None:
    tiny = build(name)
    latents = (30 * tiny.call(num_inference_steps=1)).requires_grad_()
    images = image_decoder(tiny.pipe, **packed_size(tiny))(latents)
    assert ((images == 0) | (images == 1)).any(), "nothing is clipped: the test shows nothing"
    for pixel in (images.flatten(1).argmin(1), images.flatten(1).argmax(1)):
        wanted = images.flatten(1).gather(1, pixel[:, None]).sum()
        (slope,) = torch.autograd.grad(wanted, latents, retain_graph=True)
        assert torch.isfinite(slope).all() and slope.abs().max() > 0


def test_a_tiny_decoder_in_the_place_of_the_autoencoder() -> None:
    tiny = build("sd3")
    channels = tiny.pipe.vae.config.latent_channels
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=channels,
    ).eval()  # fmt: skip
    decode = image_decoder(tiny.pipe, vae=small)
    latents = tiny.call(num_inference_steps=1)
    with torch.no_grad():
        # Its config has a scaling factor of 1: it takes latents as the denoiser has them.
        want = small.decode(latents, return_dict=False)[0] / 2 + 0.5
        torch.testing.assert_close(decode(latents), want.clamp(0, 1))


def test_latents_in_maps_with_and_without_their_scaling() -> None:
    tiny = build("flux")
    tiny.pipe.vae.register_to_config(shift_factor=0.1)
    latents = tiny.call(num_inference_steps=1)
    maps = latent_view(tiny.pipe, **packed_size(tiny))(latents)
    assert maps.ndim == 4 and maps.numel() == latents.numel()
    plain = latent_view(tiny.pipe, scaled=False, **packed_size(tiny))(latents)
    config = tiny.pipe.vae.config
    torch.testing.assert_close((plain - config.shift_factor) * config.scaling_factor, maps)


def test_channel_statistics_come_before_a_shift() -> None:
    vae = SimpleNamespace(config={"latents_mean": [1.0, 2.0], "latents_std": [3.0, 4.0]})
    maps = torch.ones(1, 2, 1, 1, 1)
    assert unscaled(maps, vae).flatten().tolist() == [4.0, 6.0]


def test_pixel_models_need_no_decoder() -> None:
    decode = image_decoder(load_embedded())
    assert not isinstance(decode, ImageDecoder)
    assert decode(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 0.5, 1, 1]


def test_calibrated_guidance_through_the_decoder_moves_the_latents() -> None:
    tiny, cfg = build("sd3"), ClassifierFreeGuidance(4.0)
    with steer(tiny.pipe, cfg):
        plain = tiny.call()
    rule = CalibratedClassifierGuidance(
        lambda images: 50 * images.mean((2, 3)), rule=cfg, scale=5.0, labels=torch.tensor([0, 2]),
        decode=image_decoder(tiny.pipe),
    )  # fmt: skip
    with steer(tiny.pipe, rule):
        steered = tiny.call()
    with torch.no_grad():
        decode = image_decoder(tiny.pipe)
        means = [decode(latents).mean((2, 3)) for latents in (plain, steered)]
    gain = (means[1] - means[0]) - (means[1] - means[0]).mean(1, keepdim=True)
    assert gain[0, 0] > 0 and gain[1, 2] > 0, "each image has more of its own colour"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: image_decoder(build("sd").pipe, vae=torch.nn.Linear(1, 1)), TypeError, "decode"),
        (lambda: image_decoder(build("ltx").pipe), NotImplementedError, "decode= function"),
        (lambda: latent_view(load_embedded()), ValueError, "image_decoder"),
        (lambda: latent_view(build("sd").pipe)(torch.zeros(1, 4, 4)), ValueError, "no maps"),
        (
            lambda: image_decoder(build("flux").pipe, height=64, width=16)(torch.zeros(1, 16, 16)),
            ValueError,
            "height= and width= of the call",
        ),
        (
            lambda: image_decoder(build("sd").pipe.to(torch.float16), vae=overflowing()),
            ValueError,
            "float16",
        ),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def overflowing() -> Any:
    vae = build("sd").pipe.vae.to(torch.float16)
    vae.register_to_config(force_upcast=True)
    return vae
