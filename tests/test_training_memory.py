"""What a training step holds: counted by part on any PEFT model, and foreseen without loading weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lord_tune
from lord_tune.adapters.attach import add_lora, expose_factors
from lord_tune.memory import PeakMemory, held_bytes
from lord_tune.training.memory import account


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Wide enough for activations to outweigh small change; widths that bitsandbytes' loader takes."""
    return save_tiny(tiny_llama(hidden=256, intermediate=512, layers=4), tmp_path_factory.mktemp("wide") / "dense")


@pytest.fixture(scope="module")
def factored(wide):
    lord_tune.decompose(str(wide), str(wide.parent / "nf4"), method="svd", rank=16, backbone="nf4")
    return wide.parent / "nf4"


def batch(size: int = 2, length: int = 128) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 250, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def stored_bytes(folder) -> int:
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ---- the peak of a block ---------------------------------------------------------------------------------------------


def test_a_peak_is_that_of_its_block_and_not_of_the_process():
    """Pages are touched, so they are resident; what is let go of does not count for the next block."""
    cpu, megabyte = torch.device("cpu"), 2**20
    with PeakMemory(cpu) as outer:
        torch.ones(400 * megabyte, dtype=torch.uint8)
        with PeakMemory(cpu) as inner:
            torch.ones(100 * megabyte, dtype=torch.uint8)
    now = held_bytes(cpu)
    assert 80 * megabyte < inner.bytes - now < 200 * megabyte
    assert 380 * megabyte < outer.bytes - now < 500 * megabyte


# ---- accounts of real steps ------------------------------------------------------------------------------------------


def test_factors_are_counted_once_as_adapters(factored):
    model, _ = lord_tune.load(str(factored))
    exposed = expose_factors(model)
    counted = account(exposed, batch(), adam(exposed))
    trained = sum(p.numel() for p in exposed.parameters() if p.requires_grad)
    assert counted.adapters == counted.gradients == 4 * trained
    assert counted.optimizer == pytest.approx(8 * trained, rel=1e-3)  # and a step count per tensor
    rest = counted.weights - (stored_bytes(factored) - counted.adapters)
    assert 0 <= rest <= 4096  # rotary frequencies, which no checkpoint stores
    assert counted.logits == 3 * 2 * 128 * 300 * 4  # logits, their softmax and a gradient at once
    assert counted.peak > counted.weights + counted.adapters + counted.optimizer + counted.activations


def test_checkpointing_and_decoded_copies_show(factored):
    model, _ = lord_tune.load(str(factored))
    exposed = add_lora(model, 4)
    plain = account(exposed, batch(), adam(exposed))
    exposed.enable_input_require_grads()
    exposed.gradient_checkpointing_enable()
    saving = account(exposed, batch(), adam(exposed))
    inputs = 4 * 2 * 128 * 256 * 4  # of four blocks
    assert inputs < saving.activations < 2 * inputs < plain.activations / 2
    assert saving.peak < plain.peak and saving.weights == plain.weights
    copies = lord_tune.layers.dequantize_once(exposed)
    assert account(exposed, batch(), adam(exposed)).weights == plain.weights + copies > plain.weights


def test_a_quantized_model_of_bitsandbytes_is_counted_with_its_scales(wide):
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(wide, quantization_config=form, dtype=torch.float32)
    exposed = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    counted = account(exposed, batch(), adam(exposed))
    linears = 4 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512)
    dense = 2 * 300 * 256 * 4 + 9 * 256 * 4  # embeddings, head, norms
    assert counted.weights == pytest.approx(linears * (0.5 + 4 / 64) + dense, rel=0.01)
    assert counted.adapters == 4 * exposed.get_nb_trainable_parameters()[0]
