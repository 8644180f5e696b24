"""The card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..console import human_bytes
from .base import PLACE, base_of, code, layers_table, lineage_of, table, task_of, training_of, written
from .scores import section

_LOADING = {
    "dense": "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
    "factored": "import lord_tune\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")',
    "peft": "import torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
    'base = AutoModelForCausalLM.from_pretrained("THIS_FOLDER/base", dtype=torch.float32)\n'
    'model = PeftModel.from_pretrained(base, "THIS_FOLDER/adapter")',
    "compressed-tensors": "from peft import PeftModel\n"
    "from transformers import AutoModelForCausalLM, CompressedTensorsConfig\n\n"
    "# PEFT puts no adapter on packed layers. Where they differ in bits or groups, leave this out and run the base\n"
    "# once, which decodes them.\n"
    "decoded = CompressedTensorsConfig(dequantize=True)\n"
    'base = AutoModelForCausalLM.from_pretrained("THIS_FOLDER/base", quantization_config=decoded)\n'
    'model = PeftModel.from_pretrained(base, "THIS_FOLDER/adapter")',
    "vllm": "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True, dtype="auto")',
    "gguf": "llama-cli -m model.gguf --lora adapter.gguf -p 'def main():'  # without --lora if there is no adapter",
}
_NOTES = {
    "dense": "An ordinary checkpoint, as large as the original: L R was multiplied out in every layer.",
    "factored": "The adapter was folded back into L and R. Needs lord_tune to load.",
    "peft": "A bitsandbytes NF4 base (Q) and an ordinary LoRA adapter (L and R, lora_alpha = r); load both. "
    "The base alone is Q only. Merging the adapter into the 4-bit base would round the factors away.",
    "compressed-tensors": "An integer base (Q, pack-quantized) and an ordinary LoRA adapter (L and R, lora_alpha = "
    "r) for inference engines; load both. The base alone is Q only. In vLLM: `vllm serve THIS_FOLDER/base "
    "--enable-lora --lora-modules lord=THIS_FOLDER/adapter --max-lora-rank N`, N the next of 8, 16, 32, 64, 128, "
    "256, 320, 512 from the largest rank on.",
    "vllm": "Low-rank layers as ordinary linear layers, which `modeling_low_rank.py` puts into the model of "
    "transformers; lord_tune is not needed. In vLLM: `vllm serve THIS_FOLDER --trust-remote-code`, which takes its "
    "Transformers backend; the layers are not split over several GPUs.",
    "gguf": "For llama.cpp: a base (Q) and a LoRA adapter (L and R; alpha 0 means a scale of 1 for every layer). "
    "The base alone is Q only.",
}
_RELATIONS = ("peft", "compressed-tensors", "gguf")  # forms with a low-precision base


def export_card(
    result: Mapping[str, Any],  # the content of export.json
    source: str,  # the folder that was exported
    folder: Path,  # of the card
    base: str | None = None,  # the earlier export that holds the base of an adapter alone
) -> str:
    """For an exported checkpoint."""
    form, lineage = str(result["format"]), lineage_of(source)
    original = base_of(lineage["base"], source, folder) if lineage else None
    named = str(result["source"])
    notes, loading = _NOTES[form], _LOADING[form]
    alone = ""
    if base is not None:
        alone = f"The adapter alone: its base is in `{base}`, an earlier export with the same Q.\n"
        notes, loading = (text.replace(f"{PLACE}/base", f"{base}/base") for text in (notes, loading))
        loading = loading.replace("-m model.gguf", f"-m {base}/model.gguf")
    text = "\n".join(
        [
            f"# {Path(named).name}, exported as {form}\n",
            *([alone] if alone else []),
            f"{notes}\n",
            *(f"{line}\n" for line in result.get("notes", [])),
            (original.sentence() if original else "The records of the original are not at hand.") + "\n",
            "## Size and check\n",
            _figures(result, lineage),
            "The written files were loaded again and compared with the unmerged model, see `export.json`.\n",
            *(_decomposed(lineage, form)),
            section(None) if form in ("dense", "factored") else "",
            "## How to load it\n",
            code("bash" if form == "gguf" else "python", loading),
            "## How to train on\n",
            _training(form, named, folder),
            "## How it was made\n",
            f"Exported from `{named}` by lord_tune {result['versions']['lord_tune']}.\n",
            code("bash", result["command"]),
        ]
    )
    hub = original.hub_id if original is not None else None
    return written(
        text,
        [form],
        original,
        library_name="peft" if form in ("peft", "compressed-tensors") else "gguf" if form == "gguf" else "transformers",
        base_model=hub,
        base_model_relation="quantized" if hub and form in _RELATIONS else None,
        pipeline_tag=task_of(folder) or task_of(folder / "base"),
    )


def _figures(result: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    before = lineage.get("totals", {}).get("model_bytes_before")
    rows = [["bytes of the original's tensors", human_bytes(before)]] if before else []
    rows.append(["bytes of the files of tensors", human_bytes(result["bytes"])])
    compared = result["comparison"]
    for label, key in (
        ("KL to the unmerged model, nats per token", "kl"),
        ("relative difference of the outputs", "relative_difference"),
        ("tokens with the same likeliest next one", "top1_agreement"),
    ):
        if compared.get(key) is not None:
            rows.append([label, f"{compared[key]:.3g}"])
    return table(["", "this"], rows)


def _decomposed(lineage: Mapping[str, Any], form: str) -> list[str]:
    """Ranks and formats of what was exported; a dense export holds none of them any more."""
    if not lineage:
        return []
    what = "These layers were multiplied out:" if form == "dense" else "Ranks and formats, as they were decomposed:"
    return ["## Layers\n", f"{what}\n", layers_table(lineage["layers"])]


def _training(form: str, source: str, folder: Path) -> str:
    if form == "dense":
        return "As the original is trained: it is an ordinary checkpoint.\n"
    if form == "factored":
        return training_of(folder)
    return f"Train `{source}`, from which this was made, on, or again, and export the result.\n"
