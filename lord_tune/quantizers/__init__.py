"""Low-precision storage formats, one file each; `QUANTIZERS` lists them by name."""

from .base import Quantizer
from .e8 import E8P2, E8P3, E8P4
from .incoherence import Rotated
from .integer import Int2, Int3, Int4, Int8
from .lloyd import Lloyd2, Lloyd3, Lloyd4
from .nf4 import NF4
from .spqr import SpQR

QUANTIZERS: dict[str, type] = {
    form.name: form for form in (NF4, Int2, Int3, Int4, Int8, Lloyd2, Lloyd3, Lloyd4, E8P2, E8P3, E8P4, SpQR)
}

__all__ = [
    "E8P2",
    "E8P3",
    "E8P4",
    "NF4",
    "QUANTIZERS",
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
]
