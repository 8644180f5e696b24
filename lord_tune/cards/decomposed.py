"""The card of a factored checkpoint, written by `decompose` and `correct`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..calibration.mixture import in_words
from .base import (
    PLACE,
    Base,
    backbones_in,
    base_of,
    code,
    config_block,
    layers_table,
    sizes_table,
    task_of,
    training_of,
    written,
)
from .scores import section

_LOAD = f"""import lord_tune  # registers the checkpoint format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACE}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")"""
_PACKED = ("w2a16", "w4a16", "w8a16")
_GGUF = ("q2_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def decomposition_card(report: Mapping[str, Any], source: str, folder: Path) -> str:
    """report: the content of decomposition.json. source: the folder or Hub id of the base. folder: of the card."""
    base = base_of(report["base"], source, folder)
    layers, totals = report["layers"], report["totals"]
    backbones = backbones_in(layers)
    plain = backbones == ["none"]
    form = "L R" if plain else "Q + L R"
    before = {key.removesuffix("_before"): value for key, value in totals.items() if key.endswith("_before")}
    text = "\n".join(
        [
            f"# {Path(base.name).name} as {form}\n",
            _what(report, base, backbones),
            "## Size\n",
            sizes_table(before, totals, "this"),
            "## Layers\n",
            layers_table(layers),
            _errors(report),
            section(None),
            "## How to load it\n",
            _loading(backbones),
            *([_adapter(report)] if "quantized" in report else []),
            "## How to train on\n",
            training_of(folder),
            "## How it was made\n",
            code("bash", report["command"]),
            f"{_calibrated(report['calibration'])}Errors of every layer: `decomposition.json`. Configuration:\n",
            config_block(report["config"]),
        ]
    )
    return written(
        text,
        ["factored", *(name for name in backbones if name != "none")],
        base,
        library_name="transformers",
        base_model=base.hub_id,
        base_model_relation="quantized" if base.hub_id and not plain else None,
        pipeline_tag=task_of(folder),
    )


def _what(report: Mapping[str, Any], base: Base, backbones: list[str]) -> str:
    totals = report["totals"]
    methods = " and ".join(
        dict.fromkeys(f"`{layer['method']}`" for layer in report["layers"].values() if layer["rank"] != "dense")
    )
    form = (
        "W ≈ L R, two thin matrices in place of one"
        if backbones == ["none"]
        else f"W ≈ Q + L R, a low-precision Q ({', '.join(backbones)}) and two thin matrices that repair it"
    )
    return (
        f"{totals['factored_layers']} of {totals['layers']} linear layers are {form}; method {methods}. Written by "
        f"lord_tune {report['versions']['lord_tune']}.\n\n{base.sentence()}\n"
    )


def _errors(report: Mapping[str, Any]) -> str:
    if not report["calibration"].get("tokens"):
        return "Errors of the layers are measured on calibration text, and there was none.\n"
    return "Errors: relative, of a layer's outputs, on the calibration text and on text that was held out.\n"


def _calibrated(calibration: Mapping[str, Any]) -> str:
    if calibration.get("mixture"):
        return f"Calibrated on {in_words(calibration['mixture'])}.\n\n"
    if not calibration.get("tokens"):
        return ""
    sources = ", ".join(f"`{name}`" for name in calibration["source"])
    return f"Calibration text: {calibration['tokens']:,} tokens of {sources}.\n\n"


def _loading(backbones: list[str]) -> str:
    """In transformers as it is; by what an export makes of it elsewhere, where there is one for these formats."""
    ways = [("as an ordinary checkpoint of the original's size, for any loader", "dense", "")]
    if backbones == ["nf4"]:
        ways.append(("for transformers and PEFT without lord_tune (NF4 and a LoRA adapter)", "peft", ""))
    if all(name in _PACKED for name in backbones):
        ways.append(("for vLLM (packed integers and a LoRA adapter)", "compressed-tensors", ""))
    if all(name in _GGUF for name in backbones):
        ways.append(("for llama.cpp (a base and a LoRA adapter)", "gguf", " --like ORIGINAL.gguf"))
    if backbones == ["none"]:
        ways.append(("for vLLM and transformers without lord_tune", "vllm", ""))
    told = "".join(f"* {what}:\n\n" + _indented(code("bash", _export(form, more))) + "\n" for what, form, more in ways)
    return (
        "With transformers and lord_tune (`pip install -e .` in its source folder):\n\n"
        + code("python", _LOAD)
        + "\nPrograms that never import lord_tune load it with `trust_remote_code=True`, where lord_tune is installed. "
        "Without that, loading stops with an error about mismatched sizes. vLLM, llama.cpp and plain PEFT do not load "
        f"it as it is; export it\n\n{told}"
    )


def _export(form: str, more: str) -> str:
    return f"lord-tune export {PLACE} OUT --format {form}{more}"


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _adapter(report: Mapping[str, Any]) -> str:
    """Of `correct`: the adapter for the very file that was corrected."""
    quantized = str(report["quantized"])
    head = f"`adapter/` holds L and R for `{quantized}` (sha256 `{report['quantized_sha256']}`) itself"
    if quantized.lower().endswith(".gguf"):
        return f"{head}, in llama.cpp:\n\n" + code(
            "bash", f"llama-cli -m {quantized} --lora {PLACE}/adapter/adapter.gguf"
        )
    return f"{head}, in PEFT:\n\n" + code(
        "python",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{quantized}")\n'
        f'model = PeftModel.from_pretrained(base, "{PLACE}/adapter")',
    )
