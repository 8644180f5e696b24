"""Tokens that a tokenizer knows and an embedding has no row for.

transformers would end in an index error that names neither. A tokenizer may know more than the model without harm (a
padding token that no text holds), so that is a warning; text that holds such a token is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from ..errors import CheckpointError, LordWarning
from .running import kind_of


def embedding_rows(model: Any) -> int | None:
    """How many ids the model has an embedding for; None where that is not the rows of one matrix."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    rows = getattr(found, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def check_vocabulary(model: Any, tokenizer: Any, texts: Iterable[Any]) -> None:
    """CheckpointError if ids of `texts` (tensors or arrays), or the mask that replaces some of them, have no row in the
    embedding; a warning if the tokenizer could give such ids."""
    rows = embedding_rows(model)
    if rows is None:
        return
    used = [int(ids.max()) for ids in texts if len(ids)]
    mask = getattr(tokenizer, "mask_token_id", None)
    if kind_of(model) == "masked" and mask is not None:
        used.append(mask)
    known = f"the model's embedding has rows for the ids 0 to {rows - 1} only"
    largest = max(used, default=0)
    if largest >= rows:
        raise CheckpointError(
            f"The text holds the token {_token(tokenizer, largest)} with id {largest}, and {known}; use the tokenizer "
            "that belongs to the model."
        )
    beyond = sorted(number for number in tokenizer.get_vocab().values() if number >= rows)
    if beyond:
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        warnings.warn(
            f"The tokenizer has the token {_token(tokenizer, beyond[0])} with id {beyond[0]}{more}, and {known}; text "
            "that holds such a token cannot be used.",
            LordWarning,
            stacklevel=3,
        )


def _token(tokenizer: Any, number: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(number))
