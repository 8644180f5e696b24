"""The memory of a training step before any weight is read: one step is run on tensors that have shapes and no content.

The factored model's skeleton comes from config.json and its manifest, the adapter is hung on it as in the run, and
forward, loss and backward run with the run's batch, precision and checkpointing while every allocation is counted.
What autograd saves, what a decoded tile or a recomputed block costs and when each is freed are those of the real
modules, not a model of them; three stand-ins are in shapes.py.

Not foreseen: the accelerator's context, fragmentation, buffers of several processes (DDP holds the gradients a second
time), what FSDP shards away, rows shorter than `max_length`. The experts of a mixture are taken to get an equal share
of the tokens. A model that decides by values otherwise, as MPNet's position buckets do, cannot be run like this.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..console import human_bytes
from ..errors import UsageError
from ..integrations.checkpoint import skeleton
from ..integrations.models import DTYPE_NAMES, model_class
from ..integrations.running import max_length
from ..integrations.transformers_quantizer import QUANT_METHOD, LordConfig, LordQuantizer
from ..layers import dequantize_once, plain_model
from ..memory import held_bytes
from .arguments import DISTILL, DPO, TrainOptions
from .distillation import CHUNK, TokenLoss, head_of, kl_divergence
from .memory import Live, Saved, gradient_bytes, held
from .modes import expose, teacher_source, trained_kind
from .pieces import fitting_pieces
from .shapes import LossInPieces, decode_by_shapes, set_attention, without_content
from .teacher_logits import INDEX, bucketed_kl

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel
    from trl import SFTConfig

    from ..protocols import TrlConfig

_BYTES_PER_NUMBER: dict[str, float] = {  # of optimizer state; transformers' names without "paged_" and "_bnb"
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw": 8,
    "adamw_8bit": 2,
    "ademamix": 12,
    "ademamix_8bit": 3,
    "lion": 4,
    "lion_8bit": 1,
    "rmsprop": 4,
    "rmsprop_8bit": 1,
    "rmsprop_32bit": 4,
    "adagrad": 4,
    "sgd": 0,
}
_COUNTED_STEPS = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop")  # torch's own: 4 more bytes per tensor
_SMALL = 4096  # numbers; bitsandbytes keeps the state of smaller tensors in 32 bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step by part (training/memory.py), foreseen."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int | None  # None: an optimizer whose state is not known
    activations: int
    logits: int
    teacher: int  # weights of a model in memory that is distilled from
    peak: int  # without what Python and the libraries hold
    held: int  # by this process now
    tokens: int  # of one batch
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict_memory(
    source: str,  # a factored checkpoint, or its config.json alone
    options: TrainOptions,
    arguments: TrlConfig,  # SFTConfig or DPOConfig
    dtype: str | None = None,  # what the weights are loaded in; None: the checkpoint's
    keep_dense: bool = False,  # packed layers are decoded once
    accelerator: bool | None = None,  # foresee a GPU; default: whether the run would use one
) -> MemoryEstimate:
    """Bytes by part for a run of `options` and `arguments`; no weight is read.

    Raises UsageError for a checkpoint without factored layers, and for a mode that it does not allow.
    """
    on_gpu = (torch.accelerator.is_available() and not arguments.use_cpu) if accelerator is None else accelerator
    model = factored_skeleton(source, dtype, options.model_name_or_path)
    with torch.device("meta"):
        exposed = expose(model, options)
    decode_by_shapes(exposed)
    notes = []
    with without_content(exposed, arguments), fitting_pieces(on_gpu):
        if keep_dense:
            dequantize_once(exposed, model.dtype)
        weights, adapters, blocks = held(exposed)
        adapters *= 2 if options.objective == DPO else 1  # trl keeps a copy as the reference
        trained = [p for p in exposed.parameters() if p.requires_grad]
        state = _optimizer_bytes(arguments.optim, trained)
        if state is None:
            name = getattr(arguments.optim, "value", arguments.optim)
            notes.append(f"the state of the optimizer {name} is not known and not counted")
        teacher = _teacher(options, dtype) if options.objective == DISTILL else None
        size = taught = 0 if teacher is None else sum(held(teacher)[:2])
        if options.teacher_logits is not None:
            teacher, taught = None, 0
        loss, tokens = _prepared(exposed, arguments, on_gpu, options, teacher)
        if arguments.gradient_accumulation_steps > 1:  # all but the first batch find gradients there
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        start = gradient_bytes(exposed)
        with Live(exposed, blocks) as live:
            with Saved(exposed, blocks) as saved, _autocast(arguments):
                value = loss()
            value.backward()
            del value
        gradients = gradient_bytes(exposed)
    update = 0 if "fused" in arguments.optim else _update_bytes(trained, on_gpu)
    beside = max(start + live.peak, gradients + update)
    peak = weights + adapters + (state or 0) + taught + beside
    if size > taught:
        notes.append(f"the first run holds the teacher too, {human_bytes(size)}, while it writes teacher_logits")
        peak = max(peak, weights + adapters + size)
    return MemoryEstimate(
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=state,
        activations=saved.activations,
        logits=live.logits,
        teacher=taught,
        peak=peak,
        held=_held_by_libraries(),
        tokens=tokens,
        notes=notes,
    )


def _held_by_libraries() -> int:
    """Resident bytes of this process, with what a run imports anyway."""
    from . import trainers

    assert trainers is not None
    return held_bytes(torch.device("cpu"))


def _teacher(options: TrainOptions, dtype: str | None) -> PreTrainedModel | None:
    """The skeleton of the model to distill from; None if its likely tokens are in a folder already."""
    if options.teacher_logits is not None and (Path(options.teacher_logits) / INDEX).is_file():
        return None
    source, dtype = teacher_source(options), dtype or _dtype_of(options.model_name_or_path)
    if _manifest(model_class(source)[1]) is None:
        return skeleton(source, dtype).requires_grad_(False)
    model = factored_skeleton(source, dtype)
    decode_by_shapes(model)
    return model


def _dtype_of(source: str) -> str:
    wanted = getattr(model_class(source)[1], "dtype", None) or torch.float32
    return next(name for name, kind in DTYPE_NAMES.items() if kind == wanted)


def _manifest(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a factored checkpoint's configuration says about its layers; None for another model's."""
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    return found if found and found.get("quant_method") == QUANT_METHOD else None


def factored_skeleton(name: str, dtype: str | None = None, called: str | None = None) -> PreTrainedModel:
    """A factored checkpoint's model on the meta device, from its config.json; `called`: by whom asked for it."""
    build, config = model_class(name)
    manifest = _manifest(config)
    if manifest is None:
        raise UsageError(
            f"{called or name} has no factored layers; run `lord-tune decompose` first and train its output."
        )
    config = copy.deepcopy(config)
    del config.quantization_config
    config._name_or_path = ""  # nothing is to be looked up in the checkpoint's files
    wanted = DTYPE_NAMES[dtype] if dtype else (getattr(config, "dtype", None) or torch.float32)
    with torch.device("meta"):
        make = getattr(build, "_from_config", None) or build.from_config
        model = make(config, dtype=wanted)
    quantizer = LordQuantizer(LordConfig(**{k: v for k, v in manifest.items() if k != "quant_method"}))
    quantizer._process_model_before_weight_loading(model)
    return model.requires_grad_(False)


def _prepared(
    model: PeftModel, arguments: TrlConfig, on_gpu: bool, options: TrainOptions, teacher: PreTrainedModel | None
) -> tuple[Callable[[], Tensor], int]:
    """(a function that gives the loss of one full batch, its tokens); the model is set up as the trainer would."""
    base = plain_model(model)
    limit = max_length(base)
    kind = trained_kind(model)
    length = min(arguments.max_length or (512 if kind == "masked" else limit), limit)
    rows = arguments.per_device_train_batch_size * (2 if options.objective == DPO else 1)  # chosen and rejected
    packing = kind == "causal" and getattr(arguments, "packing", False)
    flattened = packing and cast("SFTConfig", arguments).packing_strategy in ("bfd", "bfd_split")
    packed = kind == "causal" and (flattened or getattr(arguments, "padding_free", False))
    shape = (1, rows * length) if packed else (rows, length)
    ids = torch.zeros(shape, dtype=torch.long, device=next(model.parameters()).device)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    whole = rows == 1 or packing  # no row is padded
    set_attention(base.config, packed or not whole, on_gpu)
    model.train()
    if arguments.gradient_checkpointing:
        model.enable_input_require_grads()
        given = dict(arguments.gradient_checkpointing_kwargs or {"use_reentrant": False})
        # no random state: it has content
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given | {"preserve_rng_state": False})
    if kind == "masked":
        return lambda: model(**batch).loss, ids.numel()
    if options.objective == DISTILL:
        if teacher is not None:
            set_attention(teacher.config, packed or not whole, on_gpu)
        return lambda: _distillation_loss(base, teacher, batch, options), ids.numel()
    if options.objective == DPO:
        return lambda: _with_reference(base, batch, on_gpu), ids.numel()
    return lambda: _causal_loss(base, batch, on_gpu), ids.numel()


def _causal_loss(base: PreTrainedModel, batch: dict[str, Tensor], on_gpu: bool) -> Tensor:
    """The loss of trl's SFTTrainer, which never holds whole logits."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    hidden = base.base_model(**given, use_cache=False).last_hidden_state[:, :-1]
    head = base.get_output_embeddings()
    return LossInPieces.apply(hidden.reshape(-1, hidden.shape[-1]), head.weight, on_gpu).sum()


def _with_reference(base: PreTrainedModel, batch: dict[str, Tensor], on_gpu: bool) -> Tensor:
    """trl's DPOTrainer runs the reference while the graph of the trained model is there."""
    loss = _causal_loss(base, batch, on_gpu)
    with torch.no_grad():
        _causal_loss(base, batch, on_gpu)
    return loss


def _distillation_loss(
    base: PreTrainedModel, teacher: PreTrainedModel | None, batch: dict[str, Tensor], options: TrainOptions
) -> Tensor:
    """That of training/distillation.py, every token counted."""
    given = {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}
    found = None
    if teacher is not None:
        with torch.no_grad():
            found = teacher.base_model(**given).last_hidden_state[:, :-1].flatten(0, 1)

    def kl(part: slice, student: Tensor) -> Tensor:
        if found is None or teacher is None:
            kept = len(student), min(options.teacher_top_k, student.shape[1])
            stored = {
                "values": student.new_empty(kept, dtype=torch.float16),
                "ids": student.new_empty(kept, dtype=torch.int32),
                "tail": student.new_empty(kept[0], dtype=torch.float32),
            }
            return bucketed_kl(student, stored, options.distill_temperature)
        with torch.no_grad():
            targets = head_of(teacher)(found[part])
        return kl_divergence(student, targets, options.distill_temperature)

    hidden = base.base_model(**given).last_hidden_state[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    chunk = max(1, CHUNK // base.config.get_text_config().vocab_size)
    weights = options.distill_ce_weight, options.distill_temperature
    return TokenLoss.apply(hidden, labels, head_of(base), kl, *weights, chunk)[0]


def _autocast(arguments: TrlConfig) -> contextlib.AbstractContextManager[object]:
    if arguments.bf16 or arguments.fp16:
        return torch.autocast("cpu", torch.bfloat16 if arguments.bf16 else torch.float16)
    return contextlib.nullcontext()


def _optimizer_bytes(name: str | Enum, trained: Sequence[Tensor]) -> int | None:
    """State after the first step."""
    full = str(getattr(name, "value", name))
    key = full.removeprefix("paged_").replace("_bnb", "")
    if key == "adafactor":  # row and column sums of matrices (transformers' default: no momentum)
        return sum(4 * (sum(p.shape[-2:]) * p[..., 0, 0].numel() if p.dim() > 1 else p.numel()) for p in trained)
    if full in ("lion_32bit", "paged_lion_32bit", "paged_adamw_32bit", "paged_ademamix_32bit"):
        key = key.removesuffix("_32bit")
    if key not in _BYTES_PER_NUMBER:
        return None
    each = _BYTES_PER_NUMBER[key]
    if key.endswith("_8bit"):  # and a scale per 256 numbers and moment
        return sum(int(p.numel() * (4 * each if p.numel() < _SMALL else each * (1 + 4 / 256))) for p in trained)
    return sum(int(p.numel() * each) + (4 if key in _COUNTED_STEPS else 0) for p in trained)


def _update_bytes(trained: Sequence[Tensor], on_gpu: bool) -> int:
    """Temporaries of an update: of all tensors together on a GPU (foreach), of one after the other on a CPU."""
    sizes = [p.numel() * p.element_size() for p in trained]
    return sum(sizes) if on_gpu else 2 * max(sizes, default=0)
