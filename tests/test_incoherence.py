"""One rotation for the layers that share an input: computed once, and never a stale or gradient-less one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from contracts import weight
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lord_tune.layers import QuantizedLinear
from lord_tune.quantizers import E8P2, Lloyd3, Rotated, incoherence

WIDTH = 48


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Widths of the vectors that were rotated into a format's coordinates, one entry a call."""
    widths: list[int] = []
    original = incoherence.into

    def counted(x: Tensor, signs: Tensor) -> Tensor:
        widths.append(x.shape[-1])
        return original(x, signs)

    monkeypatch.setattr(incoherence, "into", counted)
    monkeypatch.setattr(incoherence, "_shared", incoherence._Shared())
    yield widths


def layer(out: int, seed: int = 0, form=Lloyd3, width: int = WIDTH) -> QuantizedLinear:
    quantizer = Rotated(form(), seed)
    made = QuantizedLinear(width, out, quantizer)
    made.set_parts(quantizer.quantize(weight((out, width), seed=out)))
    return made


@pytest.fixture
def qkv(calls: list[int]) -> list[QuantizedLinear]:
    """Different heights and formats, one input."""
    made = [layer(40), layer(24), layer(24, form=E8P2)]
    calls.clear()  # quantizing rotates too
    return made


def some_input(seed: int = 5) -> Tensor:
    return weight((3, WIDTH), seed=seed).float()


def expected(module: QuantizedLinear, x: Tensor) -> Tensor:
    return x @ module.dequantize().T


def check(module: QuantizedLinear, x: Tensor) -> None:
    """Float32 rotations of 48 numbers: 1e-6 of outputs of about 7."""
    assert torch.allclose(module(x), expected(module, x), atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_layers_of_one_input_rotate_it_once(qkv, calls, grad):
    x = some_input()
    with torch.set_grad_enabled(grad):
        for module in qkv:
            check(module, x)
    assert calls == [WIDTH]
    check(qkv[0], x.clone())  # equal values are another tensor
    assert len(calls) == 2


def test_gradients_of_layers_with_one_input_are_those_of_separate_ones(qkv, calls):
    gradients = []
    for shared in (True, False):
        x = some_input().requires_grad_(True)
        outputs = [module(x if shared else x * 1.0) for module in qkv]
        sum(((index + 1) * y.square().sum() for index, y in enumerate(outputs)), torch.zeros(())).backward()
        gradients.append(x.grad)
    assert calls == [WIDTH] * 6  # a graph belongs to one backward pass, so none is shared
    # sums of the same float32 numbers in another order
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-4 * float(gradients[1].abs().max()))


def test_a_second_backward_pass_builds_its_own_graph(qkv):
    """The rotation of an earlier step has no graph left; its input is another tensor by then."""
    leaf = some_input().requires_grad_(True)
    gradients = []
    for _ in range(2):
        leaf.grad = None
        x = leaf * 2
        sum((module(x).sum() for module in qkv), torch.zeros(())).backward()
        gradients.append(leaf.grad.clone())
    assert torch.equal(*gradients)


def test_a_leaf_used_in_two_training_steps(qkv):
    """A probe that optimises its own input: one tensor, a fresh graph for each backward pass."""
    x = some_input().requires_grad_(True)
    gradients = []
    for _ in range(2):
        x.grad = None
        qkv[0](x).sum().backward()
        gradients.append(x.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_rotation(qkv, reentrant):
    """Of an input that is made inside the checkpointed part, as behind the norm of a block."""
    gradients = []
    for checkpointed in (True, False):
        x = some_input().requires_grad_(True)

        def block(x: Tensor) -> Tensor:
            inner = torch.tanh(x)
            return torch.cat([module(inner) for module in qkv], -1)

        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_write_to_the_input_is_noticed(qkv, calls):
    x = some_input()
    with torch.no_grad():
        check(qkv[0], x)
        x.mul_(3)
        check(qkv[1], x)
        x[0, 0] = 9
        check(qkv[2], x)
        x[:2].zero_()  # through a view
        check(qkv[0], x)
    assert len(calls) == 4


def test_a_rotation_without_a_graph_is_not_used_for_training(qkv, calls):
    x = some_input().requires_grad_(True)
    with torch.no_grad():
        check(qkv[0], x)
    y = qkv[1](x)
    assert len(calls) == 2 and y.requires_grad
    y.sum().backward()
    assert torch.allclose(x.grad, qkv[1].dequantize().sum(0).expand_as(x), atol=1e-4)
    with torch.no_grad():  # nor one with a graph where none is wanted
        assert not qkv[2](x).requires_grad
    assert len(calls) == 2  # the first one's, which has none
    fresh = some_input()
    qkv[0](fresh)
    fresh.requires_grad_(True)  # which is no write
    assert qkv[1](fresh).requires_grad


def test_another_seed_is_another_rotation(qkv, calls):
    other = layer(24, seed=7)
    calls.clear()
    x = some_input()
    with torch.no_grad():
        for module in (qkv[0], other, qkv[1], other):
            check(module, x)
    assert len(calls) == 4


def test_a_dead_input_is_let_go_and_its_address_is_not_trusted(qkv, calls):
    with torch.no_grad():
        for seed in range(20):  # freed memory comes back under the same address, and often the same id
            check(qkv[seed % 3], some_input(seed))
        assert len(calls) == 20
        shared = incoherence._shared
        assert shared._turned is None and shared._signs is None  # and is not kept alive
        x = some_input()
        qkv[0](x)
        assert shared._turned is not None
        del x
        gc.collect()
        assert shared._turned is None


def test_inference_mode_computes_right_values_and_leaves_nothing_behind(qkv, calls):
    with torch.inference_mode():
        x = some_input()
        for module in qkv:
            check(module, x)
        x.mul_(2)  # inference tensors count no writes
        check(qkv[0], x)
    ordinary = some_input()
    with torch.inference_mode():
        check(qkv[0], ordinary)
    ordinary.requires_grad_(True)
    qkv[1](ordinary).sum().backward()
    assert ordinary.grad is not None


def test_an_input_made_outside_and_rotated_in_inference_mode_trains_afterwards(qkv):
    """The rotation made in inference mode could not be saved for backward."""
    x = some_input().requires_grad_(True)
    with torch.inference_mode():
        qkv[0](x)
    qkv[0](x).sum().backward()
    assert torch.allclose(x.grad, qkv[0].dequantize().sum(0).expand_as(x), atol=1e-4)
    y = some_input()
    with torch.inference_mode():
        qkv[0](y)
    with torch.no_grad():
        z = qkv[1](y)
    z.requires_grad_(True)  # an inference tensor would refuse
    assert torch.allclose(z, expected(qkv[1], y), atol=1e-4)


def test_half_precision_inputs_share_a_rotation_of_their_own(qkv, calls):
    x = some_input()
    with torch.no_grad():
        check(qkv[0], x)
        y = qkv[1](x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and len(calls) == 2
    # bfloat16 keeps 8 bits of outputs of about 7, through two rotations
    assert torch.allclose(y.float(), expected(qkv[1], x), atol=0.3)


def test_threads_do_not_see_each_others_input(qkv, calls):
    x = some_input()
    with torch.no_grad():
        qkv[0](x)

        def other() -> None:
            with torch.no_grad():
                check(qkv[1], x)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        check(qkv[2], x)
    assert len(calls) == 2
