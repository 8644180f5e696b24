"""What was looked up under a mode that makes other tensors (fake ones of torch.export) is not kept for the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lord_tune.layers import QuantizedLinear
from lord_tune.quantizers import QUANTIZERS, make_quantizer

# a process of its own: other tests have filled the caches
POISONED = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from lord_tune.layers import QuantizedLinear
from lord_tune.quantizers import make_quantizer
for name in ("nf4", "lloyd2", "int4", "e8-2"):
    quantizer = make_quantizer(name, {})
    layer = QuantizedLinear(64, 32, quantizer)
    for allow in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=allow):
            QuantizedLinear(64, 32, quantizer)(torch.zeros(3, 64))
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    layer.set_parts(quantizer.quantize(weight))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    found = layer(x)
    assert type(found) is torch.Tensor, (name, type(found))
    assert torch.allclose(found, x @ layer.dequantize().T, atol=1e-4), name
    assert torch.nn.functional.mse_loss(layer.dequantize(), weight) < 0.3, name
print("right")
"""


def test_fake_tensors_leave_nothing_behind():
    run = subprocess.run([sys.executable, "-c", POISONED], capture_output=True, text=True)
    assert run.stdout.strip() == "right", run.stdout + run.stderr


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "spqr"])
def test_shapes_under_a_mode_are_those_of_the_layer(name):
    """Also when the caches are full already."""
    quantizer = make_quantizer(name, {})
    layer = QuantizedLinear(64, 32, quantizer)
    layer.set_parts(quantizer.quantize(torch.randn(32, 64)))
    wanted = layer(torch.zeros(3, 64))
    with FakeTensorMode():
        found = QuantizedLinear(64, 32, quantizer)(torch.zeros(3, 64))
    assert found.shape == wanted.shape and type(found) is not torch.Tensor
    assert torch.equal(layer(torch.zeros(3, 64)), wanted)
