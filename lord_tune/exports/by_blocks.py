"""What a model computes, of which only the parts outside the blocks and the block that runs are in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.blocks import find_blocks
from ..integrations.checkpoint import StoredModel
from ..integrations.models import load_dense_or_factored
from ..integrations.space import bytes_in, free_bytes
from ..layers import plain_model
from ..memory import give_back
from ..protocols import CausalModel
from .parts import Store, to_nothing
from .verify import outputs_of


def outputs_by_blocks(folder: Path, ids: Tensor, check: Callable[[PreTrainedModel], None]) -> Tensor:
    """`outputs_of` the model in a folder, dense or factored, read block by block. check: shown the model, maybe without
    values, before it runs.

    A model whose code computes with the weights of a block elsewhere is loaded whole, and so is one whose experts
    transformers would write to disk again (it cuts them out of the file's tensors) where there is no room for that.
    """
    if has_room(folder, folder):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lord_tune_read_") as scratch:
            source = StoredModel(str(folder), Path(scratch))
            check(source.model)
            try:
                return walked(source.model, source, source.names(), ids)
            except RuntimeError as error:  # NotImplementedError is one
                if not without_values(error):
                    raise
            finally:
                to_nothing(source.model)
    model = load_dense_or_factored(str(folder))
    check(model)
    return outputs_of(model, ids)


def has_room(folder: Path, scratch: Path) -> bool:
    """Whether all that a checkpoint holds could be written again beside `scratch`."""
    free = free_bytes(scratch)
    return free is None or free > 1.1 * bytes_in(folder)


def without_values(error: RuntimeError) -> bool:
    """Whether something computed with a tensor that has no values."""
    return "meta" in str(error)  # torch's word for it


def walked(model: CausalModel, store: Store, names: list[str], ids: Tensor) -> Tensor:
    """`outputs_of` a model, with the tensors of a block, or of the output head, in memory while it runs.

    names: what is to be loaded, by the names it has without an adapter. What is outside the blocks stays loaded.
    """
    parts, outside = parts_to_run(plain_model(model), names)
    store.load(outside)
    with ExitStack() as stack:
        for module, own in parts:
            stack.enter_context(_loaded_while_it_runs(store, module, own))
        return outputs_of(model, ids)


def parts_to_run(model: PreTrainedModel, names: list[str]) -> tuple[list[tuple[nn.Module, list[str]]], list[str]]:
    """Blocks and output head with the tensors that each needs while it runs; the tensors that stay in memory."""
    blocks, tied = find_blocks(model), getattr(model, "all_tied_weights_keys", None) or {}
    inside = () if blocks.whole else tuple(f"{path}." for path in blocks.paths)
    parts: list[tuple[nn.Module, list[str]]] = []
    for prefix, module in zip(inside, blocks.modules, strict=False):
        own = [name for name in names if name.startswith(prefix)]
        elsewhere = {origin for target, origin in tied.items() if target.startswith(prefix)}
        others = {name for name in elsewhere.intersection(names) - set(own) if name.startswith(inside)}
        parts.append((module, own + sorted(others)))
    head = model.get_output_embeddings()
    alone = [] if head is None else _alone(model, head, names, {*tied, *tied.values()})
    if head is not None and alone:
        parts.append((head, alone))
    return parts, [name for name in names if not name.startswith(inside) and name not in alone]


def _alone(model: nn.Module, head: nn.Module, names: list[str], tied: set[str]) -> list[str]:
    """The tensors of the output head, if it shares none."""
    path = next((name for name, module in model.named_modules() if module is head), "")
    own = [name for name in names if name.startswith(f"{path}.")] if path else []
    return [] if any(name in tied for name in own) else own


@contextmanager
def _loaded_while_it_runs(store: Store, module: nn.Module, names: list[str]) -> Iterator[None]:
    def load(*_: object) -> None:
        store.load(names)

    def release(*_: object) -> None:
        store.release(names)
        give_back()

    handles = [module.register_forward_pre_hook(load), module.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
