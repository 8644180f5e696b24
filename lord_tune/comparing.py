"""`lord-tune compare`: several methods on one model at the same bytes, in one table, one plot and one JSON.

A row is one run of `decompose` at the common size, measured on the texts by `evaluate` and, with `steps`, trained and
measured again. Rows differ in what their words say and in nothing else: the calibration text, its tokens, the storage
of L and R, the seed and the training are the same. A size is turned into bits per weight of the layers to decompose,
from the shapes, before any row is run; what a row then stores is in the table.

Finished rows are files in OUT/rows, so that the same command continues after a break; other options are refused.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

import yaml

from .commands import decompose, evaluate, train
from .comparison_plot import draw
from .config import CompareConfig, DecomposeConfig
from .console import human_bytes, note, say, show_table, size_of
from .data.files import local_paths
from .data.weighted import names_of
from .decomposition.decide import decide
from .decomposition.survey import Survey, survey
from .dry_run import show_dry_run
from .errors import LordError, LordWarning, UsageError, unknown_name
from .factorizations import METHODS
from .integrations.checkpoint import skeleton
from .integrations.destination import protect
from .integrations.models import quiet
from .integrations.running import run_model
from .integrations.sources import resolve_model
from .keywords import documented
from .layers.sizes import sizes
from .provenance import command_line, identity_of, versions
from .resolve import check_formats, request_of, rest_of
from .signatures import CompareOptions
from .storage import check_destination, read_json, sole_writer, write_json

RECORD = "report.json"  # a folder with it is ours
_WORDS: dict[str, dict[str, Any]] = {
    "lord": {"allocation": "loss_weighted"},
    "rounding": {"allocation": "mixed", "rank": 0},
    "mixed": {"allocation": "mixed"},
}
_SET_FOR_ALL = ("kept_fraction", "bits_per_weight", "max_bytes", "calibration_tokens", "context_length", "seed")


@documented(CompareConfig)
def compare(model: str, out: str, **options: Unpack[CompareOptions]) -> dict[str, Any]:
    """Several methods at the same bytes; returns the content of OUT/report.json.

    OUT/comparison.png and .svg show perplexities; OUT/<row> holds each checkpoint, and its training output.
    """
    config = CompareConfig.build({"model": model, "out": out, **options})
    read = [*names_of(config.calibration), *config.text, config.dataset_name]
    if config.dry_run:
        return show_dry_run(config, [config.model], read)
    quiet()
    folder = Path(config.out)
    protect(folder, [config.model], read, config.overwrite)
    with sole_writer(folder):
        return _compare(config, folder)


def _compare(config: CompareConfig, out: Path) -> dict[str, Any]:
    """All rows, in a folder that nobody else writes."""
    source = resolve_model(config.model)
    shape = skeleton(source, config.dtype)
    found = survey(shape, config.targets, config.exclude, run_model)
    rest = rest_of(sizes(shape), found)
    bits = _bits(config, found, rest)
    rows = {word: _row(config, word, out, bits) for word in dict.fromkeys(config.methods)}
    for word, row in rows.items():
        _check(word, row, found, rest)
    same = _same(config, source, bits)
    _open(out, same, config.overwrite)
    say(f"{len(rows)} rows at {bits:.3f} bits per weight of the linears, {human_bytes(_bytes(bits, found, rest))} each")
    (out / "rows").mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"compared": same, "command": command_line("compare", config), "versions": versions()}
    report |= {"bits_per_weight": bits, "rows": {}}
    write_json(out / RECORD, report)
    report["dense"] = _once(out, "dense", lambda: {"start": _measured(config, config.model)})
    for word, row in rows.items():
        try:
            report["rows"][word] = _once(out, _folder(word), lambda row=row: _run(config, row))  # type: ignore[misc]
        except LordError as error:
            report["rows"][word] = {"error": str(error)}
            warnings.warn(f"The row {word} failed and is left out: {error}", LordWarning, stacklevel=2)
        write_json(out / RECORD, report)
    _show(config, report)
    files = [out / f"comparison.{kind}" for kind in ("png", "svg")]
    if any("start" in row for row in report["rows"].values()):
        draw(report, [Path(name).name for name in config.text], files, f"{config.model}, {bits:.2f} bits per weight")
        say(f"wrote {', '.join(map(str, files))} and {out / RECORD}")
    return report


# ---- before any work ---


def _bits(config: CompareConfig, found: Survey, rest: int) -> float:
    """The size in bits per weight of the layers to decompose; UsageError for one that is none."""
    weights = sum(site.numbers for site in found.layers.values())
    if config.bits_per_weight is not None:
        return config.bits_per_weight
    if config.kept_fraction is not None:
        return 8.0 * config.kept_fraction * sum(site.dense_bytes for site in found.layers.values()) / weights
    limit = size_of(config.max_bytes or "") or 0
    if limit <= rest:
        raise UsageError(
            f"Got `max_bytes` {config.max_bytes}; what is not decomposed (embeddings, norms, head) has "
            f"{human_bytes(rest)} alone."
        )
    return 8.0 * (limit - rest) / weights


def _bytes(bits: float, found: Survey, rest: int) -> int:
    return int(bits / 8 * sum(site.numbers for site in found.layers.values())) + rest


def _row(config: CompareConfig, word: str, out: Path, bits: float) -> DecomposeConfig:
    """The run of `decompose` that a row's words stand for."""
    name, *settings = word.split(":")
    options = dict(_WORDS[name]) if name in _WORDS else {"method": name}
    if name not in _WORDS and name not in METHODS:
        raise unknown_name("method", name, [*_WORDS, *METHODS])
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key in _SET_FOR_ALL:
            why = "which is the same for all rows" if equals else "without a value"
            raise UsageError(f"The row {word} has '{setting}', {why}; write options like backbone=nf4.")
        options[key] = yaml.safe_load(value)
    method = METHODS.get(name)
    if method is not None and "backbone" not in options and not (method.needs_backbone or method.alternates):
        # of L R alone; method.needs may depend on its options
        weighs = "input_gram" in method().needs
        options = {"allocation": "loss_weighted" if weighs else "uniform"} | options
    options = {"factor_format": config.factor_format} | options
    common = {
        "model": config.model,
        "out": str(out / _folder(word) / "base"),
        "bits_per_weight": bits,
        "calibration": config.calibration,
        "calibration_tokens": config.calibration_tokens,
        "context_length": config.context_length,
        "seed": config.seed,
        **{name: getattr(config, name) for name in config.given("targets", "exclude", "dtype")},
    }
    try:
        return DecomposeConfig.build(_without_text(common | options))
    except UsageError as error:
        raise UsageError(f"The row {word} cannot be run: {error}") from error


def _without_text(options: dict[str, Any]) -> dict[str, Any]:
    """Less the calibration of methods that use none, which would be refused."""
    text = ("calibration", "calibration_tokens", "context_length")
    bare = {key: value for key, value in options.items() if key not in text}
    try:
        needs = DecomposeConfig.build(bare).needs_text
    except UsageError:  # it says itself what is missing
        needs = True
    return options if needs else bare


def _check(word: str, row: DecomposeConfig, found: Survey, rest: int) -> None:
    """Refuse a size that the row cannot have, before anything is run."""
    try:
        check_formats(row)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LordWarning)  # decompose says them
            decide(found.layers, request_of(row), rest)
    except UsageError as error:
        raise UsageError(f"The row {word} cannot be run: {error}") from error


def _same(config: CompareConfig, source: str, bits: float) -> dict[str, Any]:
    """What all rows of a folder have in common."""
    free = ("out", "methods", "overwrite", "dry_run", "kept_fraction", "max_bytes", "bits_per_weight")
    own = {key: value for key, value in config.model_dump().items() if key not in free}
    files = [*names_of(config.calibration), *config.text, *([config.dataset_name] if config.dataset_name else [])]
    return own | {"bits": bits, "base": identity_of(config.model, source), "files": _digests(files)}


def _digests(names: Iterable[str]) -> dict[str, str]:
    """sha256 of local files."""
    found = {}
    for path in (path for name in names for path in local_paths(name)):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _open(out: Path, same: dict[str, Any], overwrite: bool) -> None:
    """Continue a comparison of the same options, or begin one."""
    if not overwrite and (out / RECORD).is_file() and "compared" in read_json(out / RECORD):
        earlier = read_json(out / RECORD)["compared"]
        other = [key for key in same if same[key] != earlier.get(key)]
        if other:
            raise UsageError(
                f"{out} holds a comparison that differs in '{other[0]}'; choose another folder or pass `overwrite`."
            )
        note(f"continuing the comparison in {out}")
        return
    check_destination(out, overwrite)
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)


# ---- the rows ---


def _folder(word: str) -> str:
    """The name of a row's files: its words, and what tells apart those that look alike in them."""
    plain = re.sub(r"[^\w.=-]+", "_", word)
    return plain if plain == word else f"{plain}-{hashlib.sha256(word.encode()).hexdigest()[:6]}"


def _once(out: Path, name: str, measure: Any) -> dict[str, Any]:
    path = out / "rows" / f"{name}.json"
    if not path.is_file():
        say()
        say(f"=== {name}")
        write_json(path, measure())
    return dict(read_json(path))


def _measured(config: CompareConfig, model: str) -> dict[str, Any]:
    """Losses on the texts, in their order; sizes and speed."""
    found = evaluate(model, config.text, context_length=config.context_length, max_tokens=config.max_tokens)
    losses = [found["texts"][text]["loss"] for text in config.text]
    kept = ("parameters", "model_bytes", "linear_bits_per_weight", "tokens_per_second")
    return {"losses": losses, "tokens": [found["texts"][text]["tokens"] for text in config.text]} | {
        key: found[key] for key in kept
    }


def _run(config: CompareConfig, row: DecomposeConfig) -> dict[str, Any]:
    """Decompose, measure; train, measure."""
    base = Path(row.out)
    given = row.model_dump(exclude_unset=True, by_alias=True) | {"resume": False, "overwrite": base.exists()}
    report = decompose(**given)
    totals = report["totals"]
    found = {
        "options": {key: value for key, value in given.items() if key not in ("resume", "overwrite")},
        "seconds": totals["seconds"],
        "peak_memory_bytes": totals["peak_memory_bytes"],
        "error_heldout": _mean(report["layers"], "error_heldout"),
        "start": _measured(config, str(base)),
    }
    if not config.steps:
        return found
    trained = []
    for rate in config.rates():
        out = base.parent / f"trained-{rate:g}"
        shutil.rmtree(out, ignore_errors=True)  # of a comparison that was stopped
        start = time.perf_counter()
        train(
            model_name_or_path=str(base),
            output_dir=str(out),
            dataset_name=config.dataset_name or names_of(config.calibration)[0],
            max_steps=config.steps,
            learning_rate=rate,
            max_length=config.max_length,
            packing=True,
            per_device_train_batch_size=1,
            logging_steps=max(1, config.steps // 4),
            save_strategy="no",
            disable_tqdm=True,
            seed=config.seed,
        )
        seconds = time.perf_counter() - start
        trained.append({"learning_rate": rate, "seconds": seconds, **_measured(config, str(out))})
    return found | {"tried": trained, "end": min(trained, key=lambda run: run["losses"][0])}


def _mean(layers: dict[str, dict[str, Any]], key: str) -> float | None:
    """Over the layers that have it; each is relative to its layer."""
    values = [entry[key] for entry in layers.values() if entry.get(key) is not None]
    return sum(values) / len(values) if values else None


# ---- what is shown ---


def _show(config: CompareConfig, report: dict[str, Any]) -> None:
    names = [Path(name).name for name in config.text]
    columns = ["", "bytes", "bits/weight", "error", *names, "minutes", "memory"]
    rows = [_line("as it is", report["dense"], "start")]
    for word, row in report["rows"].items():
        if "error" in row:
            rows.append([word, *["-"] * (len(columns) - 1)])
            continue
        rows.append(_line(word, row, "start"))
        if "end" in row:
            rows.append(_line(f"  {config.steps} steps, {row['end']['learning_rate']:g}", row, "end"))
    say()
    show_table("perplexity on held-out text", columns, rows)
    sized = {word: row["start"]["model_bytes"] for word, row in report["rows"].items() if "start" in row}
    if sized:
        small, large = min(sized, key=sized.__getitem__), max(sized, key=sized.__getitem__)
        if sized[large] > 1.01 * sized[small]:
            less = 1 - sized[small] / sized[large]
            note(f"{small} stores {less:.1%} less than {large}, because no format and rank of it is nearer")
    say("error: of the outputs on held-out calibration text, mean over layers (- for methods that use no text).")
    if config.steps:
        say("After training L and R are in float32; bytes are those of the decomposition.")


def _line(name: str, row: dict[str, Any], which: str) -> list[str]:
    own, start = row[which], row["start"]
    perplexities = [f"{math.exp(min(loss, 80)):.3f}" for loss in own["losses"]]
    error = row.get("error_heldout") if which == "start" else None
    seconds = own["seconds"] if which == "end" else row.get("seconds")
    memory = row.get("peak_memory_bytes") if which == "start" else None
    return [
        name,
        human_bytes(start["model_bytes"]) if which == "start" else "",
        f"{start['linear_bits_per_weight']:.2f}" if which == "start" else "",
        "" if which == "end" else "-" if error is None else f"{error:.4f}",
        *perplexities,
        "" if seconds is None else f"{seconds / 60:.1f}",
        "" if memory is None else human_bytes(memory),
    ]
