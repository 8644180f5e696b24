"""How closely a model follows another one, its original: KL divergence and agreement of the likeliest token.

Both run on one window after the other, and what is kept of a window are a few numbers: never more than one window of
logits of each model is in memory. Both models are, though.

KL is sum_v p(v) log(p(v) / q(v)) in nats, p the original's distribution of a token, q the model's, float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LordError, UsageError
from ..integrations.running import kind_of, task_of
from ..protocols import CausalModel, Tokenizer
from .statistics import clustered_mean

_ROWS = 128  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class Agreement:
    """Sums over the predicted tokens of each window, (window,) float64 each."""

    kl: Tensor  # nats
    same: Tensor  # tokens of which both models find the same one the likeliest
    loss: Tensor  # nats, of the model
    original_loss: Tensor  # nats
    tokens: Tensor

    def joined(self, other: Agreement) -> Agreement:
        """Of two texts together."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        return Agreement(**{name: torch.cat(pair) for name, pair in pairs.items()})

    def to_dict(self) -> dict[str, float | int | None]:
        """The keys of `original` in `evaluate --json`; standard errors over windows, see statistics.py."""
        found: dict[str, float | int | None] = {}
        told = {"kl": self.kl, "top1_agreement": self.same, "loss_difference": self.loss - self.original_loss}
        for name, sums in told.items():
            mean = clustered_mean(sums, self.tokens)
            found |= {name: mean.value, f"{name}_standard_error": mean.standard_error}
        loss = clustered_mean(self.original_loss, self.tokens).value
        found |= {"perplexity": math.exp(loss), "loss": loss, "top1_tokens": int(self.same.sum())}
        return found | {"tokens": int(self.tokens.sum()), "windows": len(self.tokens)}


def check_comparable(model: CausalModel, tokenizer: Tokenizer, original: CausalModel, its_tokenizer: Tokenizer) -> None:
    """UsageError unless both predict the same tokens."""
    if kind_of(original) != kind_of(model):
        raise UsageError(f"`original` is a {kind_of(original)} model, the evaluated one {kind_of(model)}.")
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UsageError("`original` has another vocabulary, so its predictions cannot be compared token by token.")


@torch.no_grad()
def agreement(
    model: CausalModel,
    original: CausalModel,
    tokenizer: Tokenizer,
    windows: Tensor,  # (window, length)
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Agreement:
    """Compare two models window by window."""
    predicted = task_of(tokenizer, kind_of(model)).predicted
    assert predicted is not None, "a model without a head was refused with its perplexity"
    rows: list[tuple[float, ...]] = []
    for index, window in enumerate(windows):
        wanted, labels = predicted(original, window[None])
        logits, _ = predicted(model, window[None])
        if logits.shape != wanted.shape:
            raise UsageError(
                f"The model has logits of {logits.shape[-1]} tokens and `original` of {wanted.shape[-1]}; they cannot "
                "be compared."
            )
        rows.append(_compare(wanted, logits.to(wanted.device), labels.to(wanted.device)))
        progress("comparing with the original", index + 1, len(windows))
    found = Agreement(*torch.tensor(rows, dtype=torch.float64).T)
    if not bool(torch.isfinite(found.kl + found.loss + found.original_loss).all()):
        raise LordError("The KL or a loss is NaN or Inf; one of the models is broken or its dtype is too narrow.")
    return found


def _compare(
    wanted: Tensor,  # (tokens, vocabulary) logits of the original
    logits: Tensor,  # (tokens, vocabulary)
    labels: Tensor,  # (tokens,)
) -> tuple[float, ...]:
    """The fields of Agreement for one window."""
    kl = same = loss = original_loss = 0.0
    for start in range(0, len(labels), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = wanted[rows].log_softmax(-1), logits[rows].log_softmax(-1)
        each = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))  # 0 log 0 = 0
        kl += float(each.double().sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        loss += float(nn.functional.nll_loss(q, labels[rows], reduction="sum"))
        original_loss += float(nn.functional.nll_loss(p, labels[rows], reduction="sum"))
    return kl, same, loss, original_loss, float(len(labels))
