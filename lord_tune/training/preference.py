"""objective: dpo. Preferences over pairs of answers (Rafailov et al. 2023, "Direct preference optimization", eq. 7):

    loss = -log sigmoid(beta (log pi(chosen) - log ref(chosen) - log pi(rejected) + log ref(rejected)))

in nats per pair. pi starts as ref, the decomposed model, so the first loss is ln 2 = 0.6931.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.files import load_rows
from ..data.rows import in_trl_columns, recognise_pairs, usable
from ..data.texts import renderer
from ..errors import LordError

if TYPE_CHECKING:
    from datasets import Dataset

    from ..protocols import Tokenizer, TrainerLike

COLUMNS = ("prompt", "chosen", "rejected")


def prepare_pairs(source: str, split: str, config: str | None, tokenizer: Tokenizer) -> Dataset:
    """A dataset with the columns prompt, chosen and rejected (and tools): strings, or lists of messages. Without a
    prompt, it is what both answers begin with; trl takes it out of them."""
    rows = load_rows(source, split, config)
    form = recognise_pairs(rows.column_names, source)
    kept = [index for index, _, _ in usable(rows, form, source, renderer(tokenizer, None, form, source))]
    return in_trl_columns(rows, form, kept)


def sample_pair(trainer: TrainerLike, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The first pair as text pieces, each with whether it is an answer that the loss compares."""
    if len(trainer.train_dataset) == 0:
        raise LordError("Every prompt alone fills max_length, so nothing of its answers is left; raise max_length.")
    row = trainer.train_dataset[0]
    prompt, chosen, rejected = (tokenizer.decode(row[f"{name}_ids"]) for name in COLUMNS)
    return [("prompt: " + prompt + "\nchosen: ", False), (chosen, True), ("\nrejected: ", False), (rejected, True)]
