"""Recovery from the original model: the student learns the teacher's distribution over the next token.

With p the teacher's and q the student's probabilities at temperature T (softmax of logits / T), per counted token

    loss = (1 - w) T^2 KL(p || q) + w CE,    KL(p || q) = sum_v p_v (log p_v - log q_v)  in nats,

CE at temperature 1 (Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network", section 2; T^2 keeps
the gradient's size). Summed over the tokens that the labels count and divided by their number in the whole optimiser
step, over all processes and accumulated batches, as trl's SFTTrainer does.

Logits of a 50,000-word vocabulary weigh more than all else in a step, so no (tokens, vocabulary) tensor of a batch is
made: student and teacher hand over their last hidden states, and the head is applied to a few hundred tokens at a time.
The gradient by the hidden states is taken in the same pass (the head is frozen), as Liger's fused losses do; that saves
applying both heads a second time in the backward pass, and costs one tensor of the size of the hidden states.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UsageError
from ..layers import plain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..protocols import AutogradContext, CausalModel

CHUNK = 1 << 24  # logits per model that exist at a time: 64 MiB in float32
KlOfTokens = Callable[[slice, Tensor], Tensor]  # (which counted tokens, their float32 student logits) -> summed KL


class Teacher(Protocol):
    """Where the targets of a batch come from."""

    def targets(self, inputs: dict[str, Tensor], counted: Tensor) -> KlOfTokens:
        """`inputs` without labels; `counted` (batch, length - 1) marks the positions whose next token is trained."""


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of (tokens, vocabulary) logits at a temperature, summed over the tokens, nats."""
    log_q = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Last hidden states -> logits, with the scale and cap that some families put on them."""
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = next((s for n in _SCALES if (s := getattr(text, n, None)) is not None), None)
    divisor = getattr(text, "logits_scaling", None)  # Granite, MiniCPM3 divide by it, HyperCLOVA X multiplies
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    cap = getattr(text, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found = head(hidden)
        found = found if scale is None else found * scale
        return found if cap is None else cap * torch.tanh(found / cap)

    return logits


_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse, Falcon-H1


@torch.no_grad()
def check_head(model: CausalModel, ids: Tensor) -> None:
    """UsageError if a family computes its logits in a way `head_of` does not know. ids: (1, length)"""
    plain = plain_model(model)
    ids, training = ids.to(plain.device), plain.training
    plain.eval()  # dropout would differ
    whole = plain(input_ids=ids, use_cache=False).logits
    parts = head_of(plain)(plain.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    plain.train(training)
    if not torch.allclose(whole.float(), parts.float(), rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
        raise UsageError(f"objective: distill does not know how {type(plain).__name__} computes its logits; use sft.")


def hand_over_hidden_states(model: PreTrainedModel) -> None:
    """Make `model(..., on_hidden=f)` return f(last hidden states), so that the loss is computed inside the forward pass
    of whatever wraps the model (DDP, FSDP). Without `on_hidden` the forward pass is what it was."""
    before = model.forward

    @functools.wraps(type(model).forward)  # transformers reads the signature
    def forward(
        self: PreTrainedModel, *args: object, on_hidden: Callable[[Tensor], object] | None = None, **kwargs: object
    ) -> object:
        if on_hidden is None:
            return before(*args, **kwargs)
        return on_hidden(self.base_model(*args, **kwargs).last_hidden_state)

    model.forward = types.MethodType(forward, model)


class LiveTeacher:
    """The teacher in memory: frozen, and run on the same inputs as the student."""

    def __init__(self, model: CausalModel, temperature: float):
        self._model = plain_model(model).eval().requires_grad_(False)
        self._temperature = temperature

    @torch.no_grad()
    def targets(self, inputs: dict[str, Tensor], counted: Tensor) -> KlOfTokens:
        hidden = self._model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][counted]
        logits = head_of(self._model)

        def kl(part: slice, student: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = logits(hidden[part])
            return kl_divergence(student, teacher, self._temperature)

        return kl


class TokenLoss(torch.autograd.Function):
    """(summed loss, summed KL, summed CE, tokens whose label is the most likely one) of hidden states (tokens, width),
    a chunk of tokens at a time; only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: AutogradContext,
        hidden: Tensor,
        labels: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        kl_of: KlOfTokens,
        ce_weight: float,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if wanted else None
        sums = torch.zeros(4, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                piece = hidden[part].detach().requires_grad_(wanted)
                logits = logits_of(piece).float()
                kl = kl_of(part, logits)
                ce = F.cross_entropy(logits, labels[part], reduction="sum")
                loss = temperature**2 * kl if ce_weight == 0 else ce
                if 0 < ce_weight < 1:
                    loss = (1 - ce_weight) * temperature**2 * kl + ce_weight * ce
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(loss, piece)[0]
            hits = (logits.argmax(-1) == labels[part]).sum()
            sums += torch.stack([x.detach().float() for x in (loss, kl, ce, hits)])
        ctx.save_for_backward(gradient)
        outputs = tuple(sums.unbind())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: AutogradContext, *received: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * received[0].to(gradient.dtype), *[None] * 6)
