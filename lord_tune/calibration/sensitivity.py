"""How much the model's loss notices an error along each output direction of each layer.

A backward pass gives, for every layer output y, the gradients g of the summed loss; G = E[g g^T] is their second
moment. To second order (Gauss-Newton with the empirical Fisher), dropping the output direction u_j costs
sigma_j^2 * u_j^T G u_j (methods of K-FAC, Martens and Grosse 2015, with the output factor only). G itself is never
formed: only the products U^T g are squared and summed, so memory is one number per direction.

The backward pass goes block by block, from the last to the first: a block is run again from its stored input with
gradients enabled and handed the gradient of its output, so only one block's weights and activations are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..parallel import Workers
from .collect import BlockWalk


def output_sensitivity(
    walk: BlockWalk,
    index: int,  # of the block; the gradients above it are written already
    stream: str,
    layers: dict[str, nn.Module],
    bases: dict[str, Tensor],  # name -> (out, k), orthonormal columns
    tokens: int,  # of the stream, over all processes
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    """name -> (k,) float64 mean of (u_j^T g)^2 per token, over all processes."""
    with _observed(layers, bases) as sums:
        walk.backward(index, stream)
    return _means(sums, tokens, workers or Workers())


def whole_model_sensitivity(
    model: Any,  # without a block list: run whole
    windows: Tensor,  # (window, length) token ids of this process
    layers: dict[str, nn.Module],
    bases: dict[str, Tensor],
    objective: Callable[[nn.Module, Tensor], Tensor],  # (model, (1, length) ids) -> scalar loss, summed over tokens
    tokens: int,
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    """The same with every activation of a window in memory."""
    with _observed(layers, bases) as sums:
        # gradients must start somewhere before the first layer: at the embeddings' output
        start = model.get_input_embeddings().register_forward_hook(lambda m, args, output: output.requires_grad_(True))
        try:
            for window in windows:
                with torch.enable_grad():
                    objective(model, window[None]).backward()
        finally:
            start.remove()
    return _means(sums, tokens, workers or Workers())


@contextmanager
def _observed(layers: dict[str, nn.Module], bases: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Sums of (U^T g)^2 while the body runs backward passes. The layers' parameters require no gradients."""
    sums = {name: torch.zeros(basis.shape[1], dtype=torch.float64) for name, basis in bases.items()}

    def hook(name: str) -> Callable:
        def forward_hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                sums[name] += ((rows @ bases[name].to(rows)) ** 2).sum(0).double().cpu()

            if output.requires_grad:
                output.register_hook(add)

        return forward_hook

    handles = [layers[name].register_forward_hook(hook(name)) for name in bases]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _means(sums: dict[str, Tensor], tokens: int, workers: Workers) -> dict[str, Tensor]:
    for name in sorted(sums):
        workers.add_up(sums[name])
        if not torch.isfinite(sums[name]).all():
            raise CalibrationError(f"The loss gradient at the output of '{name}' is not finite; use --dtype float32.")
    return {name: total / tokens for name, total in sums.items()}
