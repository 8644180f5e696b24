"""Load models and tokenizers on this machine's device; write checkpoints."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import PartialState

from ..errors import CheckpointError, LordError, UsageError
from ..parallel import Workers
from ..protocols import Tokenizer
from .files import check_shards, first_line

DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def quiet() -> None:
    """Leave the libraries' warnings on and their chatter off."""
    from huggingface_hub.utils import disable_progress_bars

    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # that a skeleton is on the meta device


def default_device() -> torch.device:
    """The accelerator of this machine, else the CPU. Apple's (mps) has no float64, which the moments are summed in."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and accelerator.type != "mps" else torch.device("cpu")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model or training output."""
    try:
        return cast(Tokenizer, transformers.AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} has no usable tokenizer: {first_line(error)}") from error


def model_class(name: str) -> tuple[Any, transformers.PreTrainedConfig]:
    """(class, config) of a directory or Hub id; the class is the one named in config.json `architectures`."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"The model '{name}' could not be loaded: {first_line(error)}") from error
    architectures = getattr(config, "architectures", None) or []
    found = getattr(transformers, architectures[0], None) if architectures else None
    return found or transformers.AutoModelForCausalLM, config


def attention_of(name: str) -> str | None:
    """The attention implementation that transformers chooses for a model on this machine."""
    build, config = model_class(name)
    try:
        with torch.device("meta"):
            make = getattr(build, "_from_config", None) or build.from_config
            return make(copy.deepcopy(config)).config._attn_implementation
    except Exception:  # a configuration may be broken in any way; loading the model says how
        return None


def load_dense_or_factored(name: str, dtype: str | None = None, **options: object) -> transformers.PreTrainedModel:
    """The model of a directory or Hub id in evaluation mode, on this machine's device.

    dtype: a key of DTYPE_NAMES, default the checkpoint's. `options` are those of `from_pretrained`; with a device_map
    the model stays where that puts it.
    """
    folder = Path(name)
    if folder.is_dir():
        check_shards(folder)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(f"Got `dtype` {dtype!r}; expected one of {', '.join(DTYPE_NAMES)}.")
    build, _ = model_class(name)
    try:
        wanted = DTYPE_NAMES[dtype] if dtype else "auto"
        model, loading = build.from_pretrained(name, dtype=wanted, output_loading_info=True, **options)
    except LordError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"The model '{name}' could not be loaded: {first_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise CheckpointError(
            f"The checkpoint '{name}' lacks {len(missing)} tensors of {type(model).__name__}, like {missing[0]}; "
            + (_without_head(model, missing) or "download or write it again.")
        )
    return model.eval() if "device_map" in options else model.eval().to(default_device())


def _without_head(model: transformers.PreTrainedModel, missing: list[str]) -> str:
    """What to do where only the head is missing, as in checkpoints of sentence-transformers; "" elsewhere."""
    body = model.base_model
    if body is model or any(name.startswith(f"{model.base_model_prefix}.") for name in missing):
        return ""
    return (
        "they are all of its head, so if the model is used without one, as encoders of sentences are, write "
        f'"{type(body).__name__}" under `architectures` in its config.json.'
    )


def launched_processes() -> tuple[Workers, torch.device]:
    """The processes that `accelerate launch` started (this one alone otherwise), and this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers(), default_device()
    state = PartialState()
    return Workers.launched(), torch.device(state.device)


def save_model(model: transformers.PreTrainedModel, tokenizer: Tokenizer | None, folder: Path) -> None:
    """A Hugging Face directory: config, safetensors, tokenizer, generation config."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
