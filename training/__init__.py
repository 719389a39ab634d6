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
from .objectives import make_objective as make_objective
from .pfgmpp import PFGMPPObjective as PFGMPPObjective
from .pfgmpp import edm_loss as edm_loss
from .result import averaged_model as averaged_model
from .result import averaged_pipeline as averaged_pipeline
from .trainer import Trainer as Trainer
from .warm_start import warm_start as warm_start

__all__ = [
    "CheckpointError",
    "FlowMatching",
    "Images",
    "KDiffObjective",
    "LabelledImages",
    "LearnedK",
    "Objective",
    "PFGMPPObjective",
    "TrainConfig",
    "Trainer",
    "averaged_model",
    "averaged_pipeline",
    "edm_loss",
    "kdiff_loss",
    "kdiff_velocity",
    "load_images",
    "make_objective",
    "suggest_k",
    "velocity_loss",
    "warm_start",
]
