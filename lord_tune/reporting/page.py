"""The page: everything that is shown of some runs, put into page.html by jinja2, which escapes all text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from typing import Any

from .. import __version__
from . import figures, tables
from .numbers import NONE
from .parts import PARTS
from .results import ORIGINAL, results
from .runs import DECOMPOSED, TRAINED, Layer, Run

GENERATOR = "lord_tune report"  # by which a page is known again
_ROWS = 3000  # of the table of all layers


@dataclass(frozen=True)
class Column:
    """A run with its colour and what is shown of it alone."""

    run: Run
    colour: int
    sentence: str
    facts: list[tuple[str, str]]
    kinds: tables.Table | None = None
    every: tables.Table | None = None
    cut: str = ""
    maps: Sequence[figures.Figure] = ()
    spectra: Sequence[figures.Figure] = ()
    beside: str = ""  # what the spectra are of


def page_of(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """(HTML in ASCII, the sentences about what is not shown)"""
    columns = [_column(run, index) for index, run in enumerate(runs)]
    colours = {run.label: index for index, run in enumerate(runs)}
    shown = _shown(runs, columns, colours)
    missing = _missing(runs, shown)
    names = {
        "results": "Before and after",
        "options": "Options",
        "parts": "Bytes by part",
        "layered": "Layers",
        "errors": "Errors over depth",
        "curves": "Training",
        "samples": "Samples",
    }
    places = {"layered": "layers", "curves": "training"}
    contents = [("done", "What was done")]
    contents += [(places.get(key, key), name) for key, name in names.items() if shown[key]]
    labels = [run.label for run in runs]
    title = labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
    text = _template().render(
        title=f"Report: {title}",
        subtitle=f"Written on {date.today().isoformat()} by lord_tune {__version__}, from the records of the runs.",
        generator=f"{GENERATOR} {__version__}",
        contents=contents + ([("missing", "Not in this report")] if missing else []),
        columns=columns,
        missing=missing,
        footer=_footer(runs),
        none=NONE,
        **shown,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii"), missing


def _template() -> Any:
    import jinja2

    source = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source)


def _shown(runs: Sequence[Run], columns: Sequence[Column], colours: dict[str, int]) -> dict[str, Any]:
    verbs = dict.fromkeys(run.verb for run in runs if run.verb in ("decompose", "correct", "train"))
    found = [(verb, tables.options(runs, verb)) for verb in verbs if verb is not None]
    errors = figures.errors(runs, colours)
    return {
        "results": _with_rows(results(runs)),
        "options": [(verb, content) for verb, content in found if content is not None],
        "parts": tables.parts(runs),
        "parts_figure": figures.parts(runs, PARTS),
        "layered": [column for column in columns if column.kinds is not None],
        "errors": errors,
        "with_errors": [column for column in columns if _has_errors(column.run.layers)],
        "curves": figures.curves(runs, colours),
        "trained": [column for column in columns if column.run.training.get("history")],
        "samples": _samples(runs),
    }


def _with_rows(table: tables.Table) -> tables.Table | None:
    return table if table.rows else None


def _has_errors(layers: Sequence[Layer]) -> bool:
    return any(layer.calibrated is not None and layer.rank is not None for layer in layers)


def _column(run: Run, index: int) -> Column:
    sentence, facts = tables.done(run), _facts(run)
    if not run.layers:
        return Column(run, index, sentence, facts)
    backbones = {layer.backbone for layer in run.layers if layer.rank is not None}
    cut = f"The first {_ROWS:,} of {len(run.layers):,} layers." if len(run.layers) > _ROWS else ""
    return Column(
        run,
        index,
        sentence,
        facts,
        tables.by_kind(run.layers),
        tables.every_layer(run.layers[:_ROWS]),
        cut,
        figures.maps(run, f"map-{index}"),
        figures.spectra(run, f"spectrum-{index}", index),
        ", in the norm of the method"
        if backbones == {"none"}
        else ", beside the Q that was chosen, in the method's norm",
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """Where it came from."""
    base = run.base
    found = [("result", str(run.path))]
    if base.get("name"):
        digest = f", sha256 {str(base['sha256'])[:16]}…" if base.get("sha256") else ""
        revision = f", revision {base['revision']}" if base.get("revision") else ""
        found.append(("original", f"{base['name']}{revision}{digest}"))
    tokens = run.calibration.get("heldout_tokens")
    if tokens:
        found.append(("held out", f"{tokens:,} tokens, in windows of {run.calibration.get('context_length')}"))
    if run.measured is not None and run.measured.tokens:
        counts = ", ".join(f"{count:,} of {name}" for name, count in run.measured.tokens.items())
        found.append(("measured on", f"tokens: {counts}"))
    names = ("lord_tune", "torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{name} {run.versions[name]}" for name in names if name in run.versions)
    return found + ([("versions", versions)] if versions else [])


def _samples(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """prompt -> the answers of the runs that were asked it."""
    found = []
    for prompt in dict.fromkeys(prompt for run in runs for prompt in run.samples):
        before = dict.fromkeys(run.samples_before[prompt] for run in runs if prompt in run.samples_before)
        answers = [(ORIGINAL, answer) for answer in before]
        found.append((prompt, answers + [(run.label, run.samples[prompt]) for run in runs if prompt in run.samples]))
    return found


def _missing(runs: Sequence[Run], shown: dict[str, Any]) -> list[str]:
    """A sentence for every part of the page that is not there, or not of every run."""
    found = []
    unmeasured = [run.label for run in runs if run.measured is None]
    if unmeasured:
        found.append(
            f"Perplexity and scores of {_listed(unmeasured)}: no record of evaluate lies in the folder; evaluate with "
            "json set to a file in it, and write the report again."
        )
    layered = [run for run in runs if run.layers]
    no_spectra = [run.label for run in layered if not any(layer.spectrum for layer in run.layers)]
    if no_spectra:
        found.append(f"Spectra of {_listed(no_spectra)}: not recorded.")
    no_errors = [run.label for run in layered if not _has_errors(run.layers)]
    if no_errors:
        found.append(f"Errors of the layers of {_listed(no_errors)}: not recorded; they need calibration text.")
    if layered and not shown["errors"] and len(no_errors) < len(layered):
        found.append("Errors over depth: the layers are not in numbered blocks, so that there is no depth.")
    flat = [run.label for run in layered if not figures.maps(run, "x")]
    if flat:
        found.append(f"Maps of ranks and bits of {_listed(flat)}: they are the same in all layers that have a place.")
    if not shown["curves"]:
        trained = any(run.stage == TRAINED for run in runs)
        why = "fewer than two losses were logged" if trained else "no training run is among the results"
        found.append(f"Loss curves: {why}.")
    if not shown["samples"]:
        found.append("Samples: no JSON file of chat, and none of evaluate with samples, lies in the folders.")
    if any(run.stage == DECOMPOSED and not run.parts for run in runs):
        found.append("Bytes by part: there are no files of tensors in the folder.")
    return found


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _footer(runs: Sequence[Run]) -> str:
    return f"{len(runs)} result{'s' if len(runs) > 1 else ''}: {', '.join(str(run.path) for run in runs)}"
