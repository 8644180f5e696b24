"""Factorization methods, one file each; `METHODS` lists them by name."""

from typing import Any

from .afm import AFM
from .base import (
    Core,
    FactorForm,
    Factorization,
    Factors,
    Fisher,
    Metric,
    Projection,
    Solution,
    Spectrum,
    Split,
    balance,
    calibrated_curve,
    truncate,
)
from .caldera import Caldera, feedback_alone
from .curves import OutputErrors, error_curves, relative_error
from .loftq import LoftQ
from .pivoting import others_of, pivoted, pivoted_left, places_of
from .rounding import round_factors
from .svd import PlainSVD
from .tails import Curve, thinned
from .tucker import Tucker
from .two_sided import TwoSided
from .whitened import Whitened

METHODS: dict[str, type[Any]] = {
    "svd": PlainSVD,
    "whitened": Whitened,
    "two_sided": TwoSided,
    "afm": AFM,
    "loftq": LoftQ,
    "caldera": Caldera,
    "tucker": Tucker,
}

__all__ = [
    "AFM",
    "METHODS",
    "Caldera",
    "Core",
    "Curve",
    "FactorForm",
    "Factorization",
    "Factors",
    "Fisher",
    "LoftQ",
    "Metric",
    "OutputErrors",
    "PlainSVD",
    "Projection",
    "Solution",
    "Spectrum",
    "Split",
    "Tucker",
    "TwoSided",
    "Whitened",
    "balance",
    "calibrated_curve",
    "error_curves",
    "feedback_alone",
    "others_of",
    "pivoted",
    "pivoted_left",
    "places_of",
    "relative_error",
    "round_factors",
    "thinned",
    "truncate",
]
