"""How numbers are written on the page: as many digits as mean something, the same for all of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..evaluation.records import Value

NONE = "–"
THIN = "\u202f"  # narrow no-break space, between a number and its unit


def decimals(values: Sequence[Value]) -> int:
    """Digits after the point that a row needs: two of the smallest standard error, else four significant digits of the
    smallest number."""
    errors = [value.error for value in values if value.error]
    if errors:
        return max(0, min(6, 1 - math.floor(math.log10(min(errors)))))
    sizes = [abs(value.value) for value in values if value.value]
    return max(0, min(6, 3 - math.floor(math.log10(min(sizes))))) if sizes else 0


def fixed(value: Value, digits: int) -> str:
    """9.731 ± 0.042"""
    text = f"{value.value:,.{digits}f}".replace("-", "−")
    return text if value.error is None else f"{text} ± {value.error:.{digits}f}"


def change(value: float, original: float | None) -> str:
    """+5.4 %, relative to the original."""
    if original is None or not original:
        return ""
    share = 100 * (value / original - 1)
    if abs(share) >= 1000:
        return f"×{THIN}{value / original:,.0f}"
    return f"{share:+.1f}{THIN}%".replace("-", "−")


def share(part: float, whole: float | None) -> str:
    """35.6 %"""
    return f"{100 * part / whole:.1f}{THIN}%" if whole else ""


def significant(value: float | None, digits: int = 3) -> str:
    """Without an exponent down to 10^-5."""
    if value is None:
        return NONE
    if not value or 1e-5 <= abs(value) < 1e6:
        places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
        return f"{value:,.{places}f}".replace("-", "−")
    return f"{value:.{digits - 1}e}".replace("-", "−")


def places(value: float | None, digits: int) -> str:
    """With so many digits after the point, so that a column is aligned."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", "−")


def option(value: object) -> str:
    """The value of an option, as one would write it in YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(option, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
