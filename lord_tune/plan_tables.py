"""What is printed and written of plans that the calibration text decided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .allocation import Search
from .config import PlanConfig
from .console import LiveTable, human_bytes, say, show_table
from .decomposition import CONTROL, SOLUTION, Compared, Request
from .errors import UsageError
from .integrations.checkpoint import skeleton
from .layers.sizes import sizes
from .planning import Point, sweep
from .plans import Plan
from .storage import check_json_file, write_json
from .sweep_plot import draw
from .tables import LAYER_COLUMNS, LAYER_WIDTHS, layer_rows

_NOT_SWEPT = ("backbone", "allocation", "json", "refine", "measure_control", "recover_epochs", "propagate")
_BUDGETS = ("rank", "average_rank", "kept_fraction", "bits_per_weight", "max_bytes", "plan")


def with_budget(values: dict[str, Any]) -> dict[str, Any]:
    """The options of `plan` with the budget that they leave open: a mixture of everything for a sweep."""
    if values.get("sweep") is not None:
        given = [key for key in (*_BUDGETS, *_NOT_SWEPT) if values.get(key) not in (None, 0, False)]
        if given:
            raise UsageError(f"`sweep` tries budgets and allocators itself and writes files; remove `{given[0]}`.")
        return values | {"bits_per_weight": 8.0, "allocation": "mixed"}
    if values.get("embeddings", "dense") != "dense" and not values.get("sweep"):
        return values
    if values.get("full_rank") or any(values.get(name) is not None for name in _BUDGETS):
        return values
    assumed = {"kept_fraction": 0.9} if values.get("backbone", "none") == "none" else {"rank": 16}
    name, value = next(iter(assumed.items()))
    say(f"no budget was given: planned for --{name.replace('_', '-')} {value}")
    return values | assumed


def backbones_of(chosen: Plan | None) -> str:
    """The backbones of a plan, in words."""
    return "none" if chosen is None else ", ".join(dict.fromkeys(c.backbone for c in chosen.layers.values()))


def show_compared(plan: Plan | None, compared: Compared) -> None:
    """What a plan that was shared out by the loss is made of, and the control at equal bytes."""
    if plan is not None and compared.search is not None:
        _show_search(compared.search)
    own = None if plan is None else plan.predicted_loss()
    if plan is None or own is None:
        return
    say(f"plan: {_in_words(plan.kinds())}; predicted increase of the loss {own:.4f} nats per token")
    control = compared.control
    if control is not None:
        other = control.predicted_loss() or 0.0
        say(f"control, the same bytes without L R: {_in_words(control.kinds())}; predicted {other:.4f}")
    losses = compared.losses
    if losses:
        cells = [[name, f"{loss:.4f}", f"{math.exp(min(loss, 80)):.3f}"] for name, loss in losses.items()]
        show_table("whole models on the held-out text", ["plan", "nats per token", "perplexity"], cells)
        if len(losses) > 1 and compared.chosen != SOLUTION:
            say(f"kept: {compared.chosen}")
        if CONTROL in losses and losses[CONTROL] < losses[compared.chosen]:
            gain = losses[compared.chosen] - losses[CONTROL]
            say(
                f"without L R the same bytes are better here, by {gain:.4f} nats per token; "
                "rank 0 takes the control (L R is also what training changes)"
            )


def _show_search(search: Search) -> None:
    """The best models of a search, best first."""
    values = [search.rule.objective(trial.scores) for trial in search.trials]
    order = sorted(range(len(values)), key=lambda number: values[number])[:5]
    rows = []
    for number in order:
        trial = search.trials[number]
        kept = ", ".join(f"{group} {min(fraction, 1.0):.2f}" for group, fraction in trial.point.items())
        perplexity = math.exp(search.rule.log_perplexity(trial.scores))
        rows.append([str(number), kept, f"{perplexity:.3f}", f"{search.rule.divergence(trial.scores):.4f}"])
    columns = ["trial", "fractions asked for, before the budget", "perplexity", "KL to the original"]
    show_table(f"the best of {len(values)} models on {len(search.windows)} held-out windows", columns, rows)


def show_sweep(points: list[Point], dense_loss: float | None) -> None:
    """A row per plan, smallest first."""
    rows = []
    for point in sorted(points, key=lambda point: point.bytes):
        measured = [] if dense_loss is None else [f"{math.exp(min(point.loss or 0.0, 80)):.3f}"]
        cells = [human_bytes(point.bytes), f"{point.bits_per_weight:.2f}", f"{point.predicted_loss:.4f}", *measured]
        rows.append([f"{point.series}, {point.setting}", *cells])
    columns = ["plan", "checkpoint", "bits/weight", "predicted loss", *([] if dense_loss is None else ["perplexity"])]
    show_table("predicted increase of the loss, nats per token, by size", columns, rows)
    if dense_loss is not None:
        say(f"perplexity of the model as it is on the held-out text: {math.exp(dense_loss):.3f}")


def _in_words(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} layers {kind}" for kind, count in kinds.items())


def write_sweep(config: PlanConfig, source_name: str, request: Request) -> dict[str, Any]:
    """plan --sweep: the files, and their content."""
    assert config.sweep is not None
    files = [Path(f"{config.sweep}.{kind}") for kind in ("json", "png", "svg")]
    for file in files:
        check_json_file(str(file))
    with LiveTable(LAYER_COLUMNS, LAYER_WIDTHS) as table:
        points, dense_loss, made = sweep(config, source_name, request, files[0], layer_rows(table))
    whole = int(sizes(skeleton(source_name, config.dtype))["model_bytes"])
    result = {"dense_bytes": whole, "dense_loss": dense_loss, **made, "points": [asdict(point) for point in points]}
    write_json(files[0], result)
    text = result["calibration"]["source"]
    draw(points, whole, dense_loss, files[1:], f"{config.model}, one shot, calibrated on {', '.join(map(str, text))}")
    show_sweep(points, dense_loss)
    say(f"wrote {', '.join(map(str, files))}")
    return result
