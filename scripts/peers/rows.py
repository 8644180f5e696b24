"""One row: its model is made, measured, trained at every rate, measured and merged; every phase is written at once, so
that a row that was stopped goes on with the phase it was in."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lord_tune.console import say
from lord_tune.provenance import versions
from lord_tune.storage import read_json, write_json

from .experiments import EXPERIMENTS
from .protocol import (
    Made,
    Moments,
    Setting,
    adapter_of,
    collect_moments,
    errors,
    loss,
    peak_bytes,
    perplexities,
    ready,
    set_state,
    sizes,
    stored_state,
    train,
)

PHASES = ("made", "start", "train", "merge")
_PACKAGES = ("hqq", "gguf", "nncf", "openvino", "numpy")


def source_state() -> dict[str, Any]:
    """The commit of this checkout, and whether files of it were changed since."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
        return run.stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def package_versions() -> dict[str, str]:
    found = versions()
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def prepare(setting: Setting, folder: Path) -> dict[str, Path]:
    """What errors are computed with, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, text in (("calibrated", setting.calibration), ("heldout", setting.validation)):
        files[name] = folder / f"moments_{name}.safetensors"
        if not files[name].is_file():
            say(f"--- inputs of the layers: {name}")
            collect_moments(setting, text, files[name])
    return files


class Row:
    def __init__(self, name: str, setting: Setting, folder: Path):
        self.name, self.setting, self.folder = name, setting, folder
        self.experiment, self.path = EXPERIMENTS[name], folder / "rows" / f"{name}.json"
        self.found: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}
        self._check_setting()
        self.moments = {name: Moments(path) for name, path in prepare(setting, folder / "shared").items()}

    def _check_setting(self) -> None:
        now = json.loads(json.dumps(vars(self.setting)))
        was = self.found.get("setting", now)
        other = [key for key in now if key != "rates" and was.get(key) != now[key]]
        if other:
            raise SystemExit(
                f"{self.path} was measured with {other[0]} {was.get(other[0])!r}, and {now[other[0]]!r} is asked for; "
                "take another OUT, or the same options."
            )

    def write(self, **found: Any) -> None:
        self.found |= found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.found)

    def run(self, phases: list[str]) -> None:
        torch.manual_seed(self.setting.seed)
        place = self.folder / "made" / self.name
        place.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        made = self.experiment.made(self.setting, place, self.moments)
        seconds = time.perf_counter() - begin
        if "made" not in self.found:
            self._made(made, seconds)
        if "start" in phases and "start" not in self.found:
            begin = time.perf_counter()
            at = perplexities(made.model, self.setting)
            self.write(start=at, evaluation_seconds=time.perf_counter() - begin)
        if made.trains and "train" in phases:
            merging = made.merge is not None and "merge" in phases
            self._train(made, merging)
            if merging and "merged" not in self.found:
                self._merge(made)
        self.write(done=sorted({*phases, *self.found.get("done", [])}))
        if set(PHASES) <= set(phases):
            shutil.rmtree(place)

    def _made(self, made: Made, seconds: float) -> None:
        """Where it came from, its sizes and its errors."""
        peak = peak_bytes()
        dense = self.setting.dense()
        self.write(
            experiment={"size": self.experiment.size, "what": self.experiment.what, "options": self.experiment.options},
            setting=dict(vars(self.setting)),
            versions=package_versions(),
            machine=machine(),
            **source_state(),
            made={"seconds": seconds, "peak_bytes": peak, **sizes(made, dense)},
            errors=errors(made.model, dense, self.moments) if made.linears else {},
            trainable=sum(value.numel() for value in adapter_of(made.model).values()) if made.trains else 0,
        )

    def _train(self, made: Made, merging: bool) -> None:
        """Every rate from the same start; the best by the validation text, measured on the others and left there."""
        start, states = stored_state(made.model), {}
        windows = self.setting.windows(self.setting.validation, self.setting.validation_tokens)
        for rate in self.setting.rates:
            tried = self.found.get("rates", {})
            if f"{rate:g}" not in tried:
                begin = time.perf_counter()
                states[rate] = self._trained(made, start, rate)
                spent = time.perf_counter() - begin
                ready(made.model)
                entry = {"validation": loss(made.model, windows), "seconds": spent}
                self.write(rates=tried | {f"{rate:g}": entry})
        tried = self.found["rates"]  # also of earlier sittings
        best = float(min(tried, key=lambda rate: _finite(tried[rate]["validation"])))
        measured = self.found.get("rate") == best and "end" in self.found
        if not measured or (merging and "merged" not in self.found):
            if best not in states:
                states[best] = self._trained(made, start, best)
            set_state(made.model, states[best])
        if not measured:
            self.found.pop("merged", None)  # of another rate
            self.write(end=perplexities(made.model, self.setting), rate=best, train_peak_bytes=peak_bytes())

    def _trained(self, made: Made, start: dict[str, torch.Tensor], rate: float) -> dict[str, torch.Tensor]:
        set_state(made.model, start)
        torch.manual_seed(self.setting.seed)
        train(made.model, self.setting, rate)
        return stored_state(made.model)

    def _merge(self, made: Made) -> None:
        assert made.merge is not None
        ready(made.model)
        begin = time.perf_counter()
        merged = made.merge(made.model)
        seconds = time.perf_counter() - begin
        self.write(merged=perplexities(merged, self.setting), merge={"how": made.merged, "seconds": seconds})


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
