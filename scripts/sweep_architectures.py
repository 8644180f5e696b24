"""Decompose a tiny random model of every text architecture and check what comes out.

    python scripts/sweep_architectures.py [--only WORD ...] [--table FILE]

For each architecture of transformers' auto classes that a few common settings make small (tests/architectures.py):

    calibration  the Gram matrix of each layer's inputs against that of whole forward passes: relative 1e-5
    reload       logits of the written checkpoint against those of the dense model with the decomposed weights: 1e-4
    train        one step on L and R: the loss is finite, L and R of every layer change that the dense model would train
    export       a dense checkpoint whose logits are those of the factored one: 1e-4

Each is right, or refused with a sentence. Anything else is wrong, and the exit status is 1. `--table` writes the table
in Markdown. About 10 minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from architectures import build, names
from tiny import save_tiny, write_code_rows

import lord_tune
from lord_tune.calibration.blocks import first_input
from lord_tune.calibration.collect import BlockWalk
from lord_tune.errors import LordError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.running import run_model, summed_loss
from lord_tune.layers import expert_of, factored_layers, unfuse

_GRAM, _LOGITS = 1e-5, 1e-4  # float32 forward passes of the same values, in another order of sums
_IDS = torch.arange(1, 61)[None]
RIGHT, REFUSED, WRONG = "right", "refused", "wrong"


class Wrong(Exception):
    """What came out is not what it should be."""


@dataclasses.dataclass
class Verdict:
    """Of one architecture."""

    name: str
    kind: str  # right, refused, wrong
    detail: str
    dense: int = 0  # linear layers inside the blocks that were left dense


def verdict(name: str, model: Any, folder: Path, rows: Path) -> Verdict:
    """Everything in the file's docstring for one model."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detail, dense = _checked(model, folder, rows)
        return Verdict(name, RIGHT, detail, dense)
    except LordError as error:
        return Verdict(name, REFUSED, str(error))
    except Wrong as error:
        return Verdict(name, WRONG, str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(name, WRONG, f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}")


def _checked(model: Any, folder: Path, rows: Path) -> tuple[str, int]:
    base, out = str(save_tiny(model, folder / "base")), str(folder / "out")
    try:
        _logits(load_dense_or_factored(base))
    except Exception as error:
        raise LordError(f"transformers does not run what it has saved and loaded ({type(error).__name__})") from error
    statistics, windows, report = _decomposed(base, out, rows)
    worst = _calibration(base, statistics, windows)
    factored = load_dense_or_factored(out)
    dense = _densely(base, factored)
    found = _logits(factored)
    _near("reload", found, _logits(dense))
    _train(factored, dense)
    lord_tune.export(out, str(folder / "dense"), "dense")
    _near("export", _logits(load_dense_or_factored(str(folder / "dense"))), found)
    left = sum(1 for entry in report["layers"].values() if entry["rank"] == "dense")
    return f"{len(report['layers']) - left} layers, Gram matrices {worst:.0e}", left


def _decomposed(base: str, out: str, rows: Path) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    """(layer -> moments of its calibration inputs, the windows, the report)"""
    statistics: dict[str, Any] = {}
    windows: list[Tensor] = []
    original = BlockWalk.collect

    def collect(self: BlockWalk, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        statistics.update(found["calibration"])
        windows[:] = [self.windows["calibration"]]
        return found

    BlockWalk.collect = collect  # type: ignore[method-assign]
    try:
        options: dict[str, Any] = {"calibration": [str(rows)], "calibration_tokens": 256, "context_length": 64}
        report = lord_tune.decompose(base, out, backbone="nf4", rank=8, **options)
    finally:
        BlockWalk.collect = original  # type: ignore[method-assign]
    return statistics, windows[0], report


def _calibration(base: str, statistics: dict[str, Any], windows: Tensor) -> float:
    """The largest relative difference of a Gram matrix."""
    model = load_dense_or_factored(base)
    unfuse(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in statistics}

    def hook(name: str) -> Any:
        return lambda module, args, kwargs: rows[name].append(first_input(args, kwargs).detach().flatten(0, -2).clone())

    for name in statistics:
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
    with torch.no_grad():
        for window in windows:
            run_model(model, window[None])
    worst = 0.0
    for name, moments in statistics.items():
        x = torch.cat(rows[name]).double()
        gram = x.T @ x / len(x)
        difference = float((moments.gram - gram).norm() / gram.norm().clamp_min(1e-300))
        if not difference <= _GRAM:
            raise Wrong(f"calibration: the Gram matrix of {name} differs by {difference:.2g}")
        worst = max(worst, difference)
    return worst


def _densely(base: str, factored: Any) -> Any:
    """The dense model with the weights that the factored layers stand for."""
    model = load_dense_or_factored(base)
    state = model.state_dict()
    with torch.no_grad():
        for name, layer in factored_layers(factored).items():
            part = expert_of(name)
            target = state[f"{name}.weight"] if part is None else state[part[0]][part[1]]
            weight = layer.dense_weight()
            target.copy_(weight.T if layer.plan.conv1d else weight)
            if layer.bias is not None and part is None:
                state[f"{name}.bias"].copy_(layer.bias)
    return model


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    result = run_model(model, _IDS)
    named = [value for key, value in result.items() if key.endswith("logits")]
    return (named or [result["last_hidden_state"]])[0].float()


def _near(what: str, found: Tensor, expected: Tensor) -> None:
    difference = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
    if not difference <= _LOGITS:
        raise Wrong(f"{what}: the outputs differ by {difference:.2g}")


def _train(factored: Any, dense: Any) -> None:
    """One step on L and R. Those of each layer change whose weight has a gradient in the dense model: some layers have
    none (experts that no token chose; MRA's attention, which is zero without a GPU)."""
    loss, tokens = summed_loss(dense.requires_grad_(True), _IDS, mask_token=258)
    (loss / tokens).backward()
    reached = {name for name in factored_layers(factored) if _has_gradient(dense, name)}
    exposed = lord_tune.expose_factors(factored)
    before = {name: p.detach().clone() for name, p in exposed.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in exposed.parameters() if p.requires_grad], lr=1e-3)
    loss, tokens = summed_loss(exposed, _IDS, mask_token=258)
    (loss / tokens).backward()
    optimizer.step()
    if not torch.isfinite(loss) or not all(bool(torch.isfinite(p).all()) for p in exposed.parameters()):
        raise Wrong(f"train: loss {float(loss):.3g}, or factors that are not finite")
    after = dict(exposed.named_parameters())
    same = [name for name, p in before.items() if torch.equal(p, after[name])]
    left = sorted({layer for layer in reached for name in same if f".{layer}." in name})
    if left or not reached:
        raise Wrong(f"train: the factors of {len(left)} of {len(reached)} layers did not change, like {left[:1]}")


def _has_gradient(dense: Any, name: str) -> bool:
    part = expert_of(name)
    if part is None:
        gradient = dense.get_submodule(name).weight.grad
    else:
        fused = dense.get_parameter(part[0]).grad
        gradient = None if fused is None else fused[part[1]]
    return gradient is not None and bool((gradient != 0).any())


def table(found: list[Verdict]) -> str:
    """In Markdown."""
    counts = Counter(v.kind for v in found)
    whole = [v.name for v in found if v.kind == RIGHT and not v.dense]
    partly = [f"{v.name} ({v.dense})" for v in found if v.kind == RIGHT and v.dense]
    lines = [
        f"{len(found)} architectures: {counts[RIGHT]} right, {counts[REFUSED]} refused, {counts[WRONG]} wrong "
        f"(transformers {transformers.__version__}).",
        "",
        "| outcome | architectures |",
        "|---|---|",
        f"| right | {', '.join(whole)} |",
        f"| right, some layers left dense (how many) | {', '.join(partly) or '-'} |",
    ]
    lines += [f"| {v.kind}: {v.detail.replace('|', '/')} | {v.name} |" for v in found if v.kind != RIGHT]
    return "\n".join(lines) + "\n"


def sweep(only: list[str]) -> list[Verdict]:
    """The verdicts, printed as they come."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        rows = write_code_rows(Path(folder) / "rows.jsonl")
        for name in names():
            if only and not any(word in name for word in only):
                continue
            model = build(name)
            if model is None:
                continue
            with tempfile.TemporaryDirectory(dir=folder) as own:
                one = verdict(name, model, Path(own), rows)
            print(f"{one.name:45} {one.kind:8} {one.dense or '':4} {one.detail}", flush=True)
            found.append(one)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="names that hold one of these words")
    parser.add_argument("--table", type=Path, help="write the table here")
    given = parser.parse_args()
    found = sweep(given.only)
    text = table(found)
    print(text)
    if given.table:
        given.table.write_text(text)
    return int(any(v.kind == WRONG for v in found))


if __name__ == "__main__":
    sys.exit(main())
