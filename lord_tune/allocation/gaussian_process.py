"""The next point of a Bayesian optimisation: the only file that imports optuna.

Nothing is kept between two calls: the Gaussian process is fitted anew to all that was seen, from a seed of its own. So
a search that was killed proposes the same as one that was not, wherever its points are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from ..errors import UsageError

Point = Mapping[str, float]


def require_optuna() -> None:
    """UsageError where the package, or what its sampler computes with, is not installed."""
    try:
        import optuna  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"`allocation` bolaco searches with optuna, and {error.name} is not installed; pip install "
            "'lord-tune[bolaco]', or choose another allocation."
        ) from error


def proposal(
    low: float,
    high: float,
    seen: Sequence[tuple[Point, float]],  # the points of the search so far, all of the same names, and their values
    seed: int,
) -> dict[str, float]:
    """The point in [low, high]^n with the largest expected improvement of the least value (Jones et al. 1998), by a
    Gaussian process with a Matern 5/2 kernel of one length scale per name (optuna's GPSampler)."""
    import optuna
    from optuna.distributions import FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it says more of itself than of the search
    space = {name: FloatDistribution(low, high) for name in seen[0][0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1, deterministic_objective=True)
        study = optuna.create_study(sampler=sampler)
        trials = [optuna.trial.create_trial(params=dict(p), distributions=space, value=value) for p, value in seen]  # type: ignore[arg-type]
        study.add_trials(trials)
        found = study.ask(space).params  # type: ignore[arg-type]
    return {name: float(found[name]) for name in space}
