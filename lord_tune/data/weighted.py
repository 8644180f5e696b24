"""Sources of text with weights, as `calibration` takes them: code.jsonl:0.5 prose.txt:0.5.

Behind its last colon a source may have a positive number: its share of the text, relative to those of the others. A
file or folder of exactly this name comes first, so `notes:2` is a file where there is one. A name that goes on behind
its colon with anything else is a name (C:\\code.jsonl), and so is C:2, on the drive C.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError


@dataclass(frozen=True)
class Source:
    """A file, folder or Hub dataset, and its share of the text."""

    name: str  # as load_rows takes it
    weight: float | None  # of all text, the weights of all sources add up to 1; None where no source has one


def weighted_sources(given: list[str]) -> list[Source]:
    """The sources and their weights, of all or of none; UsageError for a weight that is none or has no effect."""
    found = [_split(text) for text in given]
    if all(source.weight is None for source in found):
        return found
    for source in found:
        if source.weight is None:
            raise UsageError(
                f"{source.name} in `calibration` has no weight and other sources have one; give each a weight "
                "(FILE:NUMBER), or none."
            )
    if len(found) == 1:
        raise UsageError(
            f"The weight of {found[0].name} has no effect where `calibration` has no other source; write "
            f"{found[0].name}, or add another source."
        )
    seen: set[Path] = set()
    for source in found:
        path = Path(source.name).expanduser().resolve()
        if path in seen:
            raise UsageError(f"{source.name} stands twice in `calibration`; give it once, with the sum of its weights.")
        seen.add(path)
    weights = [source.weight for source in found if source.weight is not None]
    relative = [weight / max(weights) for weight in weights]  # the sum of large numbers may be infinite
    return [Source(source.name, weight / sum(relative)) for source, weight in zip(found, relative, strict=True)]


def names_of(given: list[str]) -> list[str]:
    """The sources without their weights."""
    return [source.name for source in weighted_sources(given)]


def _split(text: str) -> Source:
    """A source with the weight as it is written."""
    name, _, number = text.rpartition(":")
    if not name or _exists(text) or re.search(r"[/\\]", number):
        return Source(text, None)
    if re.fullmatch("[A-Za-z]", name) and not _exists(name):
        return Source(text, None)  # a drive
    try:
        weight = float(number)
    except ValueError:
        if not _exists(name):
            return Source(text, None)
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise UsageError(f"Got the weight '{number}' of {name} in `calibration`; expected a positive number.")
    return Source(name, weight)


def _exists(name: str) -> bool:
    return Path(name).expanduser().exists()
