"""Everything that knows diffusers pipelines: steer(), our own pipeline, the embedded model."""

from .class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
from .embedded import load_embedded as load_embedded
from .embedded import load_embedded_weak as load_embedded_weak
from .guiders import AdaptiveProjectedGuider as AdaptiveProjectedGuider
from .guiders import BaseGuidance as BaseGuidance  # diffusers looks for it beside our guiders
from .guiders import ClassifierFreeGuider as ClassifierFreeGuider
from .guiders import RuleGuider as RuleGuider
from .guiders import attach as attach
from .levels import Reading as Reading
from .levels import noise_level as noise_level
from .steer import Steering as Steering
from .steer import steer as steer
from .trajectory import StepRecord as StepRecord
