"""A block's tensors in memory, and the tensors of the shard it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from ..calibration.reads import restored_notes
from ..layers import FactoredLinear, check_finite, expert_of, sentinel
from ..memory import give_back
from .base import Source


class Loaded:
    """A block's tensors in memory for the length of a `with`; raises CheckpointError if one holds NaN or Inf. Of a
    whole model, what its forward passes noted about them is forgotten with them. `names` are the block's own, `tied`
    those of other blocks that it has a share in."""

    def __init__(
        self, source: Source, names: list[str], model: nn.Module, whole: bool = False, tied: Iterable[str] = ()
    ):
        self.source, self.names, self.model, self.whole = source, names, model, whole
        self._all = [*names, *tied]
        self._held = ExitStack()

    def __enter__(self) -> Loaded:
        if self.whole:
            self._held.enter_context(restored_notes(self.model))
        self.source.load(self._all)
        check_finite(self.model)
        return self

    def __exit__(self, *rest: object) -> None:
        self.source.release(self._all)
        self._held.close()
        give_back()


def shard_name(index: int, count: int) -> str:
    """transformers' name of file `index` (from 0) of a checkpoint."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def shard_of(source: Source, names: Iterable[str], layers: Mapping[str, FactoredLinear]) -> dict[str, Tensor]:
    """Tensors of a block that holds `names`: of decomposed layers as they are now, all others as the checkpoint stores
    them."""
    tensors = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    tensors |= {f"{name}.weight": sentinel() for name in layers}
    for name in names:
        expert = expert_of(name)
        if expert is not None:
            tensors[expert[0]] = sentinel()
        if name.rpartition(".")[0] not in layers:
            tensors[name] = untouched(source, name)
    return {name: tensors[name] for name in sorted(tensors)}


def untouched(source: Source, name: str) -> Tensor:
    """As the checkpoint stores it; else, where transformers converts or a dtype was asked for, as it is loaded."""
    stored = source.stored(name)
    if stored is not None:
        return stored
    source.release([name])  # never twice in memory, and read again: a forward pass may have written to it
    source.load([name])
    owner, _, leaf = name.rpartition(".")
    return source.model.get_submodule(owner).state_dict()[leaf]


def to_meta(module: nn.Module) -> None:
    """Let go of the memory of every parameter."""
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        owner.register_parameter(name.rpartition(".")[2], empty)
