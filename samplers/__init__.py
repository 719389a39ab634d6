"""Solvers over a ``denoise(x, sigma)`` callable; they know nothing of models or guidance."""

from .grids import check_sigmas as check_sigmas
from .grids import flow_sigmas as flow_sigmas
from .grids import karras_sigmas as karras_sigmas
from .grids import linear_sigmas as linear_sigmas
from .integrate import SolverStep as SolverStep
from .integrate import integrate as integrate
from .likelihood import exact_divergence as exact_divergence
from .likelihood import hutchinson_divergence as hutchinson_divergence
from .likelihood import log_likelihood as log_likelihood
from .ode import dpmpp_2m_step as dpmpp_2m_step
from .ode import euler_step as euler_step
from .ode import heun_step as heun_step
from .ode import slope as slope
from .pfgmpp import StudentChurnStep as StudentChurnStep
from .pfgmpp import pfgmpp_prior as pfgmpp_prior
from .pfgmpp import radius_of as radius_of
from .stochastic import AncestralStep as AncestralStep
from .stochastic import ChurnStep as ChurnStep

__all__ = [
    "AncestralStep",
    "ChurnStep",
    "SolverStep",
    "StudentChurnStep",
    "check_sigmas",
    "dpmpp_2m_step",
    "euler_step",
    "exact_divergence",
    "flow_sigmas",
    "heun_step",
    "hutchinson_divergence",
    "integrate",
    "karras_sigmas",
    "linear_sigmas",
    "log_likelihood",
    "pfgmpp_prior",
    "radius_of",
    "slope",
]
