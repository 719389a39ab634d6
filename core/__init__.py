"""What every method is written in: prediction kinds, noise levels, steps, noise, oracles."""

from .denoiser import GuidedDenoiser as GuidedDenoiser
from .noise import noise_like_seeds as noise_like_seeds
from .noise import seeded_generators as seeded_generators
from .noise import seeded_noise as seeded_noise
from .oracle import GaussianMixture as GaussianMixture
from .prediction import Kind as Kind
from .prediction import Level as Level
from .prediction import denoised_affine as denoised_affine
from .prediction import from_denoised as from_denoised
from .prediction import to_denoised as to_denoised
from .step import Guidance as Guidance
from .step import MissingPrediction as MissingPrediction
from .step import Step as Step
from .step import needs_uncond as needs_uncond
from .tensors import per_sample as per_sample
from .tensors import sample_dot as sample_dot
from .tensors import sample_norm as sample_norm

__all__ = [
    "GaussianMixture",
    "Guidance",
    "GuidedDenoiser",
    "Kind",
    "Level",
    "MissingPrediction",
    "Step",
    "denoised_affine",
    "from_denoised",
    "needs_uncond",
    "noise_like_seeds",
    "per_sample",
    "sample_dot",
    "sample_norm",
    "seeded_generators",
    "seeded_noise",
    "to_denoised",
]
