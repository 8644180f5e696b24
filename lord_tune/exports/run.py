"""Write a factored model (or one with a trained adapter) in another form, reload what was written, compare logits.

dense: an ordinary Hugging Face checkpoint in the dtype of the original, W = Q + L R per layer, any loader.
factored: the adapter folded back into L and R, exactly; needs lord_tune to load.
peft: a bitsandbytes NF4 base holding Q and an ordinary LoRA adapter holding L and R with lora_alpha == r; loads with
  stock transformers + peft, without lord_tune. Only for an NF4 backbone: LoRD has no Q, its base would be zeros.
gguf: a base with our own codes and a LoRA adapter for llama.cpp, on the model of a GGUF file of the original.
compressed-tensors: the same as peft with an integer base that inference engines read (backbones w2a16, w4a16, w8a16).
vllm: low rank as pairs of nn.Linear, and a modelling file of a page, for vLLM and stock loaders. Without a backbone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters.attach import has_adapters
from ..console import human_bytes
from ..errors import ExportMismatch, UsageError, unknown_name
from ..integrations.companions import Companions
from ..integrations.models import DTYPE_NAMES
from ..integrations.running import kind_of, max_length
from ..integrations.space import apart_bytes, check_space, dense_bytes
from ..integrations.vocabulary import check_vocabulary
from ..layers import dense_tables, factored_layers, plain_model, stored_tables
from ..layers.sizes import sizes
from ..protocols import CausalModel, Tokenizer
from .alone import keep_adapter
from .base import Export, Job
from .compressed_tensors import CompressedTensorsExport
from .dense import DenseExport
from .factored import FactoredExport
from .gguf import GGUFExport
from .parts import Parts, Store
from .peft import PeftExport
from .source import Source
from .verify import PROBE_TOKENS, Comparison, compare, probe_ids, probe_windows
from .vllm import VLLMExport

EXPORTS: dict[str, Export] = {
    form.name: form
    for form in (DenseExport(), FactoredExport(), PeftExport(), CompressedTensorsExport(), GGUFExport(), VLLMExport())
}

_APART = ("peft", "compressed-tensors", "vllm")  # forms with L R in tensors of their own; gguf asks for room itself
_REMEDIES = {
    "dense": "try `dtype` float32, or ",
    "compressed-tensors": "try `dtype` float32, or ",
    "vllm": "try `dtype` float32, or ",
    "gguf": "try `adapter_type` or `dense_type` f32 or a `like` that is less quantized, or ",
}


def _decoded_tables(model: PreTrainedModel, store: Store) -> int:
    """Put dense embeddings in place of those in low precision; how many numbers they have."""
    stored = stored_tables(model)
    Parts(model, store).load(*(f"{name}.table" for name in stored))
    return dense_tables(model)


def own_dtype(dtype: torch.dtype) -> str:
    """What an export of a model in this dtype is written in; float32 if the name is none that can be asked for."""
    return next((name for name, known in DTYPE_NAMES.items() if known == dtype), "float32")


def export_model(
    model: CausalModel | Source,
    tokenizer: Tokenizer,
    folder: Path,  # empty, exists; becomes the export
    form: str,
    dtype: str | None = None,  # of the written weights; None: the model's own
    threshold: float | None = None,
    text: str | None = None,
    final: Path | None = None,  # where `folder` will be moved
    beside: Companions | None = None,  # what belongs to the model and is not weights
    base: Path | None = None,  # an earlier export, whose base is not written again
    merged: bool = False,  # whether `model` is dense already
    **options: Any,  # further fields of Job
) -> Comparison:
    """Write `model` as `form` into `folder` and verify it; raises ExportMismatch over the threshold.

    The model is consumed: its adapter is folded, and a dense or factored export lets go of its tensors.
    """
    if form not in EXPORTS:
        raise unknown_name("format", form, list(EXPORTS))
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(f"Got `dtype` {dtype!r}; expected one of {', '.join(DTYPE_NAMES)}.")
    source = model if isinstance(model, Source) else Source(model)
    plain = plain_model(source.model)
    if not (factored_layers(plain) or stored_tables(plain)) and not merged:
        if has_adapters(source.model):
            raise UsageError(
                f"The adapter's base model, {plain.name_or_path}, has no factored layers; fold the adapter by PEFT's "
                "merge_and_unload, or decompose the base first and train an adapter on that."
            )
        raise UsageError("The model has no factored layers; it is an ordinary checkpoint already.")
    export, model_dtype = EXPORTS[form], plain.dtype
    export.check(plain)
    own = own_dtype(model_dtype)
    if form in ("dense", "factored"):
        size = (
            dense_bytes(plain, DTYPE_NAMES[dtype or own].itemsize) if form == "dense" else sizes(plain)["model_bytes"]
        )
        check_space(folder, size, f"The {form} export")
    ids = probe_ids(tokenizer, text, min(PROBE_TOKENS, max_length(plain)))
    check_vocabulary(plain, tokenizer, [ids])
    ids, tokens = probe_windows(plain, ids), kind_of(plain) != "bare"
    reference = source.outputs(ids)
    folded = source.folded()
    job = Job(tokenizer, folder, final or folder, dtype or own, ids, store=source, **options)
    if form not in ("dense", "factored") and (decoded := _decoded_tables(folded, source)):
        told = human_bytes(decoded * model_dtype.itemsize)
        job.notes.append(f"this format has no embeddings in low precision, so they were decoded ({told})")
    if form in _APART:
        element = (model_dtype if form == "peft" else DTYPE_NAMES[job.dtype]).itemsize
        check_space(folder, apart_bytes(folded, element, 4 if form == "peft" else element), f"The {form} export")
    written = export.write(folded, job)
    if base is not None:
        keep_adapter(folder, form, base)
    elif beside is not None:
        beside.copy(folder / export.model_folder)
    comparison = compare(reference, written, tokens)
    limit = threshold
    if limit is None:
        limit = comparison.limit(["float32", *export.rounds_to(model_dtype, job)])
    what, deviation = comparison.deviation()
    if not math.isfinite(deviation) or deviation > limit:
        raise ExportMismatch(
            f"The written {form} checkpoint differs from the model: got a {what} of {deviation:.3g}, expected at most "
            f"{limit:.3g} (largest difference of an output {comparison.max_logit_difference:.3g}). Nothing was kept; "
            f"{_REMEDIES.get(form, '')}raise `threshold` if this loss is acceptable."
        )
    return comparison
