"""The pieces of the vocabulary in which trl computes the loss of up to 4,096 tokens at once.

trl's are 32,768 words wide, for a GPU, where one kernel works in place. A CPU holds eight float32 copies of a piece:
2.2 GB for 2,048 tokens, almost as much as the activations of SmolLM2-135M. With ours the peak of that step is 3.1 GB
instead of 5.0, in the same time. No layer has this width, so logits are told from activations by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_OF_TRL, _ON_CPU = 32768, 4032


@contextlib.contextmanager
def fitting_pieces(on_gpu: bool) -> Iterator[None]:
    """Have trl compute in pieces that fit the device; a trl without this setting keeps its own way."""
    from trl.trainer import utils

    before = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", None)
    if before is None or on_gpu:
        yield
        return
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = _ON_CPU
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


def piece_width() -> int:
    """Words of a piece, as trl would compute now."""
    from trl.trainer import utils

    return int(getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", _OF_TRL))
