"""How much the model's loss notices an error along each output direction of each layer.

A backward pass gives, for every layer output y, the gradients g of the summed loss; G = E[g g^T] is their second
moment. To second order (Gauss-Newton with the empirical Fisher), dropping the output direction u_j costs
sigma_j^2 * u_j^T G u_j (methods of K-FAC, Martens and Grosse 2015, with the output factor only). For that G is never
formed: only the products U^T g are squared and summed, so memory is one number per direction.

`output_grams` gives G itself, for methods that weigh the outputs with it: float32 products of a window, summed in
float64, 8 out^2 bytes per layer of the block at hand. A layer whose outputs get no gradient has G = 0. With `inputs` it
also gives H of the inputs x with every token weighed by its |g|^2,

    H_g = E[|g|^2 x x^T] / E[|g|^2]

in 8 in^2 bytes more. An error E of the weight adds about tr(G E H_g E^T) to the loss: of K-FAC's assumption that x and
g are independent only their directions remain. That matters at tokens with massive activations, of which the loss
notices little: with H in place of H_g the increase is foreseen up to 40 times too large. Elsewhere H is the better of
the two, and for L R alone everywhere (scripts/RESULTS.md).

It also gives the share of chance in G. Gradients have heavy tails, and L R beside a backbone, whose error W - Q looks
the same in all directions, would seek those in which these few thousand tokens' G happens to be large. There G is taken
as Ledoit and Wolf estimate it ("A well-conditioned estimator for large-dimensional covariance matrices", 2004) from a
mean S over n tokens (`shrunk`):

    G = (1 - s) S + s m I,   m = tr S / out,   s = min(1, (E|g|^4 - ||S||^2) / n / ||S - m I||^2)

In SmolLM2 s is 0.3 for q_proj and 0.9 for o_proj of block 1, from 4,096 tokens: with G as it is, rank 8 beside e8-3
lowers the KL that o_proj costs by 2 %, with s by 8 %, and that of q_proj by 59 % with either. L R without a backbone
drops hundreds of directions, over which chance averages out: there S serves better (scripts/RESULTS.md).

`fisher_means` gives what LQ-LoRA weighs a matrix with: the mean squared gradient of the loss by its elements, over
rows and over columns.

The backward pass goes block by block, from the last to the first: a block is run again from its stored input with
gradients enabled and handed the gradient of its output, so only one block's weights and activations are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..parallel import Workers
from .blocks import first_input
from .collect import BlockWalk
from .moments import add_gram, mirror

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def output_sensitivity(
    walk: BlockWalk,
    index: int,  # of the block; the gradients above it are written already
    stream: str,
    layers: dict[str, nn.Module],
    bases: dict[str, Tensor],  # name -> (out, k), orthonormal columns
    tokens: int,  # of the stream, over all processes
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    """name -> (k,) float64 mean of (u_j^T g)^2 per token, name:total -> (1,) of |g|^2; over all processes."""
    with _observed(layers, bases) as sums:
        walk.backward(index, stream)
    return _means(sums, tokens, workers or Workers())


def fisher_means(
    walk: BlockWalk,
    index: int,
    stream: str,
    layers: dict[str, nn.Module],
    shapes: dict[str, tuple[int, int]],  # (out, in) of each
    windows: int,  # of the stream, over all processes
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    """name:rows (out,) and name:columns (in,), float64: means over windows of the squared gradient by the weight."""
    with _weight_gradients(layers, shapes) as sums:
        walk.backward(index, stream)
    return _means(sums, windows, workers or Workers())


def output_grams(
    walk: BlockWalk,
    index: int,
    stream: str,
    layers: dict[str, nn.Module],
    shapes: dict[str, tuple[int, int]],  # (out, in) of each
    tokens: int,  # of the stream, over all processes
    workers: Workers | None = None,
    inputs: bool = False,
) -> dict[str, Tensor]:
    """name:gram (out, out) float32: mean of g g^T per token of the gradient g by the layer's output; name:chance (1,)
    float32: the s of `shrunk`; with `inputs` also name:inputs (in, in) float32: H_g, unless every g is 0."""
    with _output_products(layers, shapes, inputs) as sums:
        walk.backward(index, stream)
    return _gram_means(sums, tokens, workers or Workers())


def whole_model_output_grams(
    model: PreTrainedModel,
    windows: Tensor,  # of this process
    layers: dict[str, nn.Module],
    shapes: dict[str, tuple[int, int]],
    objective: Callable[[nn.Module, Tensor], Tensor],
    tokens: int,  # of all processes
    workers: Workers | None = None,
    inputs: bool = False,
) -> dict[str, Tensor]:
    """The same for a model without a block list, with every activation of a window in memory."""
    with _output_products(layers, shapes, inputs) as sums:
        _run_backward(model, windows, objective)
    return _gram_means(sums, tokens, workers or Workers())


def whole_model_fisher(
    model: PreTrainedModel,
    windows: Tensor,  # of this process
    layers: dict[str, nn.Module],
    shapes: dict[str, tuple[int, int]],
    objective: Callable[[nn.Module, Tensor], Tensor],
    count: int,  # of all processes
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    """The same for a model without a block list, with every activation of a window in memory."""
    with _weight_gradients(layers, shapes) as sums:
        _run_backward(model, windows, objective)
    return _means(sums, count, workers or Workers())


def whole_model_sensitivity(
    model: PreTrainedModel,  # without a block list: run whole
    windows: Tensor,  # (window, length) token ids of this process
    layers: dict[str, nn.Module],
    bases: dict[str, Tensor],
    objective: Callable[[nn.Module, Tensor], Tensor],  # (model, (1, length) ids) -> scalar loss, summed over tokens
    tokens: int,
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    """The same with every activation of a window in memory."""
    with _observed(layers, bases) as sums:
        _run_backward(model, windows, objective)
    return _means(sums, tokens, workers or Workers())


def _run_backward(model: PreTrainedModel, windows: Tensor, objective: Callable[[nn.Module, Tensor], Tensor]) -> None:
    # gradients must start somewhere before the first layer: at the embeddings' output
    start = model.get_input_embeddings().register_forward_hook(lambda m, args, output: output.requires_grad_(True))
    try:
        for window in windows:
            with torch.enable_grad():
                objective(model, window[None]).backward()
    finally:
        start.remove()


def _device_of(layer: nn.Module) -> torch.device:
    return layer.get_parameter("weight").device


@contextmanager
def _observed(layers: dict[str, nn.Module], bases: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Sums of (U^T g)^2 and |g|^2 while the body runs backward passes. The layers' parameters require no gradients."""
    sums: dict[str, Tensor] = {}
    placed = {name: basis.to(_device_of(layers[name]), torch.float32) for name, basis in bases.items()}
    for name, basis in placed.items():
        sums[name] = torch.zeros(basis.shape[1], dtype=torch.float64, device=basis.device)
        sums[f"{name}:total"] = torch.zeros(1, dtype=torch.float64, device=basis.device)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                sums[name] += ((rows @ placed[name]) ** 2).sum(0).double()
                sums[f"{name}:total"] += rows.square().sum().double()

            if output.requires_grad:
                output.register_hook(add)

        return forward_hook

    handles = [layers[name].register_forward_hook(hook(name)) for name in bases]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _weight_gradients(layers: dict[str, nn.Module], shapes: dict[str, tuple[int, int]]) -> Iterator[dict[str, Tensor]]:
    """Row and column sums of the squared gradient by each weight, window by window, while the body runs backward."""
    sums: dict[str, Tensor] = {}
    for name in layers:
        out, inputs = shapes[name]
        device = _device_of(layers[name])
        sums[f"{name}:rows"] = torch.zeros(out, dtype=torch.float64, device=device)
        sums[f"{name}:columns"] = torch.zeros(inputs, dtype=torch.float64, device=device)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def forward_hook(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
        ) -> None:
            inputs = first_input(args, kwargs).detach()

            def add(gradient: Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                squared = (rows.T @ inputs.reshape(-1, inputs.shape[-1]).float()).square()
                sums[f"{name}:rows"] += squared.mean(1).double()
                sums[f"{name}:columns"] += squared.mean(0).double()

            if output.requires_grad:
                output.register_hook(add)

        return forward_hook

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _output_products(
    layers: dict[str, nn.Module], shapes: dict[str, tuple[int, int]], inputs: bool
) -> Iterator[dict[str, Tensor]]:
    """Sums of g g^T, of |g|^4 and, with `inputs`, of |g|^2 x x^T (matrices as block upper triangles) while the body
    runs backward passes."""
    sums: dict[str, Tensor] = {}
    for name, layer in layers.items():
        out, width = shapes[name]
        sums[f"{name}:fourth"] = torch.zeros(1, dtype=torch.float64, device=_device_of(layer))
        sums[f"{name}:gram"] = torch.zeros(out, out, dtype=torch.float64, device=_device_of(layer))
        if inputs:
            sums[f"{name}:inputs"] = torch.zeros(width, width, dtype=torch.float64, device=_device_of(layer))

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def forward_hook(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
        ) -> None:
            read = first_input(args, kwargs).detach() if inputs else None

            def add(gradient: Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                norms = rows.norm(dim=1)
                sums[f"{name}:fourth"] += norms.double().pow(4).sum()
                add_gram(sums[f"{name}:gram"], rows)
                if read is not None:
                    add_gram(sums[f"{name}:inputs"], read.reshape(-1, read.shape[-1]).float() * norms[:, None])

            if output.requires_grad:
                output.register_hook(add)

        return forward_hook

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _gram_means(sums: dict[str, Tensor], tokens: int, workers: Workers) -> dict[str, Tensor]:
    """Takes the sums out of the dict one by one: a float64 matrix lives no longer than it has to."""
    found: dict[str, Tensor] = {}
    noticed: dict[str, float] = {}  # layer -> sum of |g|^2
    fourth: dict[str, float] = {}  # layer -> mean of |g|^4
    for key in sorted(sums):  # of a layer, the fourth powers before the outputs' before the inputs'
        total = sums.pop(key)
        workers.add_up(total)
        name, _, kind = key.rpartition(":")
        _check_finite(name, total)
        if kind == "fourth":
            fourth[name] = float(total) / tokens
        elif kind == "gram":
            noticed[name] = float(total.diagonal().sum())
            gram = mirror(total).div_(tokens)
            found[f"{name}:chance"] = torch.tensor([_chance(gram, fourth[name], tokens)], device=gram.device)
            found[key] = gram.float()
        elif noticed[name]:
            found[key] = mirror(total).div_(noticed[name]).float()
    return found


def _chance(
    gram: Tensor,  # (out, out) float64: S
    fourth: float,  # mean of |g|^4
    tokens: int,
) -> float:
    squares, mean = float(gram.square().sum()), float(gram.diagonal().mean())
    apart = squares - mean**2 * len(gram)
    if not apart > 1e-12 * squares:  # a multiple of the identity already
        return 0.0
    return min(1.0, max(0.0, fourth - squares) / tokens / apart)


def shrunk(gram: Tensor, chance: Tensor) -> Tensor:
    """(out, out): the second moment of the gradients without the share that is chance, (1,), of the same trace."""
    share = float(chance)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (1 - share) * gram + share * gram.diagonal().mean() * identity


def _check_finite(name: str, total: Tensor) -> None:
    if not torch.isfinite(total).all():
        raise CalibrationError(f"The loss gradient at the output of '{name}' is not finite; use `dtype` float32.")


def _means(sums: dict[str, Tensor], count: int, workers: Workers) -> dict[str, Tensor]:
    for name in sorted(sums):
        workers.add_up(sums[name])
        _check_finite(name, sums[name])
    return {name: total / count for name, total in sums.items()}
