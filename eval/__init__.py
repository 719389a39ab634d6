"""Every number that papers on generated images report: pure float64 metrics, in one pass."""

from .accuracy import class_accuracy as class_accuracy
from .callback import Generated as Generated
from .callback import PeriodicEvaluation as PeriodicEvaluation
from .classifiers import load_classifier as load_classifier
from .cmmd import cmmd as cmmd
from .colour import colour_stats as colour_stats
from .extractors import Extractor as Extractor
from .extractors import Taps as Taps
from .extractors import cifar_extractor as cifar_extractor
from .fd_infinity import fd_infinity as fd_infinity
from .frechet import Gaussian as Gaussian
from .frechet import frechet_distance as frechet_distance
from .frechet import frechet_distance_from_features as frechet_distance_from_features
from .frechet import frechet_distance_to as frechet_distance_to
from .images import open_images as open_images
from .inception_score import inception_score as inception_score
from .kernel import kernel_distance as kernel_distance
from .kernel import kernel_distance_subsets as kernel_distance_subsets
from .memorisation import authentic as authentic
from .memorisation import realism as realism
from .moments import Moments as Moments
from .prdc import prdc as prdc
from .report import EvalResult as EvalResult
from .report import Score as Score
from .run import Reading as Reading
from .run import evaluate as evaluate
from .scorers import ClipScorer as ClipScorer
from .scorers import load_scorer as load_scorer
from .settings import PROTOCOLS as PROTOCOLS
from .settings import Settings as Settings
from .stats import Statistics as Statistics
from .stats import read_statistics as read_statistics
from .stats import write_statistics as write_statistics
from .suite import EvalSuite as EvalSuite
from .vendi import mean_cosine_distance as mean_cosine_distance
from .vendi import vendi as vendi

__all__ = [
    "PROTOCOLS",
    "ClipScorer",
    "EvalResult",
    "EvalSuite",
    "Extractor",
    "Gaussian",
    "Generated",
    "Moments",
    "PeriodicEvaluation",
    "Reading",
    "Score",
    "Settings",
    "Statistics",
    "Taps",
    "authentic",
    "cifar_extractor",
    "class_accuracy",
    "cmmd",
    "colour_stats",
    "evaluate",
    "fd_infinity",
    "frechet_distance",
    "frechet_distance_from_features",
    "frechet_distance_to",
    "inception_score",
    "kernel_distance",
    "kernel_distance_subsets",
    "load_classifier",
    "load_scorer",
    "mean_cosine_distance",
    "open_images",
    "prdc",
    "read_statistics",
    "realism",
    "vendi",
    "write_statistics",
]
