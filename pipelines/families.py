"""What the class name of a pipeline tells, where measuring its first step cannot.

Everything here is looked up by a part of the class name, so that ``LuminaPipeline`` and
``Lumina2ModularPipeline`` share a row. The fit of ``verify`` has the last word where it can decide.
"""

from __future__ import annotations

from typing import Any

# A doubled batch is [unconditional, conditional] in diffusers, except in these.
CONDITIONAL_FIRST = ("DiTPipeline", "StableCascade", "Lumina", "ZImage")

# Gives ``scheduler.step`` its doubled batch; two equal predictions do not show that by themselves.
DOUBLING = ("DiTPipeline",)

# These negate the network's output before ``scheduler.step``.
NEGATED = ("Lumina", "ZImage", "HiDream", "LTXCondition", "SanaWM", "NucleusMoE")

# Pipelines whose loop cannot be steered at ``scheduler.step``, and why.
UNSUPPORTED = {
    "Cosmos": "it preconditions the network's output outside the network",
    "LTX2": "it steps several modalities through copies of its scheduler",
    "SkyReelsV2DiffusionForcing": "it steps copies of its scheduler, one a frame",
    "Kandinsky6": "it steps sound and picture through copies of its scheduler",
    "Amused": "it samples tokens, not a noisy tensor",
    "LEdits": "it mixes one prediction for every edit",
    "InstructPix2Pix": "it mixes three predictions (text, image, unconditional)",
    "OmniGen": "it mixes three predictions (text and image, image, unconditional)",
}

# What to change where a pipeline does more with its predictions than a linear guidance.
REMEDIES = {
    "QwenImage": "QwenImage rescales every token after guidance and cannot switch that off",
    "Lumina2": "call the pipeline with cfg_normalization=False",
    "ZImage": "call the pipeline with cfg_normalization=False",
    "LuminaPipeline": "LuminaPipeline guides three channels only and cannot switch that off",
    "LuminaText2Img": "LuminaText2ImgPipeline guides three channels only and cannot switch "
    "that off",
    "StableVideoDiffusion": "call the pipeline with min_guidance_scale equal to max_guidance_scale",
    "Modular": "give the pipeline diffusers' plain guider: "
    "pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))",
    "HunyuanVideo15": "give the pipeline diffusers' plain guider, ClassifierFreeGuidance",
    "HunyuanImage": "give the pipeline diffusers' plain guider, ClassifierFreeGuidance",
}


def _names(pipe: Any) -> str:
    return " ".join(cls.__name__ for cls in type(pipe).__mro__)


def listed(pipe: Any, table: tuple[str, ...]) -> bool:
    """Whether the class of ``pipe``, or a base of it, has a name from ``table`` in its name."""
    names = _names(pipe)
    return any(part in names for part in table)


def default_order(pipe: Any, calls: int) -> str:
    """``"uc"`` or ``"cu"``: what a doubled batch, or two calls a step, hold by convention."""
    return "cu" if calls == 2 or listed(pipe, CONDITIONAL_FIRST) else "uc"


def default_sign(pipe: Any) -> int:
    """1, or -1 where the pipeline negates the network's output."""
    return -1 if listed(pipe, NEGATED) else 1


def check_supported(pipe: Any) -> None:
    """Refuse the pipelines that are known not to work.

    Raises:
        NotImplementedError: with the reason.
    """
    names = _names(pipe)
    for part, reason in UNSUPPORTED.items():
        if part in names:
            raise NotImplementedError(
                f"steer cannot guide {type(pipe).__name__}: {reason}. Supported are pipelines "
                "with one or two predictions a step; for a loop of your own use "
                "diffsteer.core.GuidedDenoiser"
            )


def remedy(pipe: Any) -> str:
    """How to make this pipeline's guidance linear, in one clause."""
    names = _names(pipe)
    for part, text in REMEDIES.items():
        if part in names:
            return text
    return "switch off guidance_rescale, normalisation, PAG or skip-layer guidance in the call"
