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


@dataclass(frozen=True)
class Value:
    """A number and, where they were measured, its standard error or its interval."""

    value: float
    error: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measured:
    """One record of `evaluate`, or several of one folder together."""

    perplexity: Mapping[str, Value] = field(default_factory=dict)  # by text
    kl: Mapping[str, Value] = field(default_factory=dict)  # to the original, nats per token, by text
    agreement: Mapping[str, Value] = field(default_factory=dict)  # tokens with the original's likeliest one, by text
    original: Mapping[str, Value] = field(default_factory=dict)  # the original's perplexity, by text
    scores: Mapping[str, Value] = field(default_factory=dict)  # by task and metric
    sizes: Mapping[str, float] = field(default_factory=dict)  # parameters, model_bytes, linear_bits_per_weight
    speed: Mapping[str, float] = field(default_factory=dict)  # tokens_per_second, peak_memory_bytes, context_length
    tokens: Mapping[str, int] = field(default_factory=dict)  # by text
    model: str | None = None

    def merged(self, later: Measured) -> Measured:
        """Both; what both have is the later one's."""
        names = ("perplexity", "kl", "agreement", "original", "scores", "sizes", "speed", "tokens")
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
    if isinstance(texts, dict) and all(isinstance(entry, dict) for entry in texts.values()):
        return "perplexity" in content or "model_bytes" in content
    return isinstance(content.get("results"), dict) and "n-shot" in content


def measured_of(content: Mapping[str, Any]) -> Measured:
    texts = content.get("texts")
    texts = {name: entry for name, entry in texts.items() if isinstance(entry, dict)} if isinstance(texts, dict) else {}
    perplexity = {name: value for name, entry in texts.items() if (value := _perplexity(entry))}
    beside = {name: entry["original"] for name, entry in texts.items() if isinstance(entry.get("original"), dict)}
    kl = {name: value for name, entry in beside.items() if (value := _value(entry, "kl"))}
    agreement = {name: value for name, entry in beside.items() if (value := _value(entry, "top1_agreement"))}
    original = {name: value for name, entry in beside.items() if (value := _value(entry, "perplexity"))}
    numbers = {key: value for key, value in content.items() if _is_number(value)}
    model = content.get("model")
    return Measured(
        perplexity,
        kl,
        agreement,
        original,
        _scores(content),
        {key: numbers[key] for key in ("parameters", "model_bytes", "linear_bits_per_weight") if key in numbers},
        {key: numbers[key] for key in ("tokens_per_second", "peak_rss_bytes", "peak_memory_bytes") if key in numbers},
        {name: int(entry["tokens"]) for name, entry in texts.items() if _is_number(entry.get("tokens"))},
        model if isinstance(model, str) else None,
    )


def _perplexity(entry: Mapping[str, Any]) -> Value | None:
    found, loss = _value(entry, "perplexity"), _value(entry, "loss")
    if found is not None and found.error is None and loss is not None and loss.error is not None:
        return Value(found.value, found.value * loss.error)  # d exp(loss) = exp(loss) d loss
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_ERRORS = ("{}_standard_error", "{}_stderr")
_INTERVAL = "{}_interval"


def _value(entry: Mapping[str, Any], key: str) -> Value | None:
    """The number under `key`, with its standard error or its interval beside it."""
    value = entry.get(key)
    if not _is_number(value):
        return None
    assert isinstance(value, int | float)
    error = next((entry[p.format(key)] for p in _ERRORS if _is_number(entry.get(p.format(key)))), None)
    ends = entry.get(_INTERVAL.format(key))
    held = isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))
    return Value(float(value), error, (float(ends[0]), float(ends[1])) if held and isinstance(ends, list) else None)


# metrics of lm_eval that come without a standard error where it computes none
_METRICS = ("acc", "acc_norm", "exact_match", "f1", "bleu", "perplexity", "word_perplexity", "byte_perplexity", "mc2")


def _scores(content: Mapping[str, Any]) -> dict[str, Value]:
    """`tasks` of a record here, or `results` of lm_eval, whose keys are like "acc,none" and "acc_stderr,none"."""
    found: dict[str, Value] = {}
    for block in ("tasks", "results"):
        tasks = content.get(block)
        for task, entry in tasks.items() if isinstance(tasks, dict) else ():
            if isinstance(entry, dict):
                entry = {str(key).removesuffix(",none"): value for key, value in entry.items()}
                scores = {key: _value(entry, key) for key in entry if _is_score(key, entry)}
                found |= {f"{task}, {key}": score for key, score in scores.items() if score is not None}
    return found


def _is_score(key: str, entry: Mapping[str, Any]) -> bool:
    beside = [pattern.format(key) in entry for pattern in (*_ERRORS, _INTERVAL)]
    return any(beside) or key in _METRICS or key.startswith("pass@") and not key.endswith("_interval")


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
    notes: list[str] = []
    for path, content in _records(folder):
        if is_measured(content):
            measured = measured_of(content)
            if _of_another(measured.model, folder):
                notes.append(f"{path.name} is a measurement of {measured.model}, not of this folder; it is left out.")
            else:
                found.append((path.name, measured))
    if not found:
        return Found(None, tuple(notes))
    whole = found[0][1]
    for name, later in found[1:]:
        twice = [*(whole.perplexity.keys() & later.perplexity.keys()), *(whole.scores.keys() & later.scores.keys())]
        if twice:
            notes.append(f"{', '.join(sorted(twice))}: measured more than once; the newest record, {name}, is shown.")
        whole = whole.merged(later)
    return Found(whole, tuple(notes))


def _of_another(model: str | None, folder: Path) -> bool:
    """Whether a record names a model that is there and is another one; a folder may have been moved since."""
    return model is not None and Path(model).exists() and Path(model).resolve() != folder.resolve()


def samples_in(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(prompt -> the answer of the model, prompt -> that of its original), of `chat` and `evaluate`."""
    own: dict[str, str] = {}
    original: dict[str, str] = {}
    for _, content in _records(folder):
        measured = is_measured(content)
        rows = content.get("samples") if measured else content
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and isinstance(prompt := row.get("prompt"), str):
                answer, before = row.get("model" if measured else "answer"), row.get("original")
                if isinstance(answer, str):
                    own[prompt] = answer
                    if measured and isinstance(before, str):
                        original[prompt] = before
    return own, original
