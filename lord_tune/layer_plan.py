"""The plan: layer name -> how it is stored. Serialised, it is the manifest inside `config.json`.

A file that is loaded by this package alone decides the modules from it, so the fields are what a loader needs: shape,
rank, formats. What was measured on the way (errors, seconds) is in `decomposition.json`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import CheckpointError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One decomposed layer."""

    shape: tuple[int, int]  # (out, in)
    rank: int
    method: str
    backbone: str = "none"  # "none" or a quantizer's name
    backbone_options: dict[str, Any] = field(default_factory=dict)
    left_format: str = "fp32"  # a key of DTYPES or a quantizer's name
    right_format: str = "fp32"
    factor_options: dict[str, Any] = field(default_factory=dict)
    top_rank: int = 0  # of the rank: the first components, stored apart
    top_format: str = "fp32"
    top_options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    conv1d: bool = False  # the original was a transformers Conv1D, whose weight is (in, out)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, name: str, content: dict[str, Any]) -> LayerPlan:
        try:
            return cls(**(content | {"shape": tuple(content["shape"])}))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"The manifest entry of layer '{name}' is not readable ({error}); it may come from a newer lord_tune."
            ) from error
