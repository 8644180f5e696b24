"""Compare the outputs of a written model with those of the model it was written from."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import UsageError
from ..integrations.running import counted_outputs, kind_of, run_model
from ..protocols import CausalModel, Tokenizer

# KL in nats per token between unmerged and written model; float32 differs in the order of summation only,
# 16-bit weights by their rounding (relative 2^-9 for bfloat16 on every weight)
THRESHOLDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# ||written - unmerged|| / ||unmerged|| of outputs that are not the logits of tokens: softmax would not see what moves
# all of them, and of a single one nothing. The rounding of weights adds up over some tens of layers
DIFFERENCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}
COMPARED_ROWS = 32  # of outputs that are compared at once, in float64
WINDOWS = 8  # that a head with one output per text is compared on
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

    kl: float | None  # mean KL(unmerged || written), nats per token; None without a language-model head
    relative_difference: float  # ||written - unmerged|| / ||unmerged||
    max_logit_difference: float
    top1_agreement: float | None  # None without a language-model head
    tokens: int

    def __str__(self) -> str:
        if self.kl is None or self.top1_agreement is None:
            largest = f"largest {self.max_logit_difference:.2g}"
            return f"{self.tokens} outputs: relative difference {self.relative_difference:.2g}, {largest}"
        return (
            f"{self.tokens} tokens: KL {self.kl:.2g} nats per token, largest logit difference "
            f"{self.max_logit_difference:.2g}, top-1 agreement {self.top1_agreement:.3f}"
        )

    def deviation(self) -> tuple[str, float]:
        """What must stay under the threshold, in words and as a number."""
        if self.kl is not None:
            return "KL in nats per token", self.kl
        return "relative difference of the outputs", self.relative_difference

    def limit(self, dtypes: list[str]) -> float:
        """The threshold where the written model rounds to these."""
        table = DIFFERENCES if self.kl is None else THRESHOLDS
        return max(table.get(name, 0.0) for name in dtypes)


def probe_ids(tokenizer: Tokenizer, text: str | None, longest: int = PROBE_TOKENS) -> Tensor:
    """(1, length) ids of the comparison text, at most `longest`."""
    ids = tokenizer(PROBE_TEXT if text is None else text, verbose=False)["input_ids"][:longest]
    if len(ids) < 2:
        raise UsageError(f"The comparison text has {len(ids)} tokens; at least 2 are needed.")
    return torch.tensor([ids])


def probe_windows(model: CausalModel, ids: Tensor) -> Tensor:
    """The text (1, length) in several windows where the model has no language-model head: it may answer once each."""
    length = ids.shape[1] // WINDOWS
    return ids if kind_of(model) != "bare" or length < 2 else ids[:, : length * WINDOWS].reshape(WINDOWS, length)


@torch.no_grad()
def outputs_of(model: CausalModel, ids: Tensor) -> Tensor:
    """Logits of a head, whatever it calls them, or last hidden states; (row, width) float32 on the CPU. ids: (window,
    length), run one by one."""
    found = [x for window in ids for x in counted_outputs(run_model(model.eval(), window[None]))]
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found if x.shape[-1] == found[0].shape[-1]]).cpu()


def compare(reference: Tensor, written: Tensor, tokens: bool = True) -> Comparison:
    """Both (row, width); tokens: whether they are logits of a vocabulary, whose softmax is what counts."""
    norms, divergences, largest = [], [], []
    for one, other in zip(reference.split(COMPARED_ROWS), written.split(COMPARED_ROWS), strict=True):
        p, q = one.double(), other.double()
        norms.append(torch.stack([(p - q).norm(), p.norm()]))
        largest.append((one - other).abs().max())
        if tokens:
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1))
    difference, size = torch.stack(norms).norm(dim=0)
    kl = agreement = None
    if tokens:
        kl = float(torch.cat(divergences).mean().clamp_min(0))
        agreement = float((reference.argmax(-1) == written.argmax(-1)).double().mean())
    relative = float(difference / size.clamp_min(1e-30))
    return Comparison(kl, relative, float(torch.stack(largest).max()), agreement, reference.shape[0])
