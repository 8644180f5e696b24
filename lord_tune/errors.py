"""Typed errors and warnings.

Every error message says what came, what was expected and what to do, and names an option by its key, in backquotes. The
command line prints the message alone, with flags in place of keys, and exits with `exit_code`: 2 for a wrong call
(unknown option, missing file, occupied output folder), 1 for work that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LordError(Exception):
    """Work that could not be done: bad weights, corrupt files, an export that does not match its source."""

    exit_code = 1


class UsageError(LordError):
    """A call that cannot be carried out as written."""

    exit_code = 2


class CheckpointError(LordError):
    """Weights that cannot be read, or whose content is not usable (truncated file, NaN or Inf)."""


class CalibrationError(LordError):
    """Calibration text that is missing, empty or too short, or activations that are not finite."""


class ExportMismatch(LordError):
    """A written checkpoint whose logits differ from the model it was written from."""


class LordWarning(UserWarning):
    """Something was left out or adjusted; the message names it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `known`, with the nearest valid name."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(known[:40])}."
    return UsageError(f"Unknown {kind} '{name}'; {hint}")
