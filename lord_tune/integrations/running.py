"""Run a model on token ids: its kind, its loss, its longest window; the task that `decompose` gets."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..calibration.blocks import AnyScalar
from ..calibration.task import LOGIT_ROWS, Task
from ..errors import LordWarning, UsageError
from ..layers import plain_model
from ..protocols import Tokenizer

MASKED_FRACTION = 0.15  # of the tokens, for models with a masked-token head (BERT)


def kind_of(model: nn.Module) -> str:
    """causal, masked, seq2seq (encoder and decoder) or bare, from what the model can be asked."""
    plain = plain_model(model)
    if plain.get_output_embeddings() is None:
        return "bare"
    if getattr(plain.config, "is_encoder_decoder", False):
        return "seq2seq"
    return "causal" if plain.can_generate() else "masked"


def run_model(model: nn.Module, ids: Tensor) -> Any:
    """A forward pass on (batch, length) ids that starts and keeps no key-value cache: a window sees itself alone. The
    decoder of an encoder-decoder gets the same ids, shifted by one, as its own loss gives it."""
    plain = plain_model(model)
    ids = ids.to(_device(plain))
    accepted = inspect.signature(type(plain).forward).parameters
    given: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    given |= decoder_inputs(plain, ids)
    with _no_cache(plain.config):
        return model(input_ids=ids, **given)


def decoder_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder reads beside `ids`; empty for other models."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return {}
    accepted = inspect.signature(type(model).forward).parameters
    return {"decoder_input_ids": _shifted(model.config, ids)} if "decoder_input_ids" in accepted else {}


def _device(model: PreTrainedModel) -> torch.device:
    """Of the embeddings; other parts may be on the meta device while the model is run block by block."""
    embeddings = next(model.get_input_embeddings().parameters(), None)
    if embeddings is not None:
        return embeddings.device
    return next((p for p in model.parameters() if not p.is_meta), next(model.parameters())).device


@contextmanager
def _no_cache(config: PreTrainedConfig) -> Iterator[None]:
    """Models without a `use_cache` argument of their own hand their configuration's on."""
    before = {id(c): (c, c.use_cache) for c in (config, config.get_text_config()) if getattr(c, "use_cache", False)}
    for changed, _ in before.values():
        changed.use_cache = False
    try:
        yield
    finally:
        for changed, value in before.values():
            changed.use_cache = value


def _shifted(config: PreTrainedConfig, ids: Tensor) -> Tensor:
    """What a decoder reads to predict `ids`: its start token, then the ids but for the last."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
    found = [getattr(c, name, None) for c in (config, config.get_text_config(decoder=True)) for name in names]
    start = next((n for n in found if isinstance(n, int)), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def run_on_meta(model: nn.Module, ids: Tensor) -> Any:
    """The same on a skeleton without values."""
    with AnyScalar():
        return run_model(model, ids)


def masked_windows(ids: Tensor, mask_token: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids with 15 % replaced by the mask token, and labels that are -100 elsewhere; at least one per window."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(ids.shape, generator=generator, device="cpu") < MASKED_FRACTION
    chosen[:, ids.shape[1] // 2] = True
    return torch.where(chosen, mask_token, ids), torch.where(chosen, ids, -100)


def summed_loss(model: nn.Module, ids: Tensor, mask_token: int | None = None) -> tuple[Tensor, int]:
    """(summed loss, predicted tokens) of windows (batch, length): next token, masked tokens, or an encoder-decoder's
    own ids again; float32 logits.

    A model without a language-model head has no loss on text: none at all, or a head for labels that are not there. Its
    "loss" is a fixed random projection of what it outputs, whose squared gradient estimates, by Hutchinson's method,
    how much each layer's output moves that.
    """
    kind = kind_of(model)
    ids = ids.to(_device(plain_model(model)))
    if kind == "bare":
        outputs = counted_outputs(run_model(model, ids))
        generator = torch.Generator().manual_seed(int(ids.sum()))
        weights = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in outputs]
        return torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True)]).sum(), ids.numel()
    logits, labels = _predictions(model, ids, mask_token)
    count = int((labels != -100).sum())
    rows, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    # with gradients every probability is kept anyway; without, a copy of the logits is as large as the head
    length = len(rows) if torch.is_grad_enabled() else LOGIT_ROWS
    parts = zip(rows.split(length), wanted.split(length), strict=True)
    losses = [nn.functional.cross_entropy(own, labels, reduction="sum") for own, labels in parts]
    return torch.stack(losses).sum(), count


def _predictions(model: nn.Module, ids: Tensor, mask_token: int | None) -> tuple[Tensor, Tensor]:
    """(logits (batch, n, vocabulary) float32, labels (batch, n)) of a model with a language-model head."""
    read, labels = _labelled(model, ids, mask_token)
    logits = run_model(model, read).logits.float()
    return (logits[:, :-1], labels[:, 1:]) if kind_of(model) == "causal" else (logits, labels)


def _labelled(model: nn.Module, ids: Tensor, mask_token: int | None) -> tuple[Tensor, Tensor]:
    """What a model with a language-model head reads of windows (batch, length), and the labels of its loss."""
    if kind_of(model) != "masked":
        return ids, ids
    if mask_token is None:
        raise UsageError("The tokenizer has no mask token, which a masked language model needs.")
    masked, labels = masked_windows(ids.cpu(), mask_token)
    return masked, labels.to(_device(plain_model(model)))


@torch.no_grad()
def check_loss(model: nn.Module, ids: Tensor, mask_token: int | None = None) -> None:
    """UsageError unless `summed_loss` is what the model's own forward pass, given labels, computes on windows (batch,
    length), and a causal model answers from earlier tokens alone. Part of a loss that is not of tokens is left out."""
    plain, kind = plain_model(model), kind_of(model)
    accepted = inspect.signature(type(plain).forward).parameters
    given: dict[str, Any] = {"output_router_logits": False} if "output_router_logits" in accepted else {}
    read, labels = _labelled(model, ids.to(_device(plain)), mask_token)
    summed, count = summed_loss(model, ids, mask_token)
    what = {"causal": "the next token", "masked": "the masked tokens"}.get(kind, "the same text in the decoder")
    if "labels" in accepted:
        try:
            with _no_cache(plain.config):
                own = model(input_ids=read.to(_device(plain)), labels=labels, **given).loss
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"{type(plain).__name__} computes no loss of {what} ({error}), so it has no perplexity."
            ) from error
        if own is not None and not abs(float(own) - float(summed) / count) <= 0.02 * (1 + abs(float(own))):  # bfloat16
            raise UsageError(
                f"{type(plain).__name__} computes a loss of {float(own):.4f} where the cross-entropy of {what} is "
                f"{float(summed) / count:.4f}; it is trained for something else, so it has no perplexity."
            )
    short = ids[:1, :16]
    other = short.clone()
    other[0, -1] = next((token for token in short[0] if token != short[0, -1]), short[0, -1] - 1).abs()
    before, after = (run_model(model, x).logits[0, :-1].float() for x in (short, other))
    if kind == "causal" and not torch.allclose(before, after, rtol=0, atol=1e-2 * float(before.abs().max())):
        raise UsageError(
            f"{type(plain).__name__} predicts a token from later ones as well, so its perplexity would mean nothing; "
            "load the checkpoint as a masked language model, or set is_decoder in its config.json."
        )


def counted_outputs(result: object) -> list[Tensor]:
    """float32: the logits of a head, whatever it calls them; else the last hidden states."""
    assert isinstance(result, ModelOutput), "transformers' models return one unless they are told not to"
    named = [value for key, value in result.items() if key.endswith("logits") and isinstance(value, Tensor)]
    return [x.float() for x in named] or [result["last_hidden_state"].float()]


def task_of(tokenizer: Tokenizer, kind: str = "causal") -> Task:
    """How `decompose` runs any of these models; kind: see `kind_of`."""
    masked = kind == "masked"
    mask_token = getattr(tokenizer, "mask_token_id", None)

    def prepare(ids: Tensor) -> Tensor:
        return masked_windows(ids, mask_token)[0] if masked and mask_token is not None else ids

    def scored(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
        return summed_loss(model, ids, mask_token)

    def predicted(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = _predictions(model, ids.to(_device(plain_model(model))), mask_token)
        logits, labels = logits.flatten(0, 1), labels.flatten()
        chosen = labels != -100
        return (logits, labels) if bool(chosen.all()) else (logits[chosen], labels[chosen])

    known = (None, None) if kind == "bare" else (scored, predicted)
    return Task(run_model, lambda model, ids: scored(model, ids)[0], counted_outputs, prepare, *known)


_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)


def max_length(model: nn.Module) -> int:
    """The longest window that the positions of a model, which may be a skeleton, allow."""
    plain = plain_model(model)
    config = plain.config.get_text_config()
    limits = [getattr(config, key, None) for key in _LIMITS]
    limit = min((n for n in limits if isinstance(n, int) and n > 0), default=1 << 30)
    return limit - _first_position(plain, limit)


def _first_position(model: PreTrainedModel, rows: int) -> int:
    """Where position ids start: after the padding id, in a table of positions that has one (RoBERTa and its like)."""
    words = model.get_input_embeddings()
    return max((_padding_id(m, rows) + 1 for m in model.modules() if m is not words), default=0)


def _padding_id(module: nn.Module, rows: int) -> int:
    """The row for padding of a table of this length; -1 for any other module."""
    weight = module._parameters.get("weight")
    padding = getattr(module, "padding_idx", None)
    if isinstance(padding, int) and weight is not None and weight.dim() == 2 and weight.shape[0] == rows:
        return padding
    return -1


def window_length(asked: int, model: nn.Module) -> int:
    """The context length to use: what was asked for, or with a warning the most the model takes."""
    limit = max_length(model)
    if asked > limit:
        warnings.warn(
            f"The model takes {limit} tokens at most; windows of {limit} are used.", LordWarning, stacklevel=3
        )
    return min(asked, limit)
