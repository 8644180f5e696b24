"""README.md of the folders that are written: what it is, how to load it, how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .calibration.mixture import SourceShare, in_words
from .decomposition.sizes import Totals

_HEAD = """---
library_name: {library}
base_model: {base}
tags: [lord_tune, low-rank, {tag}]
---

# {title}

"""


def _config_block(config: Mapping[str, object]) -> str:
    return "```json\n" + json.dumps(dict(config), indent=1) + "\n```\n"


def decomposition_card(
    base: str, config: Mapping[str, object], totals: Totals, command: str, mixture: Mapping[str, SourceShare]
) -> str:
    """For a factored checkpoint; `mixture`: of calibration text, empty where it is one text or none."""
    head = _HEAD.format(library="transformers", base=base, tag="factored", title="Factored language model")
    text = f"Calibrated on {in_words(mixture)}.\n\n" if mixture else ""
    form = "W = L R" if config["backbone"] == "none" else f"W = Q + L R with Q in the format `{config['backbone']}`"
    return head + (
        f"`{base}` decomposed by lord_tune: {totals['factored_layers']} of {totals['layers']} linear "
        f"layers are {form} (method `{config['method']}`), "
        f"{totals['linear_bits_per_weight']:.2f} bits per weight of the linears, "
        f"{totals['parameters']:,} stored numbers (before: {totals['parameters_before']:,}).\n\n"
        f"{text}It needs lord_tune (`pip install -e .` in its source folder):\n"
        "```python\nimport lord_tune  # registers the checkpoint format with transformers\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")\n```\n\n'
        "Without lord_tune, loading stops with an error about mismatched sizes.\n\n"
        f"Made with:\n```bash\n{command}\n```\n\nPer-layer errors: `decomposition.json`. Configuration:\n"
        + _config_block(config)
    )


def training_card(config: Mapping[str, object], metrics: Mapping[str, object], command: str) -> str:
    """For an adapter folder."""
    head = _HEAD.format(
        library="peft", base=config["model_name_or_path"], tag="adapter", title="Trained factors of a compressed model"
    )
    return head + (
        f"Adapter (mode `{config['mode']}`) trained by lord_tune on `{config['dataset_name']}` for {metrics['steps']} "
        f"steps; mean training loss {metrics['train_loss']:.4f}; {metrics['trainable_parameters']:,} trainable "
        f"parameters. It belongs to the factored checkpoint `{config['model_name_or_path']}` and loads with\n"
        '```python\nimport lord_tune\n\nmodel, tokenizer = lord_tune.load("THIS_FOLDER")\n```\n'
        "or becomes a checkpoint of its own with\n"
        "```bash\nlord-tune export THIS_FOLDER OUT --format dense\n```\n\n"
        f"Made with:\n```bash\n{command}\n```\n\nConfiguration:\n" + _config_block(config)
    )


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


def export_card(form: str, source: str, command: str, base: str | None = None) -> str:
    """For an exported checkpoint. base: the earlier export that holds the base of an adapter alone."""
    head = _HEAD.format(library="transformers", base=source, tag=form, title="Exported model")
    notes = {
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
    }[form]
    language, loading = "bash" if form == "gguf" else "python", _LOADING[form]
    if base is not None:
        head += f"The adapter alone: its base is in `{base}`, an earlier export with the same Q.\n\n"
        notes, loading = (
            notes.replace("THIS_FOLDER/base", f"{base}/base"),
            loading.replace("THIS_FOLDER/base", f"{base}/base"),
        )
        loading = loading.replace("-m model.gguf", f"-m {base}/model.gguf")
    return head + (
        f"{notes}\n\n```{language}\n{loading}\n```\n\nExported from `{source}` by lord_tune; the written files "
        f"were reloaded and compared with the unmerged model, see `export.json`.\n```bash\n{command}\n```\n"
    )
