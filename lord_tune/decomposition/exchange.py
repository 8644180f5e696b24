"""The layers of a block are dealt out to the processes, and every process gets every result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..layers import FactoredLinear
from ..memory import give_back
from ..parallel import Workers, share_out
from .layerwise import Analysis, Finished

Result = TypeVar("Result", bound=Analysis | Finished | None)


def dealt_out(
    work: dict[str, float],  # layer -> how much of it there is, relative
    do: Callable[[str], Result],
    workers: Workers,
    device: torch.device,  # that the results are computed on
) -> dict[str, Result]:
    """layer -> do(layer), each done by one process and sent to all."""
    owners = share_out(work, workers.size)
    mine = {}
    for name in work:
        if owners[name] == workers.rank:
            mine[name] = do(name)
            give_back()  # the next layer's matrices have other sizes and do not fit into what this one left
    if workers.size == 1:
        return mine
    return {name: cast(Result, _sent(mine.get(name), owners[name], device, workers)) for name in work}


def _sent(
    value: Analysis | Finished | None, owner: int, device: torch.device, workers: Workers
) -> Analysis | Finished | None:
    """The owner's result, on every process."""
    form: Any = None
    tensors: dict[str, Tensor] | None = None
    if isinstance(value, Analysis):
        form, tensors = ("analysis", value.facts, None), value.tensors()
    elif isinstance(value, Finished):
        plan = None if value.layer is None else (value.layer.plan, value.layer.dtype)
        form, tensors = ("finished", value.record, plan), {} if value.layer is None else value.layer.state_dict()
    form = workers.send(form, owner)
    if form is None:
        return None
    tensors = workers.send_tensors(tensors, owner, device)
    kind, content, plan = form
    if value is not None:
        return value
    if kind == "analysis":
        return Analysis.of(tensors, content)
    if plan is None:
        return Finished(content)
    layer = FactoredLinear(plan[0], device="meta", dtype=plan[1])
    layer.load_state_dict(tensors, strict=True, assign=True)
    return Finished(content, layer.requires_grad_(False))
