"""What `evaluate` measured and `chat` recorded: the JSON files of the two that lie in a result's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..storage import read_json

_LARGEST = 16 << 20  # bytes of a file that may be such a record
# what counts rows or says how something was measured, and is no score
_NO_SCORES = ("alias", "samples", "n", "count", "rows", "tokens", "seconds", "limit", "seed", "fewshot", "chance")


@dataclass(frozen=True)
class Value:
    """A number and, where it was measured, its standard error."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Measured:
    """One record of `evaluate`, or several of one folder together."""

    perplexity: Mapping[str, Value] = field(default_factory=dict)  # by text
    kl: Mapping[str, Value] = field(default_factory=dict)  # to the original, nats per token, by text
    scores: Mapping[str, Value] = field(default_factory=dict)  # by task and metric
    sizes: Mapping[str, float] = field(default_factory=dict)  # parameters, model_bytes, linear_bits_per_weight
    speed: Mapping[str, float] = field(default_factory=dict)  # tokens_per_second, peak_memory_bytes, context_length
    tokens: Mapping[str, int] = field(default_factory=dict)  # by text
    model: str | None = None

    def merged(self, later: Measured) -> Measured:
        """Both; what both have is the later one's."""
        names = ("perplexity", "kl", "scores", "sizes", "speed", "tokens")
        both = {name: {**getattr(self, name), **getattr(later, name)} for name in names}
        return replace(self, **both, model=later.model or self.model)


@dataclass(frozen=True)
class Found:
    measured: Measured | None
    notes: tuple[str, ...] = ()


def is_measured(content: object) -> bool:
    """Whether it is what `evaluate` writes (or lm_eval's harness, whose results have the same use)."""
    if not isinstance(content, dict):
        return False
    texts = content.get("texts")
    measured = isinstance(texts, dict) and all(isinstance(entry, dict) for entry in texts.values())
    return (measured and "perplexity" in content) or any(isinstance(content.get(k), dict) for k in ("tasks", "results"))


def measured_of(content: Mapping[str, Any]) -> Measured:
    texts = content.get("texts")
    texts = {name: entry for name, entry in texts.items() if isinstance(entry, dict)} if isinstance(texts, dict) else {}
    perplexity, kl = {}, {}
    for name, entry in texts.items():
        found = _value(entry, "perplexity")
        loss = _value(entry, "loss")
        if found is not None and found.error is None and loss is not None and loss.error is not None:
            found = Value(found.value, found.value * loss.error)  # d exp(loss) = exp(loss) d loss
        if found is not None:
            perplexity[name] = found
        if (divergence := _value(entry, "kl")) is not None:
            kl[name] = divergence
    numbers = {key: value for key, value in content.items() if _is_number(value)}
    model = content.get("model")
    return Measured(
        perplexity,
        kl,
        _scores(content),
        {key: numbers[key] for key in ("parameters", "model_bytes", "linear_bits_per_weight") if key in numbers},
        {key: numbers[key] for key in ("tokens_per_second", "peak_rss_bytes", "peak_memory_bytes") if key in numbers},
        {name: int(entry["tokens"]) for name, entry in texts.items() if _is_number(entry.get("tokens"))},
        model if isinstance(model, str) else None,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_ERRORS = ("{}_standard_error", "{}_stderr", "{}_se")


def _value(entry: Mapping[str, Any], key: str) -> Value | None:
    """The number under `key`, with its standard error under any of the usual names; or {value, standard_error}."""
    value = entry.get(key)
    if isinstance(value, Mapping):
        inner = next((k for k in ("value", "mean", key) if _is_number(value.get(k))), None)
        if inner is None:
            return None
        error = next((value[k] for k in ("standard_error", "stderr", "se") if _is_number(value.get(k))), None)
        return Value(float(value[inner]), error)
    if not _is_number(value):
        return None
    assert isinstance(value, int | float)
    error = next((entry[p.format(key)] for p in _ERRORS if _is_number(entry.get(p.format(key)))), None)
    return Value(float(value), error)


def _scores(content: Mapping[str, Any]) -> dict[str, Value]:
    """`tasks` of a record here, or `results` of lm_eval, whose keys are like "acc,none" and "acc_stderr,none"."""
    found: dict[str, Value] = {}
    for block in ("tasks", "results"):
        tasks = content.get(block)
        for task, entry in tasks.items() if isinstance(tasks, dict) else ():
            if _is_number(entry):
                found[task] = Value(float(entry))
            if not isinstance(entry, dict):
                continue
            entry = {key.removesuffix(",none"): value for key, value in entry.items() if isinstance(key, str)}
            single = next((entry[k] for k in ("standard_error", "stderr") if _is_number(entry.get(k))), None)
            keys = [key for key in entry if _is_score(key)]
            for key in keys:
                score = _value(entry, key)
                if score is not None:
                    error = single if score.error is None and len(keys) == 1 else score.error
                    found[f"{task}, {key.replace('_', ' ')}"] = Value(score.value, error)
    return found


def _is_score(key: str) -> bool:
    words = key.split("_")
    return not (set(words) & set(_NO_SCORES) or {"stderr", "error", "se", "version"} & set(words))


def _records(folder: Path) -> list[tuple[Path, Any]]:
    """The JSON files directly in a folder, the oldest first; those that are not JSON are nobody's record."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        if not path.name.startswith(".") and path.stat().st_size <= _LARGEST:
            try:
                found.append((path, read_json(path)))
            except UsageError:
                continue
    return found


def measured_in(folder: Path) -> Found:
    """All that was measured of a result and written into its folder; of two numbers for one thing the newer."""
    found: list[tuple[str, Measured]] = []
    for path, content in _records(folder):
        if is_measured(content):
            found.append((path.name, measured_of(content)))
    if not found:
        return Found(None)
    whole, notes = found[0][1], []
    for name, later in found[1:]:
        twice = [*(whole.perplexity.keys() & later.perplexity.keys()), *(whole.scores.keys() & later.scores.keys())]
        if twice:
            notes.append(
                f"{', '.join(sorted(twice))} was measured more than once; the newest record, {name}, is shown."
            )
        whole = whole.merged(later)
    return Found(whole, tuple(notes))


def samples_in(folder: Path) -> dict[str, str]:
    """prompt -> answer, of what `chat` wrote into the folder."""
    found: dict[str, str] = {}
    for _, content in _records(folder):
        rows = content if isinstance(content, list) else []
        for row in rows:
            if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
                found[row["prompt"]] = row["answer"]
    return found
