"""Windows of text from several sources, as many of each as its weight says.

A window holds text of one source. Calibration and held-out windows are shared out by the largest remainder, and each
source gets at least one of either: what is decided by held-out error is decided on all of them. Where a weight is less
than one window, its source therefore has more than its share; what each really has is reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from ..errors import LordWarning
from ..protocols import Tokenizer
from .corpus import fill_windows


@dataclass(frozen=True)
class Part:
    """What one source gives. Token ids, (window, length) each."""

    calibration: Tensor
    heldout: Tensor


class SourceShare(TypedDict):
    """What one source was asked for and gave."""

    asked_weight: float  # of all calibration tokens
    weight: float  # really
    tokens: int
    heldout_tokens: int


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` things shared out by weight: the largest remainders get what is left, the first of equal ones, and each
    gets at least one. `count` is at least the number of weights."""
    assert count >= len(weights), "one for each"
    quotas = [weight * count / sum(weights) for weight in weights]
    found = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(found)), key=lambda i: found[i] - quotas[i])
    for index in by_remainder[: count - sum(found)]:
        found[index] += 1
    while 0 in found:  # at the cost of whoever has most above its quota
        most = max((i for i in range(len(found)) if found[i] > 1), key=lambda i: found[i] - quotas[i])
        found[most] -= 1
        found[found.index(0)] = 1
    return found


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """All windows in an order of which every beginning holds the parts in proportion, to within a window of each."""
    places = [((2 * j + 1) / len(part), i, j) for i, part in enumerate(parts) for j in range(len(part))]
    return torch.stack([parts[i][j] for _, i, j in sorted(places)])


def even_sample(parts: Sequence[Tensor], count: int) -> Tensor:
    """`count` windows evenly over each part, in proportion and at least one of each; all where there are fewer."""
    count = max(len(parts), min(count, sum(map(len, parts))))
    taken = zip(parts, shares([len(part) for part in parts], count), strict=True)
    return interleaved([part[torch.linspace(0, len(part) - 1, number).long()] for part, number in taken])


def mixed_windows(
    texts: Mapping[str, list[str]],  # source -> its documents
    weights: Mapping[str, float],  # source -> its share; add up to 1
    tokenizer: Tokenizer,
    windows: int,
    heldout: int,
    length: int,
    seed: int,
) -> dict[str, Part]:
    """source -> its windows, by `fill_windows`. Raises CalibrationError, naming it, for a source that does not fill one
    window of each; a warning names one that falls short of its share, which nobody takes over."""
    asked = list(zip(texts, shares([*weights.values()], windows), shares([*weights.values()], heldout), strict=True))
    parts = {
        name: Part(*fill_windows(texts[name], tokenizer, own * length, held * length, length, seed, name))
        for name, own, held in asked
    }
    given = describe(parts, weights)
    for name, own, _ in asked:
        found = len(parts[name].calibration)
        if found < own:
            warnings.warn(
                f"{name} fills {found} of its {own} windows of {length} tokens; all of it is used, and its weight is "
                f"{given[name]['weight']:.1%} in place of {weights[name]:.1%}.",
                LordWarning,
                stacklevel=2,
            )
    return parts


def describe(parts: Mapping[str, Part], weights: Mapping[str, float]) -> dict[str, SourceShare]:
    """source -> what it was asked for and gave."""
    total = sum(part.calibration.numel() for part in parts.values())
    return {
        name: {
            "asked_weight": weights[name],
            "weight": part.calibration.numel() / total,
            "tokens": part.calibration.numel(),
            "heldout_tokens": part.heldout.numel(),
        }
        for name, part in parts.items()
    }


def in_words(mixture: Mapping[str, SourceShare]) -> str:
    """code.jsonl (50.0 %, 8,192 tokens) and prose.txt (50.0 %, 8,192 tokens)"""
    told = [f"{name} ({100 * share['weight']:.1f} %, {share['tokens']:,} tokens)" for name, share in mixture.items()]
    return " and ".join([", ".join(told[:-1]), told[-1]])
