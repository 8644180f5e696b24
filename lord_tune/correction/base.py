"""The contract of a quantized checkpoint, and the source that a correction streams from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..declared import Options
from ..decomposition.base import Source
from ..decomposition.sizes import stored_bytes
from ..errors import UsageError
from ..plans import LayerChoice, Plan
from ..quantizers import make_quantizer
from ..sites import Site

APART = 0.75  # largest relative distance of a weight from its codes: at 2 bits 0.5, of unrelated ones 1.4


@dataclass(frozen=True)
class Code:
    """How a layer is stored."""

    backbone: str
    options: Options
    parts: dict[str, Tensor]

    def weight(self, shape: tuple[int, int]) -> Tensor:
        """Q, (out, in) float32."""
        return make_quantizer(self.backbone, self.options).dequantize(self.parts, shape, torch.float32)


class Quantized(Protocol):
    """A checkpoint that somebody has quantized."""

    name: str

    def check(self, keys: Iterable[str]) -> None:
        """UsageError if it holds anything but these tensors."""
        ...

    def code(self, layer: str, weight: Tensor) -> Code | None:
        """Of a layer, in the order of rows of the original's weight (out, in); None where it is not quantized."""
        ...

    def restore(self, key: str, held: Tensor) -> None:
        """Of any other tensor: put what the checkpoint holds in the place of the original's values."""
        ...

    def larger(self, layer: str) -> list[tuple[str, Options]]:
        """Formats of the same family, by their bits, that a layer might have had instead."""
        ...


class Corrected:
    """The source of a correction: layers of the original, everything else from the quantized checkpoint. And the codes:
    see decomposition.base.GivenCodes."""

    def __init__(self, original: Source, quantized: Quantized, layers: Mapping[str, Site], served: str | None = None):
        """served: how L and R will be stored beside the codes, where not as here."""
        self._original, self._quantized, self._layers, self._served = original, quantized, layers, served
        self.model: PreTrainedModel = original.model
        self._weights = {f"{name}.weight" for name in layers}
        self.choices: dict[str, LayerChoice] = {}

    def load(self, names: Iterable[str]) -> None:
        names = list(names)
        self._original.load(names)
        with torch.no_grad():
            for name in names:
                if name not in self._weights:
                    owner, _, leaf = name.rpartition(".")
                    self._quantized.restore(name, getattr(self.model.get_submodule(owner), leaf))

    def release(self, names: Iterable[str]) -> None:
        self._original.release(names)

    def stored(self, name: str) -> Tensor | None:
        return self._original.stored(name) if name in self._weights else None

    def plan(self, template: LayerChoice, rank: int) -> Plan:
        """The template, of this rank, beside the codes of each layer; UsageError if one belongs to another weight."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        self._quantized.check(key for key in self.model.state_dict() if key not in tied)
        found: dict[str, LayerChoice] = {}
        fixed = template.method_options | {"rounding": "nearest"}  # what rounds is another program
        for name, site in self._layers.items():
            self._original.load([f"{name}.weight"])
            weight = site.weight(self.model)
            code = self._quantized.code(name, weight)
            if code is None:
                found[name] = LayerChoice(template.method, None, reason="not quantized", shape=site.shape)
            else:
                _check_near(name, weight, code.weight(site.shape), self._quantized.name)
                own = replace(template, method_options=fixed, shape=site.shape)
                own = replace(own, backbone=code.backbone, backbone_options=code.options)
                found[name] = own.at(min(rank, *site.shape))
            self._original.release([f"{name}.weight"])
        if all(choice.rank is None for choice in found.values()):
            raise UsageError(
                f"{self._quantized.name} holds none of the selected layers quantized; there is nothing to correct."
            )
        self.choices = found
        self._weights = {f"{name}.weight" for name, choice in found.items() if choice.rank is not None}
        return Plan(found)

    def parts(self, name: str, choice: LayerChoice) -> dict[str, Tensor] | None:
        given = self.choices[name]
        if (choice.backbone, choice.backbone_options) != (given.backbone, given.backbone_options):
            return None
        code = self._quantized.code(name, self._layers[name].weight(self.model))
        assert code is not None, "the plan has it from there"
        return code.parts

    def compared(self, plan: Plan, layers: Mapping[str, Site]) -> dict[str, Plan]:
        """The original, the codes alone, with L R, and as many bytes of the codes and a larger type of their family."""
        alone = Plan({name: choice if choice.rank is None else choice.at(0) for name, choice in plan.layers.items()})
        found = {"original": plan.dense(), "quantized": alone, "corrected": plan}
        control = self._mixture(plan, alone, layers)
        return found if control is None else found | {"control": control}

    def _mixture(self, plan: Plan, alone: Plan, layers: Mapping[str, Site]) -> Plan | None:
        """Some layers, spread evenly over the model, in the next larger format: no more bytes than the plan's."""

        def size(chosen: Mapping[str, LayerChoice]) -> int:
            return sum(stored_bytes(layers[name], choice) for name, choice in chosen.items())

        def as_served(choice: LayerChoice) -> LayerChoice:
            return choice if self._served is None else replace(choice, factor_format=self._served)

        limit = size({name: as_served(choice) for name, choice in plan.layers.items()})
        mixed = dict(alone.layers)
        names = [name for name, choice in alone.layers.items() if choice.rank is not None]
        for step in range(4):  # formats that are still larger, where all layers have the first
            total, before = size(mixed), dict(mixed)
            for name in _spread(names):
                finer = self._quantized.larger(name)
                if step >= len(finer):
                    continue
                backbone, options = finer[step]
                choice = LayerChoice("svd", 0, {}, backbone, options, shape=layers[name].shape)
                grown = total - stored_bytes(layers[name], mixed[name]) + stored_bytes(layers[name], choice)
                if grown <= limit:
                    total, mixed[name] = grown, choice
            if mixed == before:
                break
        return None if mixed == dict(alone.layers) else Plan(mixed)


def _spread(names: list[str]) -> list[str]:
    """All names in an order of which every beginning is spread evenly over them: indices with their bits reversed."""
    width = max(1, (len(names) - 1).bit_length())
    reversed_ = (int(format(index, f"0{width}b")[::-1], 2) for index in range(2**width))
    return [names[index] for index in reversed_ if index < len(names)]


def _check_near(name: str, weight: Tensor, code: Tensor, quantized: str) -> None:
    distance = float((weight.float() - code).norm() / weight.float().norm().clamp_min(1e-30))
    if not distance <= APART:
        raise UsageError(
            f"'{name}' in {quantized} is not made from the original's (relative distance {distance:.2g}, expected at "
            f"most {APART}); pass the model that was quantized."
        )
