"""EGGROLL: evolution strategies with low-rank noise, for any reward and without gradients."""

from .config import EggrollConfig as EggrollConfig
from .curves import draw_curves as draw_curves
from .forward import perturbed as perturbed
from .hub import Hub as Hub
from .hub import process_state as process_state
from .layers import Layer as Layer
from .layers import find_layers as find_layers
from .log import FitnessLog as FitnessLog
from .log import replay as replay
from .lora import low_rank as low_rank
from .lora import save_lora as save_lora
from .noise import BASELINE as BASELINE
from .noise import NoiseFormat as NoiseFormat
from .noise import member_noise as member_noise
from .optimizer import Eggroll as Eggroll
from .report import Report as Report
from .save import save_result as save_result
from .shaping import Shaped as Shaped
from .shaping import shape_fitness as shape_fitness
from .trainer import EggrollTrainer as EggrollTrainer
from .trainer import make_eggroll as make_eggroll
from .update import es_gradient as es_gradient
from .update import weights_hash as weights_hash

__all__ = [
    "BASELINE",
    "Eggroll",
    "EggrollConfig",
    "EggrollTrainer",
    "FitnessLog",
    "Hub",
    "Layer",
    "NoiseFormat",
    "Report",
    "Shaped",
    "draw_curves",
    "es_gradient",
    "find_layers",
    "low_rank",
    "make_eggroll",
    "member_noise",
    "perturbed",
    "process_state",
    "replay",
    "save_lora",
    "save_result",
    "shape_fitness",
    "weights_hash",
]
