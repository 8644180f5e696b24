"""What every mode of training owes a user of PEFT: start, save, load, disable, several adapters, merge and unmerge."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import code_document, read_tensors, tiny_tokenizer

import lord_tune
from lord_tune.adapters.attach import MODES, add_lora, add_scales, coverage, expose_factors, mode_of
from lord_tune.adapters.basis import add_basis
from lord_tune.adapters.fold import merge, unmerge
from lord_tune.adapters.loading import load_adapter
from lord_tune.adapters.stored_tensors import StoredTensor
from lord_tune.errors import CheckpointError, LordWarning, UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.transformers_quantizer import attach
from lord_tune.layers import CastLinear, dense_factor, factored_layers

FAMILIES = ("llama", "gpt2", "bert")  # bias and Conv1D in the second, bias and an encoder in the third
COMBINATIONS = [(mode, family) for mode in MODES for family in FAMILIES]
# data-free and of the middle block alone, so that each takes a second
STORES: dict[str, dict[str, Any]] = {
    "packed": {"backbone": "int4", "rank": 8, "factor_format": "int4", "top_rank": 2, "top_format": "fp16"},
    "wide": {"backbone": "int4", "rank": 8},
    "lord": {"kept_fraction": 0.8, "allocation": "uniform", "form": "plain"},  # no Q, ranks that differ
    "half": {"backbone": "nf4", "rank": 8, "factor_format": "fp16"},
    "int8": {"rank": 12, "factor_format": "int8", "form": "plain"},
}
STORE = {"factors": "wide", "split": "packed", "lora": "packed", "scales": "packed", "basis": "wide"}
MIDDLE = r"\.1\."
IDS = torch.tensor([tiny_tokenizer()(code_document(40))["input_ids"][:48]])
NUMBER = re.compile(r"\.(lora_A|lora_B|lora_basis|ia3_l)\.")


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """(family, store) -> a factored checkpoint, made once."""
    made: dict[tuple[str, str], str] = {}

    def get(family: str, store: str) -> str:
        if (family, store) not in made:
            out = tmp_path_factory.mktemp("bases") / f"{family}-{store}"
            source = str(request.getfixturevalue(f"{family}_dir"))
            lord_tune.decompose(source, str(out), method="svd", targets=MIDDLE, **STORES[store])
            made[family, store] = str(out)
        return made[family, store]

    return get


def put_on(model: Any, mode: str, **options: Any) -> Any:
    if mode == "lora":
        return add_lora(model, rank=4, **options)
    if mode == "basis":
        return add_basis(model, 4, **options)
    return add_scales(model, **options) if mode == "scales" else expose_factors(model, mode=mode, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train_a_little(model: Any, rate: float = 0.05, steps: int = 3) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Trained:
    """A decomposed model, its logits, and those with an adapter that was trained a little."""

    def __init__(self, folder: str, mode: str, **options: Any):
        self.folder, self.mode = folder, mode
        model = load_dense_or_factored(folder)
        self.before = logits(model)
        self.model = put_on(model, mode, **options)
        self.start = logits(self.model)
        train_a_little(self.model, 1.0 if mode == "scales" else 0.05)
        self.after = logits(self.model)
        assert float((self.after - self.before).abs().max()) > 1e-4

    def again(self) -> Any:
        return load_dense_or_factored(self.folder)


@pytest.fixture
def trained(base):
    return lambda mode, family="llama", store=None, **options: Trained(
        base(family, store or STORE[mode]), mode, **options
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("mode", "family"), COMBINATIONS)
def test_an_adapter_starts_trains_saves_loads_and_is_disabled(trained, mode, family, tmp_path):
    """All to the last bit."""
    run = trained(mode, family)
    assert torch.equal(run.start, run.before)
    assert mode_of(run.model) == coverage(run.model).mode == mode and not coverage(run.model).untouched
    for when in (run.model.eval, run.model.train) if family == "llama" else (run.model.eval,):  # others drop out
        with when().disable_adapter():
            assert torch.equal(logits(run.model), run.before)
    assert torch.equal(logits(run.model.eval()), run.after)
    loaded, _ = lord_tune.load(str(saved(run.model, tmp_path / "adapter")))
    assert mode_of(loaded) == mode and torch.equal(logits(loaded), run.after)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), run.before)
    assert all("start" not in key and "route" not in key for key in read_tensors(tmp_path / "adapter"))


@pytest.mark.parametrize(("mode", "family"), COMBINATIONS)
def test_gradients_reach_exactly_the_parameters_of_the_adapter(base, mode, family):
    model = put_on(load_dense_or_factored(base(family, STORE[mode])), mode)
    # seen from outside for the half of LoRA that starts behind zeros
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and mode in ("lora", "basis"):
            parameter.data += 0.01
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        mine = NUMBER.search(name + ".") is not None
        assert (parameter.grad is not None) == parameter.requires_grad == mine, name
        assert not mine or (parameter.dtype == torch.float32 and bool((parameter.grad != 0).any())), name
    assert not [name for name, _ in model.named_buffers() if NUMBER.search(name + ".")]


@pytest.mark.parametrize("mode", MODES)
def test_several_adapters_live_side_by_side(trained, mode, tmp_path):
    """Stock PEFT: load a second one, switch, save each alone, delete."""
    first, second = trained(mode), trained(mode)
    train_a_little(second.model, 0.1)
    other = logits(second.model)
    folders = [saved(run.model, tmp_path / name) for run, name in ((first, "first"), (second, "second"))]
    model = load_adapter(first.again(), folders[0])
    model.load_adapter(folders[1], adapter_name="b")
    for name, expected in (("default", first.after), ("b", other), ("default", first.after), ("b", other)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable and all(f".{name}" in key for key in trainable)
        assert coverage(model, name).trainable_parameters == sum(model.get_parameter(key).numel() for key in trainable)
        with model.disable_adapter():
            assert torch.equal(logits(model), first.before)
    assert {p.dtype for key, p in model.named_parameters() if NUMBER.search(key + ".")} == {torch.float32}
    model.save_pretrained(tmp_path / "both")
    for part, folder in ((tmp_path / "both", folders[0]), (tmp_path / "both" / "b", folders[1])):
        assert torch.equal(logits(load_adapter(first.again(), part)), logits(load_adapter(first.again(), folder)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which one is active now
        model.delete_adapter("b")
        assert torch.equal(logits(model), first.after)
        model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), first.before)  # a PeftModel without adapters cannot be called


@pytest.mark.parametrize("mode", MODES)
def test_a_further_adapter_starts_from_the_decomposed_model(trained, mode, tmp_path):
    run = trained(mode)
    put_on(run.model, mode, adapter_name="b")
    assert torch.equal(logits(run.model), run.after) and run.model.active_adapters == ["default"]
    assert not any(p.requires_grad for key, p in run.model.named_parameters() if re.search(r"\.b(\.|$)", key))
    run.model.set_adapter("b")
    assert torch.equal(logits(run.model), run.before)
    train_a_little(run.model, 0.1)
    assert not torch.equal(logits(run.model), run.before)
    run.model.set_adapter("default")
    assert torch.equal(logits(run.model), run.after)
    with pytest.raises(UsageError, match="already"):
        put_on(run.model, mode, adapter_name="b")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("mode", "family"), COMBINATIONS)
def test_merge_unmerge_and_fold(trained, mode, family, tmp_path):
    run = trained(mode, family)
    ranks = {name: layer.rank for name, layer in factored_layers(run.model.get_base_model()).items()}
    assert merge(run.model) is run.model
    merged = logits(run.model)
    # of the others the factors are rounded to float32 with the update in them, 6e-8 of logits below 10 per product
    assert (
        torch.equal(merged, run.after) if mode in ("factors", "split") else torch.allclose(merged, run.after, atol=2e-5)
    )
    for _ in range(2):
        assert torch.equal(logits(unmerge(run.model)), run.after)
        assert torch.equal(logits(merge(run.model)), merged)
    saved(run.model, tmp_path / "adapter")  # the adapter, although merged
    assert torch.equal(logits(load_adapter(run.again(), tmp_path / "adapter")), run.after)
    folded = lord_tune.fold(run.model)
    assert torch.equal(logits(folded), merged) and mode_of(folded) is None
    new = 4 if mode == "basis" else 0
    expected = {name: rank + new for name, rank in ranks.items()}
    assert {name: layer.rank for name, layer in factored_layers(folded).items()} == expected
    attach(folded)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(load_dense_or_factored(str(tmp_path / "folded"))), merged)
    again = (
        put_on(folded, mode) if mode in ("factors", "scales", "basis") else None
    )  # the folded model is a base like any other
    if again is not None:
        train_a_little(again)
        with again.disable_adapter():
            assert torch.equal(logits(again), merged)


@pytest.mark.parametrize("mode", MODES)
def test_a_merged_model_still_obeys_peft(trained, mode):
    """Disabled it is the decomposed model, another adapter is that adapter, and it cannot train unseen."""
    run = trained(mode)
    put_on(run.model, mode, adapter_name="b")
    merge(run.model)
    merged = logits(run.model)
    with run.model.disable_adapter():
        assert torch.equal(logits(run.model), run.before)
    run.model.set_adapter("b")
    assert torch.equal(logits(run.model), run.before)
    run.model.set_adapter("default")
    assert torch.equal(logits(run.model), merged)
    with pytest.raises(UsageError, match="unmerge first"):
        run.model.train()(input_ids=IDS, labels=IDS)
    train_a_little(unmerge(run.model))
    assert not torch.equal(logits(run.model), run.after)
    run.model.base_model.disable_adapter_layers()
    with pytest.raises(UsageError, match="no active adapter"):
        merge(run.model)


@pytest.mark.parametrize("mode", MODES)
def test_stock_merging_is_right_or_refused(trained, mode):
    """Left alone, it fails on packed codes with a message about tensor sizes, and rounds into fp16."""
    run = trained(mode)
    for stock in (run.model.merge_adapter, run.model.merge_and_unload):
        for safe in (False, True):
            with pytest.raises(UsageError, match="lord_tune.merge"):
                stock(safe_merge=safe)
    assert torch.equal(logits(run.model), run.after)
    unloaded = run.model.unload()
    assert torch.equal(logits(unloaded), run.before)
    assert torch.equal(logits(lord_tune.fold(unloaded)), run.before)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", ["lora", "scales"])
@pytest.mark.parametrize("store", ["lord", "half", "int8"])
def test_stock_merging_of_float32_factors_is_right(trained, mode, store):
    run = trained(mode, store=store)
    if store == "lord":
        assert torch.allclose(logits(run.model.merge_and_unload()), run.after, atol=2e-5)
    else:
        with pytest.raises(UsageError, match="not float32"):
            run.model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(("mode", "store"), [("factors", "lord"), ("factors", "half"), ("scales", "half")])
def test_other_stores(trained, mode, store, tmp_path):
    """No backbone and ranks that differ; 16-bit factors, which train in float32 and are disabled in 16 bits."""
    run = trained(mode, store=store)
    assert torch.equal(run.start, run.before)
    with run.model.disable_adapter():
        assert torch.equal(logits(run.model), run.before)
    loaded = load_adapter(run.again(), saved(run.model, tmp_path / "adapter"))
    assert torch.equal(logits(loaded), run.after)
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}
    assert torch.allclose(logits(lord_tune.fold(loaded)), run.after, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_16_bit_model_trains_in_float32_and_is_disabled_in_16_bits(base, mode):
    """Factors that train compute in float32, those of the decomposed model in bfloat16: alike to its rounding."""
    model = load_dense_or_factored(base("llama", STORE[mode]), "bfloat16")
    before = logits(model)
    exposed = put_on(model, mode)
    # logits up to 8, whose last bit is 2^-5; two roundings of it
    assert before.dtype == torch.bfloat16 and torch.allclose(logits(exposed), before, atol=2**-4)
    train_a_little(exposed, 1.0)
    assert {p.dtype for p in exposed.parameters() if p.requires_grad} == {torch.float32}
    with exposed.disable_adapter():
        assert torch.equal(logits(exposed), before)


def preferences() -> Dataset:
    rows = [{"prompt": f"def count_{n}", "chosen": "(values):", "rejected": " = None"} for n in range(4)]
    return Dataset.from_list(rows)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", MODES)
def test_preference_training_starts_at_ln_2(base, mode, tmp_path):
    """trl's reference is a copy of the adapter; without that copy it is the disabled adapter, at no memory."""
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        bf16=False, use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, warmup_steps=0,
    )  # fmt: skip
    for copied in (True, False):
        model = put_on(load_dense_or_factored(base("llama", STORE[mode])), mode)
        before = logits(model)
        trainer = DPOTrainer(model, args=arguments, train_dataset=preferences(), processing_class=tiny_tokenizer())
        if not copied:
            model.delete_adapter("ref")
        trainer.train()
        first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert first == pytest.approx(math.log(2), abs=1e-6) and second < first  # both terms are zero at the start
        with model.eval().disable_adapter():
            assert torch.equal(logits(model), before)
        if copied:
            model.set_adapter("ref")
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_reference_pass_inside_gradient_checkpointing_changes_nothing(base, mode):
    """Blocks are run again in the backward pass, when the adapter is enabled again."""
    gradients = []
    for reference in (False, True):
        torch.manual_seed(0)
        model = put_on(load_dense_or_factored(base("llama", STORE[mode])), mode)
        if reference:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        if reference:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=IDS)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_start_is_read_from_the_checkpoint_or_kept(base, tmp_path):
    """No memory for what a file holds; a model that no file holds keeps a copy; a file that changed is an error."""
    import shutil

    folder = shutil.copytree(base("llama", "wide"), tmp_path / "base")
    model = load_dense_or_factored(str(folder))
    before = logits(model)
    exposed = train_a_little(expose_factors(model))
    routes = [layer.route for layer in factored_layers(model).values()]
    assert all(isinstance(kept, StoredTensor) for route in routes for kept in route.start)
    twin = copy.deepcopy(exposed)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), before)
    assert torch.equal(logits(twin), logits(exposed))
    for shard in folder.glob("*.safetensors"):
        os.utime(shard, ns=(1, 1))
    with pytest.raises(CheckpointError, match="written again"), exposed.disable_adapter():
        logits(exposed)
    changed = load_dense_or_factored(base("llama", "wide"))
    for layer in factored_layers(changed).values():
        layer.left.weight.data *= 2
    before = logits(changed)
    exposed = train_a_little(expose_factors(changed))
    assert isinstance(factored_layers(changed)["model.layers.1.mlp.up_proj"].route.start[0], torch.Tensor)
    with exposed.disable_adapter():
        assert torch.equal(logits(exposed), before)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_of_different_layers(base, mode, tmp_path):
    """A layer without the active adapter computes what was decomposed; a host more is made by our load alone."""
    folder = base("llama", STORE[mode])
    after = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LordWarning)
        for targets in ("q_proj", "mlp"):
            model = train_a_little(put_on(load_dense_or_factored(folder), mode, targets=targets))
            after[targets] = logits(model)
            assert all(targets in name for name in coverage(model).trained) and coverage(model).untouched
            saved(model, tmp_path / targets)
    model = load_adapter(load_dense_or_factored(folder), tmp_path / "q_proj")
    if mode in ("factors", "split", "basis"):
        with pytest.raises((ValueError, CheckpointError), match="Target modules|load_adapter"):
            model.load_adapter(tmp_path / "mlp", adapter_name="b")
    load_adapter(model, tmp_path / "mlp", "mlp")
    for name, targets in (("mlp", "mlp"), ("default", "q_proj"), ("mlp", "mlp")):
        model.set_adapter(name)
        assert torch.equal(logits(model), after[targets])
    folded = lord_tune.fold(model, "default")
    assert torch.allclose(logits(folded), after["q_proj"], atol=2e-5)


def test_a_partly_known_adapter_is_refused_by_stock_loading(base, tmp_path):
    """PEFT drops tensors that have no place without a word."""
    folder = base("llama", "wide")
    expose_factors(load_dense_or_factored(folder)).save_pretrained(tmp_path / "all")
    with pytest.warns(LordWarning):
        model = expose_factors(load_dense_or_factored(folder), "q_proj")
    with pytest.raises(CheckpointError, match="has no place"):
        model.load_adapter(tmp_path / "all", adapter_name="b")


def test_an_adapter_of_another_rank_or_mode_is_refused(base, llama_dir, tmp_path):
    lord_tune.decompose(str(llama_dir), str(tmp_path / "four"), method="svd", targets=MIDDLE, backbone="int4", rank=4)
    expose_factors(load_dense_or_factored(str(tmp_path / "four"))).save_pretrained(tmp_path / "rank4")
    model = expose_factors(load_dense_or_factored(base("llama", "wide")))
    with pytest.raises(CheckpointError, match="rank 4.*rank 8"):
        model.load_adapter(tmp_path / "rank4", adapter_name="b")
    folders = {mode: tmp_path / mode for mode in MODES}
    for mode, folder in folders.items():
        put_on(load_dense_or_factored(base("llama", STORE[mode])), mode).save_pretrained(folder)
    for mode in MODES:
        model = put_on(
            load_dense_or_factored(base("llama", "wide" if mode in ("factors", "basis") else "packed")), mode
        )
        for other in set(MODES) - {mode}:
            with pytest.raises((UsageError, CheckpointError)):
                load_adapter(model, folders[other], "b")
            with pytest.raises(UsageError, match="an adapter of mode"):
                put_on(model, other, adapter_name="b")
    with pytest.raises(CheckpointError, match="does not have"):  # components apart, which this base has none of
        load_adapter(load_dense_or_factored(base("llama", "wide")), folders["scales"])


@pytest.mark.parametrize("on", ["both", "left", "right", "smaller"])
def test_lora_on_one_factor(base, on, tmp_path):
    model = load_dense_or_factored(base("llama", "packed"))
    before = logits(model)
    exposed = train_a_little(add_lora(model, rank=2, on=on))
    expected = 0
    for name, layer in factored_layers(exposed.get_base_model()).items():
        (m, n), inner = layer.plan.shape, layer.rank - layer.plan.top_rank
        numbers = {"left": 2 * (m + inner), "right": 2 * (n + inner)}
        numbers |= {"both": sum(numbers.values()), "smaller": min(numbers.values())}
        expected += numbers[on]
        assert coverage(exposed).trained[name] == 2
    assert coverage(exposed).trainable_parameters == expected and mode_of(exposed) == "lora"
    after = logits(exposed)
    loaded = load_adapter(load_dense_or_factored(base("llama", "packed")), saved(exposed, tmp_path / "a"))
    assert torch.equal(logits(loaded), after) and not torch.equal(after, before)
    assert coverage(loaded).trainable_parameters == expected
    with pytest.raises(UsageError, match="lora_on"):
        add_lora(load_dense_or_factored(base("llama", "packed")), on="sideways")


@pytest.mark.parametrize("store", ["lord", "packed", "int8", "half"])
@pytest.mark.parametrize("on", ["components", "components_and_outputs"])
def test_scales_multiply_rows_of_r_and_of_l(trained, store, on, tmp_path):
    """L and R folded are D_out L and D R; what need not change keeps its storage."""
    run = trained("scales", store=store, on=on)
    layers = factored_layers(run.model.get_base_model())
    count = sum(layer.rank for layer in layers.values())
    if on == "components_and_outputs":  # components apart have numbers of their own
        count += sum((2 if layer.plan.top_rank else 1) * layer.out_features for layer in layers.values())
    assert coverage(run.model).trainable_parameters == count
    name = "model.layers.1.mlp.down_proj"  # 160 inputs, 64 outputs
    scales = {
        key.split(".")[-3]: p.detach().double().flatten()
        for key, p in run.model.named_parameters()
        if key.startswith(f"base_model.model.{name}.") and "ia3_l" in key
    }
    start = factored_layers(run.again())[name]
    folded = factored_layers(lord_tune.fold(run.model))[name]
    for top in ("", "top_") if start.top_left is not None else ("",):
        left, right = (getattr(start, f"{top}{side}") for side in ("left", "right"))
        outputs = scales.get(f"{top}left", torch.ones(64))
        expected = outputs[:, None] * dense_factor(left) @ (scales[f"{top}right"][:, None] * dense_factor(right))
        new = [getattr(folded, f"{top}{side}") for side in ("left", "right")]
        assert torch.allclose(dense_factor(new[0]) @ dense_factor(new[1]), expected, rtol=0, atol=1e-5)
        # L is the smaller one here; components apart are stored in one format
        assert isinstance(new[0], CastLinear) and new[0].weight.dtype == torch.float32
        assert new[1].weight.dtype == torch.float32 if top else torch.equal(new[1].weight, right.weight)
    with pytest.raises(UsageError, match="scales_on"):
        add_scales(run.again(), on="sideways")


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_scales_adapter_is_exported(trained, tmp_path, form):
    run = trained("scales")
    saved(run.model, tmp_path / "adapter")
    result = lord_tune.export(str(tmp_path / "adapter"), str(tmp_path / "out"), form)
    assert result["comparison"]["kl"] < 1e-6
    if form == "factored":
        exported, _ = lord_tune.load(str(tmp_path / "out"))
        assert torch.allclose(logits(exported), run.after, atol=2e-5)


def test_targets_of_a_saved_adapter_are_the_layers_alone(trained, tmp_path):
    """GPT-2's Conv1D layers hold plain linear children, and the configuration says so."""
    for mode in MODES:
        run = trained(mode, "gpt2")
        saved(run.model, tmp_path / mode)
        config = json.loads((tmp_path / mode / "adapter_config.json").read_text())
        assert config["fan_in_fan_out"] is False and config["base_model_name_or_path"] == run.folder
