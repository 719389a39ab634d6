"""Training-free guidance: one method a file, each a pure function and a small frozen dataclass."""

from .apg import AdaptiveProjectedGuidance as AdaptiveProjectedGuidance
from .apg import adaptive_projected as adaptive_projected
from .autoguidance import AutoGuidance as AutoGuidance
from .cfg import ClassifierFreeGuidance as ClassifierFreeGuidance
from .cfg import classifier_free as classifier_free
from .cfgmp import ManifoldProjectedGuidance as ManifoldProjectedGuidance
from .cfgzero import ClassifierFreeZeroStarGuidance as ClassifierFreeZeroStarGuidance
from .cfgzero import optimised_scale as optimised_scale
from .cfgzero import zero_star as zero_star
from .degraded_pass import DegradedPassGuidance as DegradedPassGuidance
from .degraded_pass import away_from_degraded as away_from_degraded
from .elucd import CalibratedClassifierGuidance as CalibratedClassifierGuidance
from .elucd import calibrated_energy as calibrated_energy
from .elucd import smooth_activations as smooth_activations
from .frequency import FrequencyDecoupledGuidance as FrequencyDecoupledGuidance
from .frequency import frequency_decoupled as frequency_decoupled
from .frequency import low_frequencies as low_frequencies
from .gfcg import GradientFreeClassifierGuidance as GradientFreeClassifierGuidance
from .interval import GuidanceInterval as GuidanceInterval
from .label_check import LabelCheck as LabelCheck
from .label_check import check_label_map as check_label_map
from .labels import MergedClasses as MergedClasses
from .labels import match_classes as match_classes
from .presets import APG_PRESETS as APG_PRESETS
from .presets import PRESETS as PRESETS
from .presets import Preset as Preset
from .rescale import RescaledGuidance as RescaledGuidance
from .rescale import rescaled as rescaled
from .schedule import CosineScale as CosineScale
from .schedule import LinearScale as LinearScale
from .schedule import ScaleSchedule as ScaleSchedule
from .schedule import parse_scale as parse_scale

__all__ = [
    "APG_PRESETS",
    "PRESETS",
    "AdaptiveProjectedGuidance",
    "AutoGuidance",
    "CalibratedClassifierGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "CosineScale",
    "DegradedPassGuidance",
    "FrequencyDecoupledGuidance",
    "GradientFreeClassifierGuidance",
    "GuidanceInterval",
    "LabelCheck",
    "LinearScale",
    "ManifoldProjectedGuidance",
    "MergedClasses",
    "Preset",
    "RescaledGuidance",
    "ScaleSchedule",
    "adaptive_projected",
    "away_from_degraded",
    "calibrated_energy",
    "check_label_map",
    "classifier_free",
    "frequency_decoupled",
    "low_frequencies",
    "match_classes",
    "optimised_scale",
    "parse_scale",
    "rescaled",
    "rules",
    "smooth_activations",
    "zero_star",
]


def rules() -> dict[str, type]:
    """Every public guidance method by its name; command lines derive their choices from it.

    A class is a guidance method if it says whether it ``commutes`` (see ``core.Guidance``).
    """
    exported = {name: globals()[name] for name in __all__}
    classes = {name: value for name, value in exported.items() if isinstance(value, type)}
    return {name: value for name, value in classes.items() if hasattr(value, "commutes")}
