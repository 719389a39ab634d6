"""From a pipeline's denoised latents to images, differentiably: what classifiers need.

decode = image_decoder(pipe)                      # the pipeline's own autoencoder
decode = image_decoder(pipe, vae=AutoencoderTiny.from_pretrained("madebyollin/taesd"))
rule = GradientFreeClassifierGuidance(classifier, decode=decode, ...)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.tensors import widen
from ..guidance.elucd import clipped_pixels

Unpack = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LatentView:
    """Latents as the scheduler steps them, to maps (B, C, H, W) or clips (B, C, F, H, W).

    This is what a classifier of latents sees. Build one with ``latent_view(pipe)``.

    Attributes:
        unpack: takes token sequences (Flux, Qwen) apart; None if latents are maps already.
        vae: gives the numbers of the un-scaling.
        scaled: keep the scaling that the denoiser works in; False undoes it: what the autoencoder's
            encoder gave.
    """

    unpack: Unpack | None
    vae: Any
    scaled: bool = True

    def __call__(self, latents: Tensor) -> Tensor:
        """The latents in maps, dtype of ``latents``; differentiable.

        Raises:
            ValueError: for token sequences that the pipeline does not say how to take apart.
        """
        if self.unpack is None and latents.ndim < 4:
            raise ValueError(
                f"latents {tuple(latents.shape)} are no maps (B, C, H, W), and the pipeline has no "
                "_unpack_latents to make them so (Modular pipelines have not); give the rule a "
                "decode= function of your own"
            )
        maps = latents if self.unpack is None else self.unpack(latents)
        return maps if self.scaled else unscaled(maps, self.vae)


@dataclass(frozen=True, eq=False)
class ImageDecoder:
    """Latents as the scheduler steps them, to images in [0, 1], (B, 3, H, W), float32.

    Build one with ``image_decoder(pipe)``. Values outside [0, 1] are clipped, with the gradient of
    no clipping. Differentiable in the latents if called with gradients enabled.

    Attributes:
        view: to maps, with the scaling undone.
        vae: the autoencoder that decodes.
        frame: which frame of a clip is shown.
    """

    view: LatentView
    vae: Any
    frame: int = 0

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode; the autoencoder's dtype, the result in float32."""
        maps = self.view(latents).to(self.vae.dtype)
        pixels = self.vae.decode(maps, return_dict=False)[0]
        if pixels.ndim == 5:
            pixels = pixels[:, :, self.frame]
        return clipped_pixels(widen(pixels))


def image_decoder(
    pipe: Any,
    *,
    vae: nn.Module | None = None,
    height: int | None = None,
    width: int | None = None,
    frame: int = 0,
) -> Callable[[Tensor], Tensor]:
    """What turns the denoised samples of ``pipe`` into a classifier's images in [0, 1].

    Args:
        pipe: a diffusers pipeline. Without an autoencoder it is taken for a pixel model.
        vae: decode by this one instead, e.g. an ``AutoencoderTiny`` of the same latent space: a
            small share of the cost. Its own config says how to undo the scaling.
        height: of the images, for pipelines whose latents are token sequences (Flux, Qwen); by
            default the pipeline's own default.
        width: likewise.
        frame: which frame of a video to show; negative counts from the end.

    Returns:
        A function for ``decode=`` of the classifier rules; for a pixel model ``clipped_pixels``.

    Raises:
        TypeError: if ``vae`` is no autoencoder.
        ValueError: for a float16 autoencoder that is known to overflow.
        NotImplementedError: if the pipeline packs its latents in an unknown way.
    """
    if vae is None and getattr(pipe, "vae", None) is None:
        if getattr(pipe, "vqvae", None) is not None or getattr(pipe, "movq", None) is not None:
            raise NotImplementedError(
                f"{type(pipe).__name__} decodes in steps that are not known here; give the rule a "
                "decode= function of your own"
            )
        return clipped_pixels
    decoder: Any = pipe.vae if vae is None else vae
    if not callable(getattr(decoder, "decode", None)):
        raise TypeError(
            f"vae must be a diffusers autoencoder, with decode(), got {type(decoder).__name__}"
        )
    if decoder.dtype == torch.float16 and decoder.config.get("force_upcast", False):
        raise ValueError(
            f"this {type(decoder).__name__} overflows in float16 (its config says force_upcast), "
            "and a classifier would be shown NaN; use pipe.vae.to(torch.bfloat16), or a tiny "
            "decoder: vae=AutoencoderTiny.from_pretrained(...)"
        )
    view = LatentView(_unpacking(pipe, height, width), decoder, scaled=False)
    return ImageDecoder(view, decoder, frame)


def latent_view(
    pipe: Any, *, scaled: bool = True, height: int | None = None, width: int | None = None
) -> LatentView:
    """What turns the denoised samples of ``pipe`` into maps for a classifier of latents.

    Args:
        pipe: a latent diffusers pipeline.
        scaled: keep the scaling of the denoiser's space (about unit variance); False undoes it.
        height: see ``image_decoder``.
        width: likewise.

    Raises:
        ValueError: if the pipeline has no autoencoder: its samples are pixels.
        NotImplementedError: if the pipeline packs its latents in an unknown way.
    """
    if getattr(pipe, "vae", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} has no autoencoder, so it works on pixels; use image_decoder"
        )
    return LatentView(_unpacking(pipe, height, width), pipe.vae, scaled)


def unscaled(maps: Tensor, vae: Any) -> Tensor:
    """Undo the scaling that a pipeline puts between its autoencoder and its denoiser.

    Args:
        maps: (B, C, H, W) or (B, C, F, H, W).
        vae: ``maps * latents_std / scaling_factor + latents_mean`` if its config has channel
            statistics (SDXL variants, Wan, Qwen), else ``maps / scaling_factor + shift_factor``.
    """
    config = vae.config
    factor = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return maps / factor + (config.get("shift_factor") or 0.0)
    shape = (1, -1, *[1] * (maps.ndim - 2))
    mean, std = (torch.tensor(v, device=maps.device).to(maps).view(shape) for v in (mean, std))
    return maps * std / factor + mean


def _unpacking(pipe: Any, height: int | None, width: int | None) -> Unpack | None:
    """The pipeline's own way to take token sequences apart, or None if it has none."""
    unpack = getattr(pipe, "_unpack_latents", None)
    if unpack is None:
        return None
    if list(inspect.signature(unpack).parameters) != [
        *("latents", "height", "width", "vae_scale_factor")
    ]:
        raise NotImplementedError(
            f"{type(pipe).__name__} packs its latents in a way that is not known here; give the "
            "rule a decode= function of your own"
        )
    scale = pipe.vae_scale_factor
    default = getattr(pipe, "default_sample_size", 128) * scale
    rows, columns = (default if side is None else side for side in (height, width))

    def take_apart(latents: Tensor) -> Tensor:
        tokens = (rows // (2 * scale)) * (columns // (2 * scale))
        if latents.ndim != 3 or latents.shape[1] != tokens:
            raise ValueError(
                f"latents {tuple(latents.shape)} are not the {tokens} tokens of an image of "
                f"{rows}x{columns}; give image_decoder the height= and width= of the call"
            )
        maps: Tensor = unpack(latents, rows, columns, scale)
        return maps

    return take_apart
