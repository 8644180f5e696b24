"""objective: dpo. Preferences over pairs of answers (Rafailov et al. 2023, "Direct preference optimization", eq. 7):

    loss = -log sigmoid(beta (log pi(chosen) - log ref(chosen) - log pi(rejected) + log ref(rejected)))

in nats per pair. pi starts as ref, the decomposed model, so the first loss is ln 2 = 0.6931.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.rows import load_rows
from ..errors import LordError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

    from ..protocols import Tokenizer, TrainerLike

COLUMNS = ("prompt", "chosen", "rejected")


def prepare_pairs(source: str, split: str, config: str | None, tokenizer: Tokenizer) -> Dataset:
    """A dataset with the columns prompt, chosen and rejected: strings, or lists of messages."""
    rows = load_rows(source, split, config)
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise UsageError(
            f"'{source}' has the columns {sorted(rows.column_names)}; objective: dpo expects prompt, chosen and "
            "rejected. Rename the columns."
        )
    if len(rows) == 0:
        raise UsageError(f"The dataset '{source}' is empty; give rows to train on.")
    kinds = {type(rows[0][name]) for name in COLUMNS}
    if kinds != {str} and kinds != {list}:
        raise UsageError(f"prompt, chosen and rejected of '{source}' must all be strings, or all lists of messages.")
    if kinds == {list} and not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"'{source}' holds chat messages and the model has no chat template; give strings.")
    return rows.select_columns(list(COLUMNS))


def sample_pair(trainer: TrainerLike, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The first pair as text pieces, each with whether it is an answer that the loss compares."""
    if len(trainer.train_dataset) == 0:
        raise LordError("Every prompt alone fills max_length, so nothing of its answers is left; raise max_length.")
    row = trainer.train_dataset[0]
    prompt, chosen, rejected = (tokenizer.decode(row[f"{name}_ids"]) for name in COLUMNS)
    return [("prompt: " + prompt + "\nchosen: ", False), (chosen, True), ("\nrejected: ", False), (rejected, True)]
