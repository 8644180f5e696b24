"""Low-precision storage formats, one file each; `QUANTIZERS` lists them by name."""

from .base import Quantizer
from .nf4 import NF4

QUANTIZERS: dict[str, type] = {"nf4": NF4}

__all__ = ["NF4", "QUANTIZERS", "Quantizer"]
