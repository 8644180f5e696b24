"""Rows of a dataset in trl's columns, and what of the first one the loss counts."""

from __future__ import annotations

from typing import Any

from ..calibration.corpus import RowFormat, load_rows, prompt_of, recognise
from ..errors import LordError, UsageError

_CHECKED_ROWS = 64


def prepare_rows(source: str, split: str, config: str | None, tokenizer: Any) -> tuple[Any, RowFormat]:
    """A dataset in trl's columns (text; messages; prompt + completion) and what was recognised."""
    rows = load_rows(source, split, config)
    form = recognise(rows.column_names)
    if len(rows) == 0:
        raise UsageError(f"The dataset '{source}' is empty; give rows to train on.")
    if form.kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"'{source}' holds chat messages and the model has no chat template; give text or prompts.")
    if form.kind == "prompt_completion":
        columns = list(rows.column_names)
        return rows.map(
            lambda row: {"prompt": prompt_of(row, form), "completion": row[form.completion]}, remove_columns=columns
        ), form
    return rows.select_columns([form.kind]), form


def sample_spans(trainer: Any, tokenizer: Any, require_eos: bool) -> list[tuple[str, bool]]:
    """The first training sequence as text pieces, each with whether the loss counts it.

    Raises LordError if none of the first rows has a trained token, or no completion teaches the end of the text.
    """
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    if "labels" in trainer.train_dataset.column_names:
        heads = trainer.train_dataset.select(range(min(_CHECKED_ROWS, len(trainer.train_dataset))))["labels"]
        if not any(label != -100 for row in heads for label in row):
            raise LordError(
                "No token of the first rows is trained on (all are masked); check the columns and max_length."
            )
        if require_eos and not any(row[-1] == tokenizer.eos_token_id for row in heads):
            raise LordError(
                "No completion ends with the end-of-text token, so the model would not learn to stop; raise max_length "
                f"(all first {len(heads)} rows are truncated) or check the tokenizer's eos_token."
            )
    spans: list[tuple[list[int], bool]] = []
    for token, label in zip(ids, labels, strict=True):
        marked = label != -100
        if not spans or spans[-1][1] != marked:
            spans.append(([], marked))
        spans[-1][0].append(token)
    return [(tokenizer.decode(tokens), marked) for tokens, marked in spans]
