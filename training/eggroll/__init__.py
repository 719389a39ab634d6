"""EGGROLL: evolution strategies with low-rank noise, for any reward and without gradients."""

from .forward import perturbed as perturbed
from .layers import Layer as Layer
from .layers import find_layers as find_layers
from .noise import BASELINE as BASELINE
from .noise import NoiseFormat as NoiseFormat
from .noise import member_noise as member_noise
from .optimizer import Eggroll as Eggroll
from .optimizer import Report as Report
from .shaping import Shaped as Shaped
from .shaping import shape_fitness as shape_fitness
from .update import es_gradient as es_gradient
from .update import weights_hash as weights_hash

__all__ = [
    "BASELINE",
    "Eggroll",
    "Layer",
    "NoiseFormat",
    "Report",
    "Shaped",
    "es_gradient",
    "find_layers",
    "member_noise",
    "perturbed",
    "shape_fitness",
    "weights_hash",
]
