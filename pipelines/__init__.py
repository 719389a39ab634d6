"""Everything that knows diffusers pipelines: steer(), our own pipeline, the embedded model."""

from .class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
from .embedded import load_embedded as load_embedded
from .embedded import load_embedded_weak as load_embedded_weak
