"""Mode basis (Basis Selection): learnt singular values, which of them stay, and what becomes of the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forking import ForkServer
from safetensors.torch import load_file
from tiny import code_document, read_tensors, save_tiny, tiny_bert, tiny_gpt2, tiny_tokenizer, write_code_rows
from transformers import TrainerCallback

import lord_tune
from lord_tune.adapters.basis import add_basis, learnt
from lord_tune.allocation import PIVOTED, PLAIN, factor_cost
from lord_tune.errors import CheckpointError, UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import PivotedLinear, dense_factor, factored_layers, weight_of
from lord_tune.layers.sizes import sizes
from lord_tune.training import TrainOptions
from lord_tune.training import run as training_run
from lord_tune.training.basis import Pruning, Stored, count_of, cumulated, due, largest, share_within

IDS = torch.tensor([tiny_tokenizer()(code_document(40))["input_ids"][:48]])
# rows as long as is foreseen
RUN = {"max_length": 64, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 8}
BASIS = {"mode": "basis", "basis_new": 3, "basis_every": 2, "basis_start": 0.2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_code_rows(tmp_path_factory.mktemp("rows") / "code.jsonl", 12)


@pytest.fixture(scope="module")
def sources(llama_dir, tmp_path_factory) -> dict[str, Path]:
    """Family -> a dense model, whose biases are not zero."""
    found = {"llama": llama_dir}
    for family, model in (("gpt2", tiny_gpt2()), ("bert", tiny_bert())):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        found[family] = save_tiny(model, tmp_path_factory.mktemp("sources") / family)
    return found


@pytest.fixture(scope="module")
def base(sources, tmp_path_factory):
    """(family, options) -> a factored checkpoint of the middle block, with all components unless a rank is given."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", **options: Any) -> Path:
        key = f"{family}{options}"
        if key not in made:
            out = made[key] = tmp_path_factory.mktemp("bases") / "base"
            whole = {} if "rank" in options else {"full_rank": True}
            lord_tune.decompose(str(sources[family]), str(out), method="svd", targets=r"\.1\.", **whole, **options)
        return made[key]

    return get


@pytest.fixture(scope="module")
def forks():
    server = ForkServer()
    yield server
    server.close()


def train(base: Path, rows: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"model_name_or_path": str(base), "dataset_name": str(rows), "output_dir": str(out)}
    return lord_tune.train(**(RUN | BASIS | {"save_strategy": "no"} | given | options))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# ---- which stay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_set_with_a_share_of_the_sum(seed):
    """Compared with the definition, over all sets of the largest."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(seed)).square()
    values[::7] = 0
    for share in (0.01, 0.3, 0.9, 0.999):
        count = count_of(cumulated(values), share)
        chosen = values[largest(values, count)].double()
        total = values.double().sum()
        assert len(chosen) == count and chosen.sum() >= share * total * (1 - 1e-12)
        assert chosen.sum() - chosen.min() < share * total, "one less would do"
        assert chosen.min() >= values[~largest(values, count)].max()
    assert count_of(cumulated(values), 1.0) == int((values > 0).sum())
    assert count_of(cumulated(torch.zeros(3)), 0.5) == 0
    assert largest(torch.tensor([1.0, 2.0, 1.0]), 2).tolist() == [True, True, False]


@pytest.mark.parametrize("form", [PLAIN, PIVOTED])
def test_a_size_is_met_from_below(form):
    """By the largest share that meets it: a bit more of it is too much."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (64, 64), "b": (32, 96), "c": (160, 48)}
    layers = {name: cumulated(torch.rand(min(shape), generator=generator)) for name, shape in shapes.items()}
    stored = {name: Stored(shape, form, 4) for name, shape in shapes.items()}

    def numbers(share: float) -> int:
        counts = {name: count_of(sums, share) for name, sums in layers.items()}
        return sum(factor_cost(shapes[name], min(n + 4, *shapes[name]), form) for name, n in counts.items())

    for limit in (4000, 8000, 11_111):
        share = share_within(layers, stored, limit)
        assert 0 < share < 1 and numbers(share) <= limit < numbers(share * (1 + 1e-9))
        assert limit - numbers(share) < 256  # one component of the largest layer
    assert share_within(layers, stored, 10**6) == 1


def test_the_steps_of_pruning():
    assert due(300, 1 / 3, 50) == [150, 200, 250, 300]
    assert due(9, 0.0, 2) == [2, 4, 6, 8] and due(4, 0.9, 3) == []


def pruning(base: Path, steps: int, **options: Any) -> tuple[Any, Pruning, Any]:
    """A model, what prunes it, and the trainer's state; nothing is trained."""
    model = add_basis(load_dense_or_factored(str(base)), 3)
    given = TrainOptions(str(base), "rows", mode="basis", basis_new=3, **options)
    callback, state = Pruning(model, given, steps), SimpleNamespace(global_step=0, max_steps=steps)
    state.is_world_process_zero = False
    callback.on_train_begin(None, state, None)  # type: ignore[arg-type]
    return model, callback, state


def test_the_kept_share_falls_exponentially(base):
    """Without training the share of the first sums is share^(p / prunings) after p prunings, from above, by less than
    the smallest that is left."""
    model, callback, state = pruning(base(), 10, basis_share=0.4, basis_start=0.0, basis_every=2)
    first = {name: root.detach().double().square() for name, root in learnt(model).items()}
    for step in range(1, 11):
        state.global_step = step
        callback.on_step_end(None, state, None)  # type: ignore[arg-type]
        for name, root in learnt(model).items():
            left = float((root.double().square().sum() / first[name].sum()).detach())
            wanted = 0.4 ** (step // 2 / 5)
            # from above by less than the smallest value that is left
            least = float((root[root != 0].double().square().min() / first[name].sum()).detach())
            assert wanted - 1e-6 <= left < wanted + least + 1e-6, (step, name)
    counts = {len(root) - int((root == 0).sum()) for root in learnt(model).values()}
    assert len(counts) > 1, "ranks are the layers' own"


def test_a_pruned_component_stays_pruned(base):
    """Whatever the optimizer's momentum does to it."""
    model, callback, state = pruning(base(), 4, basis_share=0.5, basis_start=0.0, basis_every=2)
    state.global_step = 2
    callback.on_step_end(None, state, None)  # type: ignore[arg-type]
    before = {name: root == 0 for name, root in learnt(model).items()}
    with torch.no_grad():
        for root in learnt(model).values():
            root += 1
    state.global_step = 3
    callback.on_step_end(None, state, None)  # type: ignore[arg-type]
    assert all(torch.equal(root == 0, before[name]) and before[name].any() for name, root in learnt(model).items())


# ---- a layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"form": "plain"}, {"rank": 12, "form": "plain", "factor_format": "nf4"}])
def test_the_sizes_are_singular_values_and_the_layer_is_the_equation(base, options):
    """W = L diag(w^2 / s) R + B A in float64, on pivoted, plain and packed factors."""
    model = load_dense_or_factored(str(base(**options)))
    dense = {name: layer.dense_weight(torch.float64) for name, layer in factored_layers(model).items()}
    exposed = add_basis(model, 3)
    for name, layer in factored_layers(exposed.get_base_model()).items():
        root, host = learnt(exposed)[name], layer.host
        values = torch.linalg.svdvals(dense[name])[: len(root)]
        if "factor_format" not in options:
            # float32 numbers are as exact as the largest value; the root of one of 0 is that of the rounding
            assert torch.allclose(root.detach().double().square(), values, atol=1e-5 * float(values[0]))
        with torch.no_grad():
            root.mul_(torch.linspace(0.5, 1.5, len(root)))
            root[::3] = 0
            host.lora_B["default"].weight.normal_()
            left, right = dense_factor(host.base_layer.left), dense_factor(host.base_layer.right)
            started = left.norm(dim=0) * right.norm(dim=1)
            new = host.lora_B["default"].weight.double() @ host.lora_A["default"].weight.double()
            expected = (left * (root.double().square() / started)) @ right + new
            x = torch.randn(5, layer.in_features)
            assert torch.allclose(host(x).double(), x.double() @ expected.T, rtol=0, atol=1e-4)
            delta = host.get_delta_weight("default").double()
            assert torch.allclose(dense[name] + delta, expected, rtol=0, atol=1e-4)
        parts = lord_tune.adapters.fold._from_basis(host, ("default",))
        left, right = dense_factor(parts.left), dense_factor(parts.right)
        assert left.shape[1] == min(int((root != 0).sum()) + 3, *layer.plan.shape)
        assert torch.allclose(left @ right, expected, rtol=0, atol=1e-4)


def test_a_component_of_size_0_is_no_number_divided_by_0(base):
    model = load_dense_or_factored(str(base(form="plain")))
    with torch.no_grad():
        for layer in factored_layers(model).values():
            layer.left.weight[:, -2:] = 0
    before = logits(model)
    exposed = add_basis(model, 2)
    assert torch.equal(logits(exposed), before)
    exposed(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool(torch.isfinite(root.grad).all()) for root in learnt(exposed).values())


# ---- a run ---------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """The pruned components after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({name: (root == 0).clone() for name, root in learnt(model).items()})


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])  # Conv1D and biases, an encoder with biases
@pytest.mark.parametrize("size", [{"basis_share": 0.5}, {"basis_kept_fraction": 0.4}], ids=["share", "fraction"])
def test_a_run_prunes_saves_loads_and_becomes_a_checkpoint(family, size, base, rows, tmp_path, monkeypatch):
    watch, made = Watch(), training_run._make_trainer

    def watched(*given: Any) -> Any:
        trainer = made(*given)
        trainer.add_callback(watch)
        return trainer

    monkeypatch.setattr(training_run, "_make_trainer", watched)
    # ours prunes after this one has looked: the masks of a step are seen one step later
    metrics = train(base(family), rows, tmp_path / "run", **size)
    for one, other in zip(watch.seen, watch.seen[1:], strict=False):
        assert all(bool((one[name] <= other[name]).all()) for name in one), "masks only shrink"
    found = metrics["basis"]
    assert found["prunings"] == [2, 4, 6, 8]
    model, _ = lord_tune.load(str(tmp_path / "run"))
    kept = {name: int((root != 0).sum()) for name, root in learnt(model).items()}
    assert kept == found["kept"] and all(0 < kept[name] < len(root) for name, root in learnt(model).items())
    assert all(int((~watch.seen[-1][name]).sum()) > kept[name] for name in kept), "the last pruning took some"
    if found["limit"] is not None:
        assert 0.95 * found["limit"] < found["numbers"] <= found["limit"]
    masked = logits(model)
    lord_tune.export(str(tmp_path / "run"), str(tmp_path / "out"), format="factored")
    folded = load_dense_or_factored(str(tmp_path / "out"))
    layers = factored_layers(folded)
    assert {name: layer.rank for name, layer in layers.items()} == {
        name: min(count + 3, *layers[name].plan.shape) for name, count in kept.items()
    }
    assert all(isinstance(layer.left, PivotedLinear) for layer in layers.values())
    stored = [p for y in layers.values() for side in (y.left, y.right) for p in side.parameters()]
    assert sum(p.numel() for p in stored) == found["numbers"]
    # float32: a product of up to 160 numbers near 1 is off by some of its last bits, 6e-8, and logits are below 10
    assert torch.allclose(logits(folded), masked, rtol=0, atol=5e-5)
    original = load_dense_or_factored(str(base(family)))
    for name, layer in layers.items():
        bias = factored_layers(original)[name].bias
        assert (layer.bias is None) == (bias is None) and (bias is None or torch.equal(layer.bias, bias))
    if family != "llama":
        assert any(layer.bias is not None and layer.bias.abs().sum() > 0 for layer in layers.values())


def test_the_second_part_trains_the_factors_that_are_left(base, rows, tmp_path):
    train(base(), rows, tmp_path / "run", basis_share=0.5)
    lord_tune.export(str(tmp_path / "run"), str(tmp_path / "out"), format="factored")
    given = {"model_name_or_path": str(tmp_path / "out"), "dataset_name": str(rows)}
    metrics = lord_tune.train(**RUN, **given, output_dir=str(tmp_path / "two"), save_strategy="no")
    before, after = (metrics["history"][i]["loss"] for i in (0, -1))
    assert after < before
    lord_tune.export(str(tmp_path / "two"), str(tmp_path / "end"), format="factored")
    ranks = [
        {name: layer.rank for name, layer in factored_layers(load_dense_or_factored(str(tmp_path / part))).items()}
        for part in ("out", "end")
    ]
    assert ranks[0] == ranks[1]


def test_it_learns_the_original_beside_a_backbone(base, rows, tmp_path):
    """objective distill; the codes of Q stay to the bit, and only L R is pruned."""
    folder = base(rank=16, backbone="int4")
    metrics = train(folder, rows, tmp_path / "run", basis_share=0.5, objective="distill", max_steps=6)
    kl = [entry["kl"] for entry in metrics["history"] if "kl" in entry]
    assert len(kl) == 6 and kl[0] > 0 and kl[-1] != kl[0]  # pruning costs more than 6 steps win back
    lord_tune.export(str(tmp_path / "run"), str(tmp_path / "out"), format="factored")
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    codes = [key for key in before if ".backbone." in key]
    assert codes and all(torch.equal(before[key], after[key]) for key in codes)
    ranks = {layer.rank for layer in factored_layers(load_dense_or_factored(str(tmp_path / "out"))).values()}
    assert 3 < max(ranks) < 16 + 3


def test_bytes_are_those_of_the_checkpoint_in_its_own_dtype(base, llama_dir, rows, tmp_path):
    """It trains in float32 on a CPU; what is not trained is written in bfloat16, as it was."""
    lord_tune.decompose(str(llama_dir), str(tmp_path / "half"), method="svd", full_rank=True, dtype="bfloat16")
    train(tmp_path / "half", rows, tmp_path / "run", basis_max_bytes="300kB", targets="mlp")
    lord_tune.export(str(tmp_path / "run"), str(tmp_path / "out"), format="factored")
    assert 290_000 < sizes(load_dense_or_factored(str(tmp_path / "out")))["model_bytes"] <= 300_000


@pytest.mark.one_in(3)
@pytest.mark.parametrize("moment", [("step", "5", "before"), ("rename", "run/train_results.json", "before")])
@pytest.mark.parametrize("size", ["--basis_share=0.5", "--basis_kept_fraction=0.4"])
def test_a_killed_run_prunes_as_if_it_had_not_been(forks, base, rows, tmp_path, moment, size):
    own = {"model_name_or_path": str(base()), "dataset_name": str(rows), "output_dir": "run", "save_steps": 3}
    options = RUN | BASIS | own | dict([size.removeprefix("--").split("=")])
    words = ["train", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    whole = forks.run(tmp_path / "whole", words)
    assert whole.codes == [0], whole.stderr[-2000:]
    assert forks.run(tmp_path / "killed", words, die=moment).killed
    again = forks.run(tmp_path / "killed", words)
    assert again.codes == [0], again.stderr[-2000:]
    first, second = (load_file(tmp_path / name / "run" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert any("lora_basis" in key and bool((value == 0).any()) for key, value in first.items())
    results = [json.loads((tmp_path / name / "run/train_results.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["basis"] == results[1]["basis"]
    if moment[0] == "step":
        assert results[1]["resumed_from"].endswith("checkpoint-3")
    more = forks.run(tmp_path / "killed", [*words, "--max_steps", "12"])
    assert more.codes == [2] and "another max_steps" in more.stderr


def test_what_cannot_be_pruned_is_refused(base, rows, tmp_path, monkeypatch):
    apart = base(rank=8, backbone="int4", factor_format="int4", top_rank=2)
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="2 components stored apart, which mode: basis does not prune"):
        train(apart, rows, out, basis_share=0.5)
    with pytest.raises(UsageError, match="load_best_model_at_end would give back"):
        best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
        steps = {"save_steps": 2, "eval_steps": 2}
        train(base(), rows, out, basis_share=0.5, eval_dataset_name=str(rows), **best, **steps)
    with pytest.raises(UsageError, match="prunes after none of the 12 steps"):  # 12 rows, 2 epochs, 2 a step
        train(base(), rows, out, basis_share=0.5, basis_every=50, max_steps=-1, num_train_epochs=2)
    with pytest.raises(UsageError, match="lower basis_new"):
        train(base(), rows, out, basis_kept_fraction=0.1, basis_new=40)
    assert not out.exists()
    with pytest.raises(UsageError, match="`basis_new` 0"):
        add_basis(load_dense_or_factored(str(base())), 0)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UsageError, match="which FSDP shards"):
            training_run.check_run(SimpleNamespace(fsdp="", load_best_model_at_end=False))  # type: ignore[arg-type]


def test_an_adapter_of_other_components_is_refused(base, tmp_path):
    add_basis(load_dense_or_factored(str(base())), 3).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="whose ranks or shapes have changed"):
        lord_tune.load_adapter(load_dense_or_factored(str(base(rank=12))), str(tmp_path / "adapter"))


def test_all_singular_values_are_the_matrix(base, llama_dir):
    """decompose --full-rank, from which a run starts: the original to float32's last bits."""
    original, factored = (load_dense_or_factored(str(folder)) for folder in (llama_dir, base()))
    for name, layer in factored_layers(factored).items():
        weight = weight_of(original.get_submodule(name))
        assert layer.rank == min(weight.shape)
        error = float((layer.dense_weight() - weight).norm() / weight.norm())
        assert error < 1e-6 * math.sqrt(layer.rank)
