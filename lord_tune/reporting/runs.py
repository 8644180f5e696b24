"""What a report knows of one result: read from the records that the verbs left in its folder, and from nothing else.

Nothing is loaded and nothing is computed anew, so a report takes seconds and shows what was measured when it was made.
A record of another version may lack keys: what is not there is None or empty, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evaluation.records import Measured, is_measured, measured_in, measured_of, samples_in
from ..factorizations import Curve
from ..integrations.files import RUN_FILE
from ..layers import place_of
from ..storage import read_json
from .parts import bytes_by_part
from .trained import base_of, repeated_command

DECOMPOSED, TRAINED, EXPORTED, MEASURED = "decomposed", "trained", "exported", "measured"
_DECOMPOSITION, _EXPORT, _RESULTS = "decomposition.json", "export.json", "train_results.json"
DENSE = "dense"  # for the rank of a layer that was left as it was


@dataclass(frozen=True)
class Layer:
    """One linear layer."""

    name: str
    kind: str  # what it is called inside its block; numbers of experts as *
    block: int | None
    shape: tuple[int, ...]
    rank: int | None  # None: left dense
    method: str
    backbone: str
    bits: float | None  # per weight
    calibrated: float | None
    heldout: float | None
    spectrum: Curve | None = None


@dataclass(frozen=True)
class Run:
    """One column of a report."""

    path: Path
    label: str
    stage: str
    command: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # the options
    verb: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)  # name, sha256, revision
    calibration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    totals: Mapping[str, Any] = field(default_factory=dict)
    heldout_losses: Mapping[str, float] = field(default_factory=dict)  # plan -> nats per token
    chosen: str | None = None  # of these plans
    parts: Mapping[str, int] = field(default_factory=dict)  # bytes
    training: Mapping[str, Any] = field(default_factory=dict)  # train_results.json
    comparison: Mapping[str, Any] = field(default_factory=dict)  # of an export with its source
    measured: Measured | None = None
    samples: Mapping[str, str] = field(default_factory=dict)  # prompt -> answer
    samples_before: Mapping[str, str] = field(default_factory=dict)  # of the original
    origin: Path | None = None  # the checkpoint that an adapter was trained on
    notes: tuple[str, ...] = ()  # what is left out, and why


def read_run(name: str) -> Run:
    """UsageError, in one sentence, for what is no result of lord_tune."""
    path = Path(name).expanduser()
    if path.is_file():
        return _measurement(path)
    if not path.exists():
        raise UsageError(f"The result {name} does not exist; check the path.")
    for file, read in ((RUN_FILE, _training), (_DECOMPOSITION, _decomposition), (_EXPORT, _export)):
        if (path / file).is_file():
            return read(path)
    inside = sorted(p.parent.name for f in (RUN_FILE, _DECOMPOSITION, _EXPORT) for p in path.glob(f"*/{f}"))
    hint = f"the folders {', '.join(dict.fromkeys(inside))} in it are" if inside else "pass one that a verb wrote"
    raise UsageError(
        f"{name} is no result of lord_tune, as it holds neither {_DECOMPOSITION} nor {RUN_FILE} nor {_EXPORT}; {hint}."
    )


def _record(path: Path, *wanted: str) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or any(not isinstance(content.get(key), dict) for key in wanted):
        keys = f" with {' and '.join(wanted)}" if wanted else ""
        raise UsageError(f"{path} is not a record that lord_tune wrote; expected a JSON object{keys}.")
    return content


def _measurement(path: Path) -> Run:
    if path.suffix != ".json" or not is_measured(content := read_json(path)):
        raise UsageError(
            f"{path} is no result of lord_tune; pass a folder that a verb wrote, or a JSON file of lord_tune.evaluate."
        )
    measured = measured_of(content)
    base = {"name": measured.model} if measured.model else {}
    return Run(path, path.stem, MEASURED, base=base, measured=measured)


def _decomposition(path: Path) -> Run:
    record = _record(path / _DECOMPOSITION, "layers", "config", "totals")
    layers = layers_of(record["layers"])
    found, (samples, before) = measured_in(path), samples_in(path)
    quantized = "quantized" in record  # by `correct`
    return Run(
        path,
        path.resolve().name,
        DECOMPOSED,
        command=record.get("command"),
        config=record["config"],
        verb="correct" if quantized else "decompose",
        base=record.get("base") or {},
        calibration=record.get("calibration") or {},
        versions=record.get("versions") or {},
        layers=layers,
        totals=record["totals"],
        heldout_losses=record.get("heldout_losses") or {},
        chosen="corrected" if quantized else record.get("refined"),
        parts=bytes_by_part(path, {layer.name: layer.rank is not None for layer in layers}),
        measured=found.measured,
        samples=samples,
        samples_before=before,
        notes=found.notes,
    )


def _training(path: Path) -> Run:
    config = _record(path / RUN_FILE)
    results = _record(path / _RESULTS) if (path / _RESULTS).is_file() else {}
    notes = [] if results else ["The training run has not finished, so it has no losses and no adapter of its own yet."]
    origin, said = base_of(path, config)
    found, (samples, before) = measured_in(path), samples_in(path)
    adapter = path / "adapter_model.safetensors"
    base = read_run(str(origin)) if origin is not None else None
    return Run(
        path,
        path.resolve().name,
        TRAINED,
        command=repeated_command(config),
        config=config,
        verb="train",
        base=base.base if base else {},
        totals={"adapter_bytes": adapter.stat().st_size} if adapter.is_file() else {},
        training=results,
        measured=found.measured,
        samples=samples,
        samples_before=before,
        origin=origin,
        notes=(*notes, *said, *found.notes),
    )


def _export(path: Path) -> Run:
    record = _record(path / _EXPORT, "comparison")
    manifest: Any = {}
    if (path / "config.json").is_file():
        manifest = _record(path / "config.json").get("quantization_config") or {}
    layers = layers_of(manifest["layers"]) if manifest.get("quant_method") == "lord" else ()
    found, (samples, before) = measured_in(path), samples_in(path)
    return Run(
        path,
        path.resolve().name,
        EXPORTED,
        command=record.get("command"),
        config={key: record.get(key) for key in ("source", "format", "dtype")},
        verb="export",
        versions=record.get("versions") or {},
        layers=layers,
        totals={"model_bytes": record["bytes"]} if isinstance(record.get("bytes"), int) else {},
        parts=bytes_by_part(path, {layer.name: True for layer in layers}),
        comparison=record["comparison"],
        measured=found.measured,
        samples=samples,
        samples_before=before,
        notes=found.notes,
    )


def layers_of(entries: Mapping[str, Mapping[str, Any]]) -> tuple[Layer, ...]:
    """From decomposition.json, or from a manifest, which knows no errors and lists no dense layers."""
    several = len({place_of(name)[0] for name in entries if place_of(name)[1] is not None}) > 1
    found = []
    for name, entry in entries.items():
        before, block, kind = place_of(name)
        rank = entry.get("rank")
        found.append(
            Layer(
                name=name,
                kind=f"{before} {kind}" if several and block is not None else kind,
                block=block,
                shape=tuple(entry.get("shape") or ()),
                rank=rank if isinstance(rank, int) else None,
                method=str(entry.get("method", DENSE)),
                backbone=str(entry.get("backbone", "none")),
                bits=number(entry.get("bits_per_weight")),
                calibrated=None if rank == DENSE else number(entry.get("error_calibrated")),
                heldout=None if rank == DENSE else number(entry.get("error_heldout")),
                spectrum=entry.get("spectrum"),
            )
        )
    return tuple(found)


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
