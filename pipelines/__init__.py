"""Everything that knows diffusers pipelines: steer(), our own pipeline, the embedded model."""

from .class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
from .classifier_loaders import load_image_classifier as load_image_classifier
from .classifier_loaders import timm_classifier as timm_classifier
from .classifier_loaders import torchvision_classifier as torchvision_classifier
from .classifier_loaders import transformers_classifier as transformers_classifier
from .classifiers import ImageClassifier as ImageClassifier
from .classifiers import clip_classifier as clip_classifier
from .classifiers import latent_classifier as latent_classifier
from .conditions import prompt_conditions as prompt_conditions
from .d2f_scheduler import D2FScheduler as D2FScheduler
from .d2f_scheduler import d2f_timesteps as d2f_timesteps
from .decoding import ImageDecoder as ImageDecoder
from .decoding import LatentView as LatentView
from .decoding import image_decoder as image_decoder
from .decoding import latent_view as latent_view
from .degraded import DegradedPass as DegradedPass
from .degraded import degraded as degraded
from .embedded import load_embedded as load_embedded
from .embedded import load_embedded_weak as load_embedded_weak
from .generation import class_table as class_table
from .generation import generate_images as generate_images
from .generation import plan_images as plan_images
from .generation import run_settings as run_settings
from .generation import takes_classes as takes_classes
from .grid import image_grid as image_grid
from .guiders import AdaptiveProjectedGuider as AdaptiveProjectedGuider
from .guiders import BaseGuidance as BaseGuidance  # diffusers looks for it beside our guiders
from .guiders import ClassifierFreeGuider as ClassifierFreeGuider
from .guiders import RuleGuider as RuleGuider
from .guiders import attach as attach
from .guiders import install_guider as install_guider
from .image_folder import FolderError as FolderError
from .image_folder import ImageFolder as ImageFolder
from .image_folder import ImageRequest as ImageRequest
from .levels import LevelReading as LevelReading
from .levels import noise_level as noise_level
from .loading import load_pipeline as load_pipeline
from .loading import load_weak as load_weak
from .loading import model_digest as model_digest
from .steer import Steering as Steering
from .steer import steer as steer
from .sweep import PointResult as PointResult
from .sweep import run_sweep as run_sweep
from .sweep_budget import at_budget as at_budget
from .sweep_cost import PointCost as PointCost
from .sweep_cost import point_cost as point_cost
from .sweep_point import SweepPoint as SweepPoint
from .trace import TraceStep as TraceStep
from .trace import trace_rule as trace_rule
from .trajectory import StepRecord as StepRecord

__all__ = [
    "AdaptiveProjectedGuider",
    "BaseGuidance",
    "ClassConditionalPipeline",
    "ClassifierFreeGuider",
    "D2FScheduler",
    "DegradedPass",
    "FolderError",
    "ImageClassifier",
    "ImageDecoder",
    "ImageFolder",
    "ImageRequest",
    "LatentView",
    "LevelReading",
    "PointCost",
    "PointResult",
    "RuleGuider",
    "Steering",
    "StepRecord",
    "SweepPoint",
    "TraceStep",
    "at_budget",
    "attach",
    "class_table",
    "clip_classifier",
    "d2f_timesteps",
    "degraded",
    "generate_images",
    "image_decoder",
    "image_grid",
    "install_guider",
    "latent_classifier",
    "latent_view",
    "load_embedded",
    "load_embedded_weak",
    "load_image_classifier",
    "load_pipeline",
    "load_weak",
    "model_digest",
    "noise_level",
    "plan_images",
    "point_cost",
    "prompt_conditions",
    "run_settings",
    "run_sweep",
    "steer",
    "takes_classes",
    "timm_classifier",
    "torchvision_classifier",
    "trace_rule",
    "transformers_classifier",
]
