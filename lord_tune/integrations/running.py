"""Run a model on token ids: its kind, its loss, its longest window; the task that `decompose` gets."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..calibration.task import Task
from ..errors import LordWarning, UsageError
from ..layers import plain_model
from ..protocols import CausalModel, Tokenizer

MASKED_FRACTION = 0.15  # of the tokens, for models with a masked-token head (BERT)


def kind_of(model: nn.Module) -> str:
    """causal, masked or bare, from what the model can be asked."""
    plain = plain_model(model)
    if plain.get_output_embeddings() is None:
        return "bare"
    return "causal" if plain.can_generate() else "masked"


def _run(model: nn.Module, ids: Tensor) -> Any:
    ids = ids.to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False) if kind_of(model) == "causal" else model(input_ids=ids)


def run_on_meta(model: nn.Module, ids: Tensor) -> Any:
    """A forward pass of a skeleton. Decoders look for packed sequences unless they are given a mask; encoders look into
    a mask they are given. Either look is impossible on the meta device."""
    if kind_of(model) == "causal":
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return model(input_ids=ids)


def masked_windows(ids: Tensor, mask_token: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids with 15 % replaced by the mask token, and labels that are -100 elsewhere; at least one per window."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(ids.shape, generator=generator, device="cpu") < MASKED_FRACTION
    chosen[:, ids.shape[1] // 2] = True
    return torch.where(chosen, mask_token, ids), torch.where(chosen, ids, -100)


def summed_loss(model: nn.Module, ids: Tensor, mask_token: int | None = None) -> tuple[Tensor, int]:
    """(summed loss, predicted tokens) of windows (batch, length): next token, or masked tokens; float32 logits.

    A model without a head has no loss on text; its "loss" is a fixed random projection of the last hidden states,
    whose squared gradient estimates, by Hutchinson's method, how much each layer's output moves these states.
    """
    kind = kind_of(model)
    ids = ids.to(next(model.parameters()).device)
    if kind == "bare":
        hidden = _run(model, ids).last_hidden_state.float()
        generator = torch.Generator().manual_seed(int(ids.sum()))
        weights = torch.randn(hidden.shape, generator=generator, device="cpu").to(hidden)
        return (hidden * weights).sum(), ids.numel()
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


def task_of(tokenizer: Tokenizer, masked: bool = False) -> Task:
    """How `decompose` runs any of these models; `masked`: one with a masked-token head."""
    mask_token = getattr(tokenizer, "mask_token_id", None)

    def prepare(ids: Tensor) -> Tensor:
        return masked_windows(ids, mask_token)[0] if masked and mask_token is not None else ids

    return Task(_run, lambda model, ids: summed_loss(model, ids, mask_token)[0], prepare)


def max_length(model: CausalModel | PreTrainedConfig) -> int:
    """The longest window the positions of a model (or of a config) allow."""
    config = (model if isinstance(model, PreTrainedConfig) else model.config).get_text_config()
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    limit = min((n for n in limits if isinstance(n, int) and n > 0), default=1 << 30)
    # RoBERTa-style position ids start after the padding id
    offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "mpnet" else 0
    return limit - (offset or 0)


def window_length(asked: int, model: CausalModel | PreTrainedConfig) -> int:
    """The context length to use: what was asked for, or with a warning the most the model takes."""
    limit = max_length(model)
    if asked > limit:
        warnings.warn(
            f"The model takes {limit} tokens at most; windows of {limit} are used.", LordWarning, stacklevel=3
        )
    return min(asked, limit)
