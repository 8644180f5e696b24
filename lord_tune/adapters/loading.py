"""Load a model of any kind: dense, factored, a training output with its adapter, or `.gguf`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from torch import Tensor

from ..errors import CheckpointError, LordWarning, UsageError
from ..integrations.files import ADAPTER_FILE, first_line
from ..integrations.models import load_dense_or_factored, load_tokenizer
from ..integrations.sources import base_of_adapter, resolve_model
from ..layers import FrozenSum, factored_layers, plain_model
from ..protocols import CausalModel, Tokenizer
from .attach import FACTORS, LORA, SCALES, SPLIT, attach_factors, mode_of, wrap
from .basis import attach_basis
from .merging import needs_float32
from .route import base_of

_PARTS = {"left", "right", "top_left", "top_right"}


def load(name: str, dtype: str | None = None) -> tuple[CausalModel, Tokenizer]:
    """Model and tokenizer of a dense or factored checkpoint, a training output, a Hub id or a `.gguf` file.

    A training output, of lord_tune or of PEFT alone, comes back as the PEFT model it was saved from, on its base.
    """
    source = resolve_model(name)
    folder = Path(source)
    if (folder / ADAPTER_FILE).is_file():
        origin = base_of_adapter(folder)
        return load_adapter(load_dense_or_factored(origin, dtype), folder), tokenizer_of(source, origin)
    return load_dense_or_factored(source, dtype), load_tokenizer(source)


def tokenizer_of(source: str, origin: str) -> Tokenizer:
    """Of a training output, or of the model it stands on where it has none."""
    files = (Path(source) / file for file in ("tokenizer.json", "tokenizer_config.json"))
    return load_tokenizer(source if source == origin or any(file.is_file() for file in files) else origin)


def load_to_fold(name: str) -> tuple[CausalModel, Tokenizer]:
    """`load`, in float32 where an adapter changes dense layers of 16 bits, which folding would round."""
    model, tokenizer = load(name)
    return load(name, "float32") if needs_float32(model) else (model, tokenizer)


def load_adapter(model: CausalModel, folder: Path | str, adapter_name: str = "default") -> PeftModel:
    """Put a saved adapter back on its base, or beside the adapters of a PEFT model of its mode: with the whole
    configuration it was saved with, as PEFT itself loads it, whoever saved it.

    A further adapter is not active until `set_adapter`, as PEFT has it.
    """
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(str(folder))
        state = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {folder} could not be read: {error}; write it again.") from error
    if config.is_prompt_learning:
        raise UsageError(f"The adapter in {folder} is {config.peft_type}, which adds tokens; load it with PEFT alone.")
    paths = sorted({re.split(r"\.(?:lora_|ia3_)", k.removeprefix("base_model.model."))[0] for k in _tuned(state)})
    _check_present(model, folder, paths)
    config.inference_mode = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LordWarning)  # a partial match was reported when the adapter was trained
            basis = any(key.endswith(".host.lora_basis") for key in state)
            peft_model = _like_saved(model, config, paths, adapter_name, basis)
            result = peft_model.load_adapter(str(folder), adapter_name, is_trainable=True, torch_device="cpu")
    except RuntimeError as error:  # shapes differ
        raise CheckpointError(
            f"The adapter in {folder} does not fit its base model, whose ranks or shapes have changed since; decompose "
            "the base as it was, or train again."
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"PEFT cannot load the adapter in {folder} on this model: {first_line(error)}") from error
    absent = [key for key in result.missing_keys if f".{adapter_name}" in key]
    if absent:
        raise CheckpointError(f"The adapter in {folder} lacks {absent[0]}; it is not complete, write it again.")
    if result.unexpected_keys:
        raise CheckpointError(f"The adapter in {folder} holds {result.unexpected_keys[0]}, which has no place here.")
    peft_model.eval()
    return peft_model


def adapter_keys(folder: Path) -> list[str]:
    """The tensors of a saved adapter, by the names that they have in its base model."""
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        state = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {folder} could not be read: {error}; write it again.") from error
    return [key.removeprefix("base_model.model.") for key in state]


def _tuned(state: dict[str, Tensor]) -> list[str]:
    return [key for key in state if ".lora_" in key or ".ia3_" in key]


def _check_present(model: CausalModel, folder: Path | str, paths: list[str]) -> None:
    """Everything that an adapter wraps is there."""
    plain = plain_model(model)
    layers = factored_layers(plain)
    for path in paths:
        owner, _, part = path.rpartition(".")
        decomposed = part == "host" or part in _PARTS
        if decomposed and owner not in layers and owner + ".base_layer" not in layers:
            raise CheckpointError(f"The adapter in {folder} trains {owner}, which is not factored in its base model.")
        if part == "host":
            continue
        try:
            found = plain.get_submodule(path)
        except AttributeError:
            found = None
        if found is None:
            raise CheckpointError(f"The adapter trains '{path}', which its base model does not have; train it again.")


def _like_saved(model: CausalModel, config: PeftConfig, paths: list[str], adapter_name: str, basis: bool) -> PeftModel:
    """`model` with an adapter of a saved configuration, whose tensors are still to be loaded. basis: of that mode."""
    layers = factored_layers(plain_model(model))
    owners = [path.removesuffix(".host") for path in paths if path.endswith(".host")]
    if owners and isinstance(config, LoraConfig):
        targets = rf"^({'|'.join(re.escape(name) for name in owners)})$"
        if basis:
            return attach_basis(model, targets, adapter_name, config)
        hosts = [layers[n].host for n in owners if layers[n].top_left is None]
        split = all(host is not None and isinstance(base_of(host), FrozenSum) for host in hosts)
        return attach_factors(model, targets, adapter_name, SPLIT if split else FACTORS, config)
    inside = {path.rpartition(".")[2] for path in paths} & _PARTS
    wanted = {LoraConfig: LORA, IA3Config: SCALES}.get(type(config)) if inside else None
    present = mode_of(model)
    if present is not None and present != wanted:
        raise UsageError(
            f"The model already has an adapter of mode {present}, so one of mode {wanted or config.peft_type} cannot "
            "be loaded; load the base model again."
        )
    return wrap(model, config, adapter_name)
