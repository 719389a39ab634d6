"""Rewards: callables that score images, weighted, in the background, with failures counted."""

from .aesthetic import AestheticScore as AestheticScore
from .class_probability import ClassProbability as ClassProbability
from .colour import Brightness as Brightness
from .colour import ColourTarget as ColourTarget
from .image_reward import ImageReward as ImageReward
from .jpeg import JpegSize as JpegSize
from .jpeg import jpeg_bytes as jpeg_bytes
from .load import load_reward as load_reward
from .load import load_rewards as load_rewards
from .pool import RewardPool as RewardPool
from .protocol import Reward as Reward
from .protocol import RewardError as RewardError
from .protocol import as_reward as as_reward
from .reward_set import RewardSet as RewardSet
from .scores import RewardScores as RewardScores
from .text_image import ClipScore as ClipScore
from .text_image import HPSv2 as HPSv2
from .text_image import PickScore as PickScore
from .text_image import TextImageScore as TextImageScore

__all__ = [
    "AestheticScore",
    "Brightness",
    "ClassProbability",
    "ClipScore",
    "ColourTarget",
    "HPSv2",
    "ImageReward",
    "JpegSize",
    "PickScore",
    "Reward",
    "RewardError",
    "RewardPool",
    "RewardScores",
    "RewardSet",
    "TextImageScore",
    "as_reward",
    "jpeg_bytes",
    "load_reward",
    "load_rewards",
]
