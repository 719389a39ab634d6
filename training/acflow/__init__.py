"""Reward fine-tuning of flow models by an actor and a critic (AC-Flow), and its special cases."""

from .config import METHODS as METHODS
from .config import ACFlowConfig as ACFlowConfig
from .config import method_config as method_config
from .critic import Critic as Critic
from .grpo_trainer import GRPOConfig as GRPOConfig
from .grpo_trainer import GRPOTrainer as GRPOTrainer
from .losses import actor_loss as actor_loss
from .losses import critic_loss as critic_loss
from .losses import explained_variance as explained_variance
from .losses import forward_noised as forward_noised
from .shaping import RewardShaper as RewardShaper
from .shaping import RunningMoments as RunningMoments
from .shaping import shape_rewards as shape_rewards
from .trainer import ACFlowTrainer as ACFlowTrainer
from .warmup import WarmUp as WarmUp
from .weights import advantage as advantage
from .weights import family_weights as family_weights
from .weights import normalised_weights as normalised_weights

__all__ = [
    "METHODS",
    "ACFlowConfig",
    "ACFlowTrainer",
    "Critic",
    "GRPOConfig",
    "GRPOTrainer",
    "RewardShaper",
    "RunningMoments",
    "WarmUp",
    "actor_loss",
    "advantage",
    "critic_loss",
    "explained_variance",
    "family_weights",
    "forward_noised",
    "method_config",
    "normalised_weights",
    "shape_rewards",
]
