"""Every path on a device that does not mix with the CPU (device.py): the numbers are the CPU's, and a forward or
backward pass of a layer neither copies between host and device nor lets the host look at a value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import QUANTIZERS
from device import DEVICE, PEAK, TO_DEVICE, TO_HOST, WAIT, StandIn
from tiny import code_document, read_tensors, save_tiny, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer
from tiny import write_code_rows as write_rows
from torch.nn.attention import SDPBackend, sdpa_kernel

import lord_tune
from lord_tune.calibration.blocks import Blocks
from lord_tune.calibration.collect import BlockWalk
from lord_tune.calibration.sensitivity import _observed, _output_products
from lord_tune.calibration.states import StateFile, StateWriter
from lord_tune.decomposition.timing import Rates
from lord_tune.evaluation.speed import speed
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.running import masked_windows
from lord_tune.layers import factored_layers
from lord_tune.parallel import Workers, _on_wire
from lord_tune.quantizers import Rotated
from lord_tune.quantizers.incoherence import _factors, random_signs
from lord_tune.quantizers.ldlq import Feedback, ldlq

IDS = torch.tensor([tiny_tokenizer()(code_document(40))["input_ids"][:24]])
TEXT = {"calibration_tokens": 512, "context_length": 64, "sensitivity_tokens": 128}
# name -> options; the methods, the budgets and what a run can do beside them
RUNS: dict[str, dict[str, Any]] = {
    "default": {"kept_fraction": 0.7},
    "afm-sequential": {"method": "afm", "kept_fraction": 0.7, "propagate": "sequential"},
    "whitened": {"rank": 8, "shrinkage": "auto", "recover_epochs": 1},
    "svd": {"method": "svd", "kept_fraction": 0.7, "allocation": "uniform"},
    "two-sided": {"method": "two_sided", "kept_fraction": 0.7},
    "pivoted": {"rank": 8, "form": "pivoted"},
    "int8-factors": {"rank": 12, "factor_format": "int8"},
    "nf4": {"method": "loftq", "backbone": "nf4", "rank": 8, "double_quant": True},
    "spqr": {"method": "svd", "backbone": "spqr", "rank": 8},
    "int4": {"backbone": "int4", "rank": 8, "factor_format": "int4", "top_rank": 2, "top_format": "fp16"},
    "caldera": {"method": "caldera", "backbone": "e8-2", "rank": 8, "iterations": 1},
    "fisher": {"method": "caldera", "backbone": "lloyd3", "rank": 8, "iterations": 1, "weighting": "fisher"},
}
_GRADIENTS = {"default", "whitened", "fisher", "two-sided"}  # those of some operations are computed in another order
_SLOW = {"caldera", "fisher"}  # feedback on a thousand columns
MODES: dict[str, Callable[[Any], Any]] = {
    "factors": lambda model: lord_tune.expose_factors(model),
    "split": lambda model: lord_tune.expose_factors(model, mode="split"),
    "lora": lambda model: lord_tune.add_lora(model, rank=2),
    "scales": lambda model: lord_tune.add_scales(model),
    "basis": lambda model: lord_tune.add_basis(model, 2),
}


def options_of(name: str, rows: Path) -> dict[str, Any]:
    """Those of a run, with text where it takes some."""
    own = RUNS[name]
    if own.get("method") in ("svd", "loftq"):
        return own
    weighs = "kept_fraction" in own or "weighting" in own
    return {"calibration": [str(rows)], **own} | {k: v for k, v in TEXT.items() if weighs or k != "sensitivity_tokens"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "code.jsonl", 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_tiny(tiny_llama(intermediate=48, hidden=32, layers=2), tmp_path_factory.mktemp("device") / "llama")


@pytest.fixture(scope="module")
def made(tmp_path_factory, source, rows):
    """name of a run -> its checkpoint, written on the stand-in once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            out = tmp_path_factory.mktemp("made") / name
            with StandIn():
                lord_tune.decompose(str(source), str(out), **options_of(name, rows))
            folders[name] = out
        return folders[name]

    return get


@pytest.fixture(autouse=True)
def the_same_attention():
    """The stand-in has no fused attention; neither has the CPU here."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


# --- the stand-in itself ---


def test_the_stand_in_refuses_what_a_gpu_refuses_and_counts_what_it_waits_for():
    with StandIn() as device:
        x = torch.randn(3, 4, device=DEVICE)
        assert x.device == DEVICE and torch.zeros(2, device=DEVICE.type).device == DEVICE
        assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)  # 0-dimensional tensors of the CPU are numbers
        for wrong in (
            lambda: x + torch.ones(4),
            lambda: torch.cat([x, torch.ones(1, 4)]),
            lambda: torch.ones(4).add_(x[0]),
            lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        for looks, what in {
            lambda: x.sum().item(): WAIT,
            lambda: bool(x[0, 0] > 0): WAIT,
            lambda: x[x > 0]: WAIT,
            lambda: x.nonzero(): WAIT,
            lambda: torch.equal(x, x): WAIT,
            lambda: x.tolist(): TO_HOST,
            lambda: x.cpu(): TO_HOST,
            lambda: torch.ones(12).copy_(x.view(-1)): TO_HOST,
            lambda: torch.ones(2).to(DEVICE): TO_DEVICE,
            lambda: torch.tensor([1.0], device=DEVICE): TO_DEVICE,
            lambda: x[torch.tensor([0])]: TO_DEVICE,
        }.items():
            with device.watched() as seen:
                looks()
            assert [kind for kind, _ in seen] == [what]
        with device.watched() as seen:
            (x @ x.T).softmax(-1)[:2] += 1
        assert not seen


# --- packed formats ---


@pytest.mark.parametrize("form", QUANTIZERS, ids=str)
def test_a_packed_product_is_the_cpus_and_waits_for_nothing(form, monkeypatch):
    shape = (33, 40)
    weight, x = torch.randn(shape), torch.randn(3, 40)
    parts, gradient = form.quantize(weight), torch.randn(3, 33)

    def products(where: torch.device) -> tuple[list[Any], list[Any]]:
        own = {name: value.to(where) for name, value in parts.items()}
        given, back = x.clone().to(where).requires_grad_(), gradient.to(where)
        form.linear(given, own, shape)  # constants of the format are made once
        with device.watched() as seen:
            result = form.linear(given, own, shape)
            result.backward(back)
        twin = {name: value.clone() for name, value in own.items()}
        still = given.detach()
        with torch.no_grad():  # the input of q, k and v is turned once: their signs are compared
            for _ in range(2):
                with device.watched() as again:
                    form.linear(still, own, shape)
                    form.linear(still, twin, shape)
        seen += again
        return [on_cpu(t) for t in (result, given.grad, form.dequantize(own, shape, torch.float32))], seen

    with StandIn() as device:
        made = form.quantize(weight.to(DEVICE))
        assert all(torch.equal(made[name].cpu(), value) for name, value in parts.items())
        for tile in (2**22, 8 * 40):  # whole, and in tiles
            monkeypatch.setattr("lord_tune.quantizers.base.tile_of", lambda device, tile=tile: tile)
            expected, _ = products(torch.device("cpu"))
            result, seen = products(DEVICE)
            assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))
            assert not seen


# --- decompose ---


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in RUNS])
def test_decompose_writes_what_it_writes_on_the_cpu(name, made, source, rows, tmp_path):
    lord_tune.decompose(str(source), str(tmp_path / "cpu"), **options_of(name, rows))
    expected, written = read_tensors(tmp_path / "cpu"), read_tensors(made(name))
    assert sorted(written) == sorted(expected)
    if name in _GRADIENTS:
        before, after = (load_dense_or_factored(str(f))(input_ids=IDS).logits for f in (tmp_path / "cpu", made(name)))
        assert torch.allclose(after, before, atol=1e-3)
    else:
        assert [key for key, value in expected.items() if not torch.equal(written[key], value)] == []


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_bert], ids=["gpt2", "bert"])
def test_other_families(build, rows, tmp_path):
    model = save_tiny(build(), tmp_path / "model")
    with StandIn() as device:
        given = {"calibration": [str(rows)], "kept_fraction": 0.7, "targets": r"\.1\.", **TEXT}
        lord_tune.decompose(str(model), str(tmp_path / "out"), **given)
        loaded, tokenizer = lord_tune.load(str(tmp_path / "out"))
        result = loaded(input_ids=IDS.to(DEVICE)).logits
        with device.watched() as seen:
            speed(loaded, IDS[0])
        # before and after each of four runs; a clock stopped before the device is done times the launch
        assert [operation for _, operation in seen].count("synchronize") == 8
    expected = lord_tune.load(str(tmp_path / "out"))[0](input_ids=IDS).logits
    assert torch.allclose(on_cpu(result), expected, atol=1e-5)


def test_memory_is_that_of_the_device(made, source, rows, tmp_path):
    """Measured and foreseen, without this process's hundreds of megabytes and what glibc keeps."""
    totals = json.loads((made("default") / "decomposition.json").read_text())["totals"]
    assert totals["peak_memory_bytes"] == PEAK
    assert PEAK < totals["estimated_peak_memory_bytes"] < PEAK + 2**21
    lord_tune.plan(str(source), calibration=[str(rows)], **TEXT, kept_fraction=0.7, json=str(tmp_path / "cpu.json"))
    with StandIn():
        lord_tune.plan(str(source), calibration=[str(rows)], **TEXT, kept_fraction=0.7, json=str(tmp_path / "it.json"))
    cpu, it = (json.loads((tmp_path / name).read_text())["phases"] for name in ("cpu.json", "it.json"))
    assert it["start"] < cpu["start"] and it["calibrating"] < cpu["calibrating"]


# --- loaded models ---


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in RUNS])
def test_a_forward_and_a_backward_pass_of_a_layer_wait_for_nothing(name, made):
    expected = load_dense_or_factored(str(made(name)))(input_ids=IDS).logits
    with StandIn() as device:
        model = load_dense_or_factored(str(made(name)))
        assert {p.device for p in model.parameters()} == {DEVICE}
        assert torch.allclose(on_cpu(model(input_ids=IDS.to(DEVICE)).logits), expected, atol=1e-5)
        for key, layer in factored_layers(model).items():
            x = torch.randn(2, 3, layer.in_features, device=DEVICE, requires_grad=True)
            with device.watched() as seen:
                layer(x).sum().backward()
            assert not seen, key


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("mode", "name"),
    [*((mode, "int4" if mode == "split" else "nf4") for mode in MODES), ("factors", "pivoted"), ("lora", "pivoted")],
)
def test_adapters_train_merge_fold_and_save(mode, name, made, tmp_path):
    folder = made(name)
    with StandIn() as device:
        model = MODES[mode](load_dense_or_factored(str(folder)))
        ids = IDS.to(DEVICE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        wrapped = factored_layers(model.get_base_model())
        for key, layer in wrapped.items():
            x = torch.randn(2, 3, layer.in_features, device=DEVICE, requires_grad=True)
            with device.watched() as seen:
                layer(x).sum().backward()
            assert not seen, key
        with torch.no_grad():
            trained = model(input_ids=ids).logits.cpu()
            with model.disable_adapter():
                assert not torch.allclose(model(input_ids=ids).logits.cpu(), trained, atol=1e-4)
            assert torch.allclose(lord_tune.merge(model)(input_ids=ids).logits.cpu(), trained, atol=1e-5)
            assert torch.equal(lord_tune.unmerge(model)(input_ids=ids).logits.cpu(), trained)
        model.save_pretrained(tmp_path / "adapter")
        folded = lord_tune.fold(model)
        with torch.no_grad():
            assert torch.allclose(folded(input_ids=ids).logits.cpu(), trained, atol=1e-5)


@pytest.mark.parametrize("mode", [m if m == "factors" else pytest.param(m, marks=pytest.mark.slow) for m in MODES])
def test_train_evaluate_and_export(mode, made, rows, tmp_path):
    base = made("int4" if mode == "split" else "nf4")
    with StandIn():
        given = {"model_name_or_path": str(base), "dataset_name": str(rows), "output_dir": str(tmp_path / "run")}
        short = {"max_steps": 2, "max_length": 32, "per_device_train_batch_size": 2, "bf16": False}
        short["optim"] = "adamw_torch"  # the fused one knows devices by name
        short |= {"basis_share": 0.9, "basis_every": 1} if mode == "basis" else {}
        lord_tune.train(mode=mode, **given, **short)
        result = lord_tune.evaluate(str(tmp_path / "run"), text=[str(rows)], context_length=32, max_tokens=64)
        assert result["peak_memory_bytes"] == PEAK
        lord_tune.export(str(tmp_path / "run"), str(tmp_path / "dense"), format="dense")
        lord_tune.export(str(tmp_path / "run"), str(tmp_path / "factored"), format="factored")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["memory"]["measured"]["peak"] == PEAK  # it trained on the device


# --- what calibration does beside the layers ---


def test_a_process_without_windows_sums_on_the_device(source, tmp_path):
    """Its layers never ran, so the other process's report tells it their widths, and its own blocks the device."""

    class Two(Workers):
        def gather(self, value: Any) -> list[Any]:
            return [value, ({"0": "0"}, {"0": 4})]

        def add_up(self, total: torch.Tensor) -> None:
            assert total.device == DEVICE

        def concatenate(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    with StandIn():
        model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))])).to(DEVICE)
        blocks = Blocks(("0.0",), tuple(model[0]))
        walk = BlockWalk(model, blocks, {"calibration": IDS[:0]}, lambda model, ids: None, tmp_path, Two(1, 2))
        with StateWriter(tmp_path / "states-calibration-00000-1.bin"):
            pass
        found = walk.collect(0, {"0": model[0][0][0]}, keep=False, streams=("calibration",))
        assert found["calibration"]["0"].gram.device == DEVICE


def test_states_arrive_in_order_on_the_device(tmp_path):
    states = [torch.randn(1, 3, 4) for _ in range(5)]
    with StateWriter(tmp_path / "states") as target:
        for state in states:
            target.append(state)
    with StandIn():
        file = StateFile(tmp_path / "states")
        arrived = list(file.on(DEVICE))
        file.close()
        assert all(torch.equal(one.cpu(), other) for one, other in zip(arrived, states, strict=True))


def test_a_sensitivity_pass_copies_nothing_in_its_hooks():
    with StandIn() as device:
        layer = torch.nn.Linear(6, 4).to(DEVICE)
        with _observed({"a": layer}, {"a": torch.eye(4)}) as sums, device.watched() as seen:
            layer(torch.randn(3, 6, device=DEVICE)).sum().backward()
        assert not seen and torch.equal(sums["a"].cpu(), torch.full((4,), 3.0, dtype=torch.float64))
        with _output_products({"a": layer}, {"a": (4, 6)}, True) as sums, device.watched() as seen:
            layer(torch.randn(3, 6, device=DEVICE)).sum().backward()
        assert not seen and torch.equal(sums["a:gram"].cpu(), torch.full((4, 4), 3.0, dtype=torch.float64))
        assert float(sums["a:inputs"].cpu().diagonal().min()) > 0


def test_random_numbers_do_not_depend_on_the_default_device():
    ids = torch.arange(32)[None]
    expected = random_signs(24, 3), masked_windows(ids, 99)[0]
    with StandIn(), torch.device(DEVICE):
        assert torch.equal(random_signs(24, 3), expected[0]) and torch.equal(masked_windows(ids, 99)[0], expected[1])
        Rates.measure(torch.float32, DEVICE)
    assert all(matrix.device.type == "cpu" for matrix in _factors(24, "cpu", torch.float32))


def test_rotations_are_computed_on_the_cpu_whatever_the_default_device():
    """A device's cosines would differ in the last bit."""
    with StandIn() as device, torch.device(DEVICE), device.watched() as seen:
        made = _factors(56, "cpu", torch.float32)
    assert not seen and all(type(matrix) is torch.Tensor for matrix in made)


@pytest.mark.parametrize(
    ("config", "device"),
    [("cuda:nccl", "cuda:3"), ("xpu:xccl", "xpu:3"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu")],
)
def test_tensors_of_the_cpu_go_where_the_group_sends_from(config, device, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: config)
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 3)
    moved = []
    tensor = torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(str(device)) or self)
    assert _on_wire(tensor) is tensor and (moved or ["cpu"]) == [device]


@pytest.mark.parametrize("form", QUANTIZERS, ids=str)
def test_rounding_with_feedback_waits_for_nothing(form):
    """There are as many rounds as columns, so one look at a value in each would be thousands."""
    inner = form.inner if isinstance(form, Rotated) else form
    weight, gram = torch.randn(24, 40), torch.eye(40, dtype=torch.float64) + 0.1
    expected = ldlq(weight, Feedback.of(gram, 0.01, form.block), inner.rounder(weight)).error
    with StandIn() as device:
        values = weight.to(DEVICE)
        feedback, rounder = Feedback.of(gram.to(DEVICE), 0.01, form.block), inner.rounder(values)
        ldlq(values, feedback, inner.rounder(values))  # constants of the format are made once
        with device.watched() as seen:
            result = ldlq(values, feedback, rounder).error
        assert not seen and torch.equal(result.cpu(), expected)
