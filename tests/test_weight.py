"""A decomposed layer answers like the dense one: its `weight`, casts, state dicts, and models that read weights."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from contracts import QUANTIZERS
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_family
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM, T5Config, T5EncoderModel

import lord_tune
from lord_tune.adapters.attach import add_lora, add_scales, expose_factors
from lord_tune.adapters.fold import fold
from lord_tune.errors import UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import QuantizedLinear, ZeroLinear, densify, factored_layers, sentinels_of, unfuse

IDS = torch.arange(1, 60)[None]
TOKENS = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257, "vocab_size": 300}
OWN_CODE = "the model's own code computes with its weight"


@pytest.fixture
def accelerate_anew():
    """accelerate keeps one state per process, and refuses another `cpu` than that of a trainer before."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def t5() -> Any:
    return T5EncoderModel(T5Config(d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4, **TOKENS))


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(hidden_size=64, state_size=8, num_hidden_layers=2, **TOKENS))


def rwkv() -> Any:
    shapes = {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 3, "context_length": 128}
    return RwkvForCausalLM(RwkvConfig(**shapes, rescale_every=1, **TOKENS))


def saved(build: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.12)
    return save_tiny(model, folder)


@pytest.fixture(scope="module")
def factored_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weight") / "factored"
    lord_tune.decompose(str(llama_dir), str(out), method="svd", rank=4, backbone="nf4", double_quant=True)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


CASES = {
    "t5": (t5, {}, set()),
    "mamba": (mamba, {}, {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"}),
    "rwkv": (
        rwkv,
        {},
        {f"rwkv.blocks.{i}.{leaf}" for i in range(3) for leaf in ("attention.output", "feed_forward.value")},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_looks_at_weights_computes_with_the_decomposed_ones(case, tmp_path, rows_file):
    build, options, dense = CASES[case]
    base, out = saved(build, tmp_path / "base"), tmp_path / "out"
    text = {"calibration": [str(rows_file)], "calibration_tokens": 512, "context_length": 64}
    report = lord_tune.decompose(str(base), str(out), method="whitened", backbone="int8", rank=4, **text, **options)
    assert {name for name, reason in report["skipped"].items() if reason == OWN_CODE} == dense
    factored, put_in = (load_dense_or_factored(str(out)) for _ in range(2))
    for layer in factored_layers(factored).values():
        assert (layer.weight.shape, layer.weight.dtype) == (layer.plan.shape, torch.float32)
    densify(put_in)
    expected = load_dense_or_factored(str(base))
    before = logits(load_dense_or_factored(str(base)))
    expected.load_state_dict(put_in.state_dict())
    assert not torch.allclose(before, logits(expected), atol=1e-3)
    torch.testing.assert_close(logits(factored), logits(expected), atol=1e-4, rtol=0)


def test_a_forward_that_rescales_weights_is_calibrated_on_its_own_inputs(tmp_path, rows_file, monkeypatch):
    """RWKV divides weights of later blocks once and notes that it did; blocks that come and go lost the division."""
    from lord_tune.calibration.collect import BlockWalk

    found: list[Any] = []
    collect = BlockWalk.collect

    def spy(self, *given, **more):
        found.append((collect(self, *given, **more), self.windows))
        return found[-1][0]

    monkeypatch.setattr(BlockWalk, "collect", spy)
    base = saved(rwkv, tmp_path / "base")
    text = {"calibration": [str(rows_file)], "calibration_tokens": 256, "context_length": 64}
    # two passes: the ranks depend on the first, the second loads the weights again
    lord_tune.decompose(str(base), str(tmp_path / "out"), kept_fraction=0.8, propagate="sequential", **text)
    name, model, rows = "rwkv.blocks.2.feed_forward.key", load_dense_or_factored(str(base)), []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for window in found[0][1]["calibration"]:
            model(input_ids=window[None], use_cache=False)
    x = torch.cat(rows).double()
    assert len(found) == 2
    for statistics, _ in found:
        gram = statistics["calibration"][name].gram
        assert float((gram - x.T @ x / len(x)).norm() / gram.norm()) < 1e-5  # 0.75 where the division is lost


def test_weight_is_that_of_the_dense_layer(factored_dir, gpt2_dir, tmp_path):
    model = load_dense_or_factored(str(factored_dir))
    layer = model.model.layers[0].mlp.down_proj
    expected = layer.dense_weight()
    assert torch.equal(layer.weight + 0, expected) and torch.equal(
        layer.weight[3:5].T @ expected[3:5], expected[3:5].T @ expected[3:5]
    )
    with torch.inference_mode():
        assert torch.equal(layer.weight.T.contiguous(), expected.T)
    x = torch.randn(2, 160, requires_grad=True)
    (x @ layer.weight.T).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(2, 160))
    layer.left.requires_grad_(True)
    layer.weight.square().sum().backward()
    torch.testing.assert_close(layer.left.weight.grad, 2 * expected @ layer.right.weight.T, rtol=1e-4, atol=1e-4)
    model.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.float(), expected, rtol=2**-8, atol=1e-6)
    assert model.to("meta").model.layers[0].mlp.down_proj.weight.device.type == "meta"
    out = tmp_path / "gpt2"
    lord_tune.decompose(str(gpt2_dir), str(out), method="svd", rank=4)
    transposed = load_dense_or_factored(str(out)).transformer.h[0].mlp.c_fc
    assert transposed.weight.shape == (64, 160) and torch.equal(transposed.weight + 0, transposed.dense_weight().T)


WRITES = {
    "in place": lambda w: w.mul_(2),
    "data": lambda w: w.data.div_(2),
    "view": lambda w: w.T[0].zero_(),
    "item": lambda w: w.__setitem__(0, 1.0),
    "detached": lambda w: w.detach().copy_(torch.zeros_like(w)),
    "out": lambda w: torch.add(torch.ones(64, 160), 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "init": torch.nn.init.zeros_,
    "new data": lambda w: setattr(w, "data", torch.zeros(64, 160)),
    "requires_grad_": lambda w: w.requires_grad_(True),
    "requires_grad": lambda w: setattr(w, "requires_grad", True),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_into_a_decomposed_weight_is_refused(write, factored_dir):
    layer = load_dense_or_factored(str(factored_dir)).model.layers[0].mlp.down_proj
    before = layer.dense_weight()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(UsageError, match="writes into the weight of a decomposed layer"):
            WRITES[write](layer.weight)
    with pytest.raises(UsageError, match="writes into the weight"):
        layer.weight = torch.nn.Parameter(torch.zeros(64, 160))
    layer.weight.requires_grad_(False)
    layer.weight.requires_grad = False
    assert torch.equal(layer.dense_weight(), before)


def test_sentinels_are_in_files_alone(factored_dir, tmp_path):
    model = load_dense_or_factored(str(factored_dir))
    keys = {f"{name}.weight" for name in factored_layers(model)}
    assert keys and not keys & {*model.state_dict(), *dict(model.named_parameters())}
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    stored = {k: v for file in factored_dir.glob("*.safetensors") for k, v in load_file(file).items()}
    assert written.keys() == stored.keys() and keys == set(sentinels_of(model))
    assert {(tuple(tensors[key].shape), tensors[key].dtype) for key in keys for tensors in (written, stored)} == {
        ((1,), torch.uint8)
    }
    model.load_state_dict(written)  # strict
    old = {key: torch.zeros(0, dtype=torch.uint8) if key in keys else tensor for key, tensor in written.items()}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})  # as versions before this one wrote them
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.usefixtures("accelerate_anew")
@pytest.mark.parametrize("mode", ["plain", "factors", "lora"])
def test_accelerate_saves_and_loads_the_state(mode, llama_dir, tmp_path):
    out = tmp_path / "out"
    backbone = {} if mode == "factors" else {"backbone": "int4"}  # without one, hosts are zero maps
    lord_tune.decompose(str(llama_dir), str(out), method="svd", rank=4, **backbone)
    wrap = {"plain": lambda m: m, "factors": expose_factors, "lora": add_lora}[mode]
    model = wrap(load_dense_or_factored(str(out)))
    assert not [name for name, tensor in model.state_dict().items() if not tensor.numel()]
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare_model(model)
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    after = prepared.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    twin = copy.deepcopy(prepared)
    assert torch.equal(logits(twin), logits(prepared))


@pytest.mark.usefixtures("accelerate_anew")
@pytest.mark.parametrize("mode", ["plain", "factors", "split", "lora", "scales"])
def test_training_goes_on_from_the_state_that_accelerate_saved(mode, llama_dir, tmp_path):
    """In a model that was loaded anew, whose adapter was drawn anew: weights, optimizer and schedule, to the bit."""
    out = tmp_path / "out"
    packed = {"factor_format": "int4", "top_rank": 2} if mode == "split" else {}
    lord_tune.decompose(str(llama_dir), str(out), method="svd", rank=4, backbone="int4", **packed)
    wrap = {"plain": whole_trained, "factors": expose_factors, "lora": add_lora, "scales": add_scales}
    wrap["split"] = functools.partial(expose_factors, mode="split")

    def begun(seed: int) -> tuple[Accelerator, Any, Any, Any]:
        torch.manual_seed(seed)
        model = wrap[mode](load_dense_or_factored(str(out)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    def losses(accelerator: Accelerator, model: Any, optimizer: Any, schedule: Any) -> list[float]:
        found = []
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    first = begun(0)
    before = losses(*first)
    first[0].save_state(str(tmp_path / "state"))
    trained, expected = logits(first[1]), losses(*first)
    second = begun(1)
    assert not torch.allclose(logits(second[1]), trained, atol=1e-3)
    second[0].load_state(str(tmp_path / "state"))
    assert torch.equal(logits(second[1]), trained)
    assert losses(*second) == expected and expected[0] < before[0]
    if mode not in ("plain", "scales"):
        folded = fold(second[0].unwrap_model(second[1]))
        torch.testing.assert_close(logits(folded), logits(second[1]), atol=1e-4, rtol=0)


def whole_trained(model: Any) -> Any:
    """Without an adapter: L, R and all that is dense train."""
    return model.requires_grad_(True)


def test_all_parameters_may_be_asked_to_train(factored_dir):
    model = load_dense_or_factored(str(factored_dir)).requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad = True
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {n.split(".")[-2] for n in trained if "mlp" in n} == {"left", "right"}
    assert not any("backbone" in name for name in trained)
    assert not any(
        p.requires_grad for p in copy.deepcopy(model).to("meta").model.layers[0].mlp.up_proj.backbone.parameters()
    )


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64, torch.float32], ids=str)
def test_no_cast_of_a_model_changes_what_is_stored(cast, factored_dir):
    model = load_dense_or_factored(str(factored_dir))
    parts = {
        f"{name}.{key}": value
        for name, layer in factored_layers(model).items()
        for key, value in layer.state_dict(keep_vars=True).items()
    }
    before = {name: (part.dtype, part.detach().clone()) for name, part in parts.items()}
    weight = model.model.layers[0].mlp.down_proj.dense_weight()
    model.to(cast)
    for name, layer in factored_layers(model).items():
        for key, value in layer.state_dict().items():
            dtype, expected = before[f"{name}.{key}"]
            assert value.dtype == dtype and torch.equal(value, expected), key
    assert torch.equal(model.model.layers[0].mlp.down_proj.dense_weight(), weight)
    layer = model.model.layers[0].mlp.down_proj
    assert layer(torch.ones(2, 160, dtype=layer.weight.dtype)).dtype == layer.weight.dtype == cast


@pytest.mark.parametrize("form", QUANTIZERS, ids=str)
def test_float64_inputs_are_computed_in_float64(form):
    layer = QuantizedLinear(96, 64, form)
    layer.set_parts(form.quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(0))))
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    dense = layer.dequantize(torch.float64)
    for _ in range(2):
        # float64 has 2e-16 per operation, float32 1e-7
        torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-12, atol=1e-12)
        layer.keep_dense()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, 96), rtol=1e-12, atol=1e-12)


def test_a_float64_model_computes_with_the_float64_weights(factored_dir):
    factored, put_in = (load_dense_or_factored(str(factored_dir)).double() for _ in range(2))
    densify(put_in, torch.float64)
    torch.testing.assert_close(logits(factored), logits(put_in), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])  # (expert, out, in) and (expert, in, out)
def test_unfused_experts_answer_like_the_parameter(family):
    torch.manual_seed(0)
    model = tiny_family(family)
    name = next(name for name, p in model.named_parameters() if name.endswith("experts.down_proj") and p.dim() == 3)
    path, _, leaf = name.rpartition(".")
    experts, expected = model.get_submodule(path), model.get_parameter(name).detach().clone()
    unfuse(model, [name])
    found = getattr(experts, leaf)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(found + 0, expected) and name not in model.state_dict()
    with torch.no_grad(), pytest.raises(UsageError, match="writes into the weight"):
        found.data[0].zero_()
    model.load_state_dict(model.state_dict() | sentinels_of(model))  # strict


def test_a_zero_map_has_no_tensors():
    layer = ZeroLinear(3, 2, "meta").to(torch.bfloat16)
    assert not layer.state_dict() and not list(layer.parameters())
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((2, 3), torch.bfloat16, "meta")
