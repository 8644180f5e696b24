"""lord_tune's rows, by its verbs: `decompose`, `load`, `expose_factors`, `export`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lord_tune
from lord_tune.layers import factored_layers

from .protocol import Made, Setting, stored_state


def decomposed(setting: Setting, folder: Path, merge: bool = True, **options: Any) -> Made:
    """A row of `decompose`; L and R train as PEFT's adapter. merge: Q + L R is rounded into Q's format by feedback."""
    out = folder / "decomposed"
    if not (out / "decomposition.json").is_file():
        lord_tune.decompose(
            setting.source,
            str(out),
            calibration=[setting.calibration],
            calibration_tokens=setting.calibration_tokens,
            context_length=setting.length,
            seed=setting.seed,
            overwrite=True,
            **options,
        )
    model, _ = lord_tune.load(str(out))
    kept = sorted(out.glob("*.safetensors"))
    training = [re.escape(name) for name, layer in factored_layers(model).items() if layer.rank]
    if not training:
        return Made(model, kept)
    exposed = lord_tune.expose_factors(model, targets=f"^({'|'.join(training)})$")
    stored_state(exposed)
    merging = merged_with_feedback(setting, folder) if merge else None
    return Made(exposed, kept, True, merging, "rounded into Q again, with feedback" if merge else "")


def merged_with_feedback(setting: Setting, folder: Path) -> Callable[[Any], Any]:
    def merge(model: Any) -> Any:
        run, out = folder / "trained", folder / "merged"
        shutil.rmtree(run, ignore_errors=True)
        model.save_pretrained(run)
        lord_tune.export(
            str(run),
            str(out),
            "factored",
            merge="feedback",
            merge_limit=100.0,  # whatever it costs is reported
            text=setting.validation,
            calibration=[setting.calibration],
            calibration_tokens=setting.calibration_tokens,
            overwrite=True,
        )
        return lord_tune.load(str(out))[0]

    return merge
