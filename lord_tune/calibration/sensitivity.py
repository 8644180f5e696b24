"""How much the model's loss notices an error along each output direction of each layer.

One backward pass gives, for every layer output y, the gradients g of the summed loss; G = E[g g^T] is their second
moment. To second order (Gauss-Newton with the empirical Fisher), dropping the output direction u_j costs
sigma_j^2 * u_j^T G u_j (methods of K-FAC, Martens and Grosse 2015, with the output factor only). G itself is never
formed: only the products U^T g are squared and summed, so memory is one number per direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError


def output_sensitivity(
    model: Any,  # a transformers model
    windows: Tensor,  # (window, length) token ids
    layers: dict[str, nn.Module],
    bases: dict[str, Tensor],  # name -> (out, k), orthonormal columns
    objective: Callable[[nn.Module, Tensor], Tensor],  # (model, (1, length) ids) -> scalar loss, summed over tokens
) -> dict[str, Tensor]:
    """name -> (k,) float64 mean of (u_j^T g)^2 per token. The model's parameters need no gradient and get none."""
    sums = {name: torch.zeros(basis.shape[1], dtype=torch.float64) for name, basis in bases.items()}
    tokens = 0

    def hook(name: str) -> Callable:
        def forward_hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                sums[name] += ((rows @ bases[name].to(rows)) ** 2).sum(0).double().cpu()

            if output.requires_grad:
                output.register_hook(add)

        return forward_hook

    flags = [(p, p.requires_grad) for p in model.parameters()]
    handles = [layers[name].register_forward_hook(hook(name)) for name in bases]
    # gradients must start somewhere before the first layer: at the embeddings' output
    handles.append(
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    )
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for window in windows:
            with torch.enable_grad():
                objective(model, window[None]).backward()
            tokens += window.numel()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise CalibrationError(f"The loss gradient at the output of '{name}' is not finite; use --dtype float32.")
    return {name: total / tokens for name, total in sums.items()}
