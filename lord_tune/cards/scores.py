"""What `evaluate` measured, in a card that is there: a table, and metadata as the Hub reads it (model-index)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation.records import Measured, Value, measured_in
from ..storage import write_json, write_text
from .base import PLACE, code, table

_TASK = "text-generation"
_BEGIN, _END = "<!-- lord_tune: measured -->", "<!-- lord_tune: end of measured -->"


def section(measured: Measured | None) -> str:
    """The part of a card that is written anew when something is measured."""
    if measured is None:
        body = "Not measured yet. To measure it, and to put the figures here:\n\n" + code(
            "bash", f"lord-tune evaluate {PLACE} --text HELDOUT.jsonl --json {PLACE}/evaluate.json"
        )
    else:
        rows = [[name, shown(value)] for name, value in _named(measured).items()]
        body = table(["measured by `lord-tune evaluate`", "± standard error, or interval of 95 %"], rows)
    return f"## Quality\n\n{_BEGIN}\n\n{body}\n{_END}\n"


def _named(measured: Measured) -> dict[str, Value]:
    found = {f"perplexity, {Path(name).name}": value for name, value in measured.perplexity.items()}
    for name, value in measured.original.items():
        found[f"perplexity of the original, {Path(name).name}"] = value
    found |= {f"KL to the original, {Path(name).name}": value for name, value in measured.kl.items()}
    return found | dict(measured.scores)


def shown(value: Value) -> str:
    """9.731 ± 0.042, or 0.31 (0.25 to 0.37)"""
    if value.error is not None:
        return f"{value.value:.4g} ± {value.error:.2g}"
    if value.interval is not None:
        return f"{value.value:.4g} ({value.interval[0]:.3g} to {value.interval[1]:.3g})"
    return f"{value.value:.4g}"


def write_measured(path: Path, result: dict[str, Any], model: str) -> None:
    """The JSON file of an evaluation; where it lies in the folder of the model that was measured, its card follows."""
    write_json(path, result)
    folder = path.resolve().parent
    if Path(model).expanduser().resolve() == folder:
        update(folder)


def update(folder: Path) -> None:
    """Put all that was measured of a folder into its card; a card that lord_tune did not write stays as it is."""
    from huggingface_hub import ModelCard

    file, measured = folder / "README.md", measured_in(folder).measured
    if measured is None or not file.is_file():
        return
    content = file.read_text(encoding="utf-8")
    if content.count(_BEGIN) != 1 or content.count(_END) != 1 or not content.startswith("---"):
        return
    before, rest = content.split(f"## Quality\n\n{_BEGIN}")
    after = rest.split(_END)[1].removeprefix("\n")
    card: Any = ModelCard(before + section(measured) + after)
    title = next((line[2:] for line in card.text.splitlines() if line.startswith("# ")), folder.name)
    card.data.model_name, card.data.eval_results = title, _eval_results(measured)
    write_text(file, str(card))


def _eval_results(measured: Measured) -> list[Any]:
    """Perplexities and scores; the Hub wants a data set of each, which is the file or the task."""
    from huggingface_hub import EvalResult

    found = []
    for text, value in measured.perplexity.items():
        name = Path(text).name
        found.append(EvalResult(_TASK, name, name, "perplexity", value.value))
    for label, value in measured.scores.items():
        task, _, metric = label.rpartition(", ")
        found.append(EvalResult(_TASK, task, task, metric, value.value))
    return found
