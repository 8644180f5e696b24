"""Compare the outputs of a written model with those of the model it was written from."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import UsageError
from ..integrations.running import counted_outputs, run_model
from ..protocols import CausalModel, Tokenizer

# KL in nats per token between unmerged and written model; float32 differs in the order of summation only,
# 16-bit weights by their rounding (relative 2^-9 for bfloat16 on every weight)
THRESHOLDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
PROBE_TOKENS = 256
PROBE_TEXT = '''def moving_average(values, width):
    """Return the mean of each window of `width` consecutive values."""
    if width < 1:
        raise ValueError("width must be at least 1")
    total, result = sum(values[:width]), []
    for old, new in zip(values, values[width:] + [0]):
        result.append(total / width)
        total += new - old
    return result


The lighthouse keeper climbed the stairs every evening, counting the steps aloud, and wrote the weather of the day into
a book that nobody had asked him to keep. In winter the wind came from the north and the ink froze in its glass.
'''


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Unmerged against written model on the probe text."""

    kl: float  # mean KL(unmerged || written), nats per token
    max_logit_difference: float
    top1_agreement: float
    tokens: int


def probe_ids(tokenizer: Tokenizer, text: str | None, longest: int = PROBE_TOKENS) -> Tensor:
    """(1, length) ids of the comparison text, at most `longest`."""
    ids = tokenizer(PROBE_TEXT if text is None else text, verbose=False)["input_ids"][:longest]
    if len(ids) < 2:
        raise UsageError(f"The comparison text has {len(ids)} tokens; at least 2 are needed.")
    return torch.tensor([ids])


@torch.no_grad()
def outputs_of(model: CausalModel, ids: Tensor) -> Tensor:
    """Logits of a head, whatever it calls them, or last hidden states; (row, width) float32 on the CPU."""
    found = counted_outputs(run_model(model.eval(), ids))
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found if x.shape[-1] == found[0].shape[-1]]).cpu()


def compare(reference: Tensor, written: Tensor) -> Comparison:
    """Both (token, vocabulary)."""
    p, q = reference.double().log_softmax(-1), written.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0))
    agreement = float((reference.argmax(-1) == written.argmax(-1)).double().mean())
    return Comparison(kl, float((reference - written).abs().max()), agreement, reference.shape[0])
