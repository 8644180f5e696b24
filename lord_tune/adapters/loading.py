"""Load a model of any kind: dense, factored, a training output with its adapter, or `.gguf`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel

from ..errors import CheckpointError, LordWarning, UsageError
from ..integrations.files import ADAPTER_FILE
from ..integrations.models import load_dense_or_factored, load_tokenizer
from ..integrations.sources import base_of_adapter, resolve_model
from ..layers import FrozenSum, factored_layers, plain_model
from ..protocols import CausalModel, Tokenizer
from .attach import FACTORS, LORA, SCALES, SPLIT, expose_factors, mode_of, wrap_lora, wrap_scales
from .route import base_of


def load(name: str, dtype: str | None = None) -> tuple[CausalModel, Tokenizer]:
    """Model and tokenizer of a dense or factored checkpoint, a training output, a Hub id or a `.gguf` file.

    A training output comes back as the PEFT model it was saved from, on its factored base.
    """
    source = resolve_model(name)
    folder = Path(source)
    if (folder / ADAPTER_FILE).is_file():
        base = load_dense_or_factored(base_of_adapter(folder), dtype)
        return load_adapter(base, folder), load_tokenizer(source)
    return load_dense_or_factored(source, dtype), load_tokenizer(source)


def load_adapter(model: CausalModel, folder: Path | str, adapter_name: str = "default") -> PeftModel:
    """Put a saved adapter (any mode) back on its factored base, or beside the adapters of a PEFT model of its mode.

    A further adapter is not active until `set_adapter`, as PEFT has it.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {folder} could not be read: {error}; write it again.") from error
    paths = {re.split(r"\.(?:lora_|ia3_)", key.removeprefix("base_model.model."))[0] for key in state}
    layers, owners = factored_layers(plain_model(model)), sorted({path.rpartition(".")[0] for path in paths})
    missing = [owner for owner in owners if owner not in layers]
    if missing or not owners:
        what = missing[0] if missing else "(no factored layer)"
        raise CheckpointError(f"The adapter in {folder} trains {what}, which is not factored in its base model.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)  # a partial match was reported when the adapter was trained
        peft_model = _like_saved(model, config, sorted(paths), owners, adapter_name)
    try:
        result: Any = set_peft_model_state_dict(peft_model, state, adapter_name=adapter_name)
    except RuntimeError as error:  # shapes differ
        raise CheckpointError(
            f"The adapter in {folder} does not fit its base model, whose ranks or shapes have changed since; decompose "
            "the base as it was, or train again."
        ) from error
    absent = [key for key in result.missing_keys if f".{adapter_name}" in key and ("lora_" in key or "ia3_" in key)]
    if absent:
        raise CheckpointError(f"The adapter in {folder} lacks {absent[0]}; it is not complete, write it again.")
    peft_model.eval()
    return peft_model


def _like_saved(
    model: CausalModel, config: PeftConfig, paths: list[str], owners: list[str], adapter_name: str
) -> PeftModel:
    """`model` with an adapter as `paths` (the modules it wraps) and its configuration describe it, not filled yet."""
    layers = factored_layers(plain_model(model))
    ends = {path.rpartition(".")[2] for path in paths}
    if ends == {"host"}:
        hosts = [layers[n].host for n in owners if layers[n].top_left is None]
        split = all(host is not None and isinstance(base_of(host), FrozenSum) for host in hosts)
        targets = rf"^({'|'.join(re.escape(name) for name in owners)})$"
        return expose_factors(model, targets, adapter_name, SPLIT if split else FACTORS)
    wanted = LORA if isinstance(config, LoraConfig) else SCALES
    if mode_of(model) not in (None, wanted):
        raise UsageError(
            f"The model already has an adapter of mode {mode_of(model)}, so one of mode {wanted} cannot be loaded; "
            "load the base model again."
        )
    gone = [path for path in paths if getattr(layers[path.rpartition(".")[0]], path.rpartition(".")[2], None) is None]
    if gone:
        raise CheckpointError(f"The adapter trains '{gone[0]}', which its base model does not have; train it again.")
    if isinstance(config, LoraConfig):
        return wrap_lora(model, paths, config.r, config.lora_alpha, config.lora_dropout, adapter_name)
    return wrap_scales(model, paths, adapter_name)
