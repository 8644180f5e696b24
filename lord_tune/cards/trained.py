"""The card of an adapter, written by `train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..console import human_bytes
from .base import (
    HUB_ID,
    PLACE,
    Base,
    backbones_in,
    base_of,
    code,
    config_block,
    layers_table,
    lineage_of,
    sizes_table,
    table,
    task_of,
    written,
)
from .scores import section

_LOAD = f"""import lord_tune

model, tokenizer = lord_tune.load("{PLACE}")"""


def training_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    command: str,
    source: str,  # the folder or Hub id of the checkpoint that was trained
) -> str:
    """For an adapter folder."""
    checkpoint, lineage, folder = str(config["model_name_or_path"]), lineage_of(source), Path(config["output_dir"])
    base = base_of(lineage["base"], source, folder) if lineage else None
    hub = checkpoint if not Path(source).is_dir() else None
    data = str(config["dataset_name"])
    text = "\n".join(
        [
            f"# Trained factors of {Path(checkpoint).name}\n",
            f"An adapter (mode `{config['mode']}`, objective `{config['objective']}`) that belongs to the factored "
            f"checkpoint `{checkpoint}` and is worth nothing without it"
            f"{_identity(config)}. Trained by lord_tune on `{data}`.\n",
            *(_lineage(lineage, base)),
            "## Training\n",
            _figures(metrics, folder),
            section(None),
            "## How to load it\n",
            "With lord_tune (`pip install -e .` in its source folder), the checkpoint in its place:\n",
            code("python", _LOAD),
            *([] if config["mode"] == "basis" else ["Any loader takes what this writes:\n", _export("OUT", "dense")]),
            "## How to train on\n",
            "Fold it into the checkpoint, and train that, as its own card says:\n",
            _export("TRAINED", "factored"),
            "## How it was made\n",
            code("bash", command),
            "Configuration:\n",
            config_block(config),
        ]
    )
    return written(
        text,
        ["adapter"],
        base,
        library_name="peft",
        base_model=hub,
        base_model_relation="adapter" if hub else None,
        datasets=[data] if not Path(data).exists() and HUB_ID.fullmatch(data) else None,
        pipeline_tag=task_of(Path(source)) if Path(source).is_dir() else None,
    )


def _export(out: str, form: str) -> str:
    return code("bash", f"lord-tune export {PLACE} {out} --format {form}")


def _identity(config: Mapping[str, Any]) -> str:
    known = config.get("base")
    return f" (its weights: `{known}`)" if known else ""


def _lineage(lineage: Mapping[str, Any], base: Base | None) -> list[str]:
    """What the trained checkpoint is, where its records are there."""
    if base is None:
        return ["The records of that checkpoint are not at hand, so its original and licence are not stated here.\n"]
    totals, layers = lineage["totals"], lineage["layers"]
    before = {key.removesuffix("_before"): value for key, value in totals.items() if key.endswith("_before")}
    names = backbones_in(layers)
    form = "L R" if names == ["none"] else f"Q + L R with Q as {', '.join(names)}"
    return [
        base.sentence() + "\n",
        "## The checkpoint it belongs to\n",
        f"{totals['factored_layers']} of {totals['layers']} linear layers are {form}.\n",
        sizes_table(before, totals, "decomposed"),
        layers_table(layers),
    ]


def _figures(metrics: Mapping[str, Any], folder: Path) -> str:
    adapter = folder / "adapter_model.safetensors"
    rows = [
        ["steps", f"{metrics['steps']:,}"],
        ["mean training loss", f"{metrics['train_loss']:.4f}"],
        ["trained numbers", f"{metrics['trainable_parameters']:,}"],
    ]
    held = [entry["eval_loss"] for entry in metrics["history"] if "eval_loss" in entry]
    rows += [["last loss on evaluation text", f"{held[-1]:.4f}"]] if held else []
    rows += [["bytes of the adapter", human_bytes(adapter.stat().st_size)]] if adapter.is_file() else []
    return table(["", "this"], rows)
