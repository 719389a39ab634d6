"""Training: objectives as pure functions, a resumable loop, checkpoints."""

from .checkpoint import CheckpointError as CheckpointError
from .config import TrainConfig as TrainConfig
from .data import Images as Images
from .data import LabelledImages as LabelledImages
from .data import load_images as load_images
from .dimension import suggest_k as suggest_k
from .draws import Objective as Objective
from .flow import FlowMatching as FlowMatching
from .flow import velocity_loss as velocity_loss
from .kdiff import KDiffObjective as KDiffObjective
from .kdiff import LearnedK as LearnedK
from .kdiff import kdiff_loss as kdiff_loss
from .kdiff import kdiff_velocity as kdiff_velocity
from .trainer import Trainer as Trainer
from .trainer import averaged_model as averaged_model

__all__ = [
    "CheckpointError",
    "FlowMatching",
    "Images",
    "KDiffObjective",
    "LabelledImages",
    "LearnedK",
    "Objective",
    "TrainConfig",
    "Trainer",
    "averaged_model",
    "kdiff_loss",
    "kdiff_velocity",
    "load_images",
    "suggest_k",
    "velocity_loss",
]
