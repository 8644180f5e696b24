"""Low-precision storage formats, one file each; `QUANTIZERS` lists them by name, `make_quantizer` makes one."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..declared import Options
from ..errors import unknown_name
from .base import Quantizer
from .e8 import E8P2, E8P3, E8P4
from .engines import Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, W2A16, W4A16, W8A16
from .ggml import GGML
from .incoherence import Rotated
from .integer import Int2, Int3, Int4, Int8
from .lloyd import Lloyd2, Lloyd3, Lloyd4
from .nf4 import NF4
from .spqr import SpQR

QUANTIZERS: dict[str, type[Any]] = {
    form.name: form
    for form in (
        *(NF4, Int2, Int3, Int4, Int8, Lloyd2, Lloyd3, Lloyd4, E8P2, E8P3, E8P4, SpQR),
        *(Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, W2A16, W4A16, W8A16),
    )
}
GIVEN: dict[str, type[Any]] = {GGML.name: GGML}  # formats of codes that another program has chosen
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # formats that need no quantizer

__all__ = [
    "DTYPES",
    "GGML",
    "GIVEN",
    "E8P2",
    "E8P3",
    "E8P4",
    "NF4",
    "QUANTIZERS",
    "Q2_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "Lloyd2",
    "Lloyd3",
    "Lloyd4",
    "Quantizer",
    "Rotated",
    "SpQR",
    "W2A16",
    "W4A16",
    "W8A16",
    "make_quantizer",
]


def make_quantizer(name: str, options: Options | None = None) -> Quantizer:
    """A quantizer by name; UsageError with the nearest name if there is none. The options `incoherence` and `seed` wrap
    any format in a rotation."""
    known = QUANTIZERS | GIVEN
    if name not in known:
        raise unknown_name("format", name, [*QUANTIZERS, *DTYPES])
    own = dict(options or {})
    seed = own.pop("seed", 0)
    rotated = own.pop("incoherence", False)
    inner: Quantizer = known[name](**own)
    if not rotated:
        return inner
    if not isinstance(seed, int):
        raise TypeError(f"seed {seed!r} came, a whole number is expected")
    return cast(Quantizer, Rotated(inner, seed))  # its name is a property: that of the inner format
