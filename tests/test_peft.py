"""PEFT's own configurations and algebra on decomposed models, held to a dense model with stock PEFT, or to formulas in
float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_adapters import IDS, logits, saved
from tiny import code_document, tiny_head, tiny_tokenizer

import lord_tune
from lord_tune.adapters.attach import add_lora, add_scales, expose_factors
from lord_tune.adapters.loading import load_adapter
from lord_tune.errors import CheckpointError, UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.transformers_quantizer import detach
from lord_tune.layers import FactoredLinear, dense_factor, densify, factored_layers

# float32 products of different order, logits of up to 10
CLOSE = 1e-4
STORES: dict[str, dict[str, Any]] = {
    "wide": {"backbone": "int4", "rank": 8},
    "packed": {"backbone": "int4", "rank": 8, "factor_format": "int4", "top_rank": 2, "top_format": "fp16"},
    "int8": {"rank": 12, "factor_format": "int8", "form": "plain"},
    "lord": {"kept_fraction": 0.8, "allocation": "uniform", "form": "plain"},
}
BATCH = torch.stack([torch.tensor(tiny_tokenizer()(code_document(n))["input_ids"][:32]) for n in range(4)])


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """(store, family) -> a factored checkpoint whose first block stayed dense."""
    made: dict[tuple[str, str], str] = {}

    def get(store: str = "wide", family: str = "llama") -> str:
        if (store, family) not in made:
            out = tmp_path_factory.mktemp("bases") / f"{family}-{store}"
            source = str(request.getfixturevalue(f"{family}_dir"))
            lord_tune.decompose(source, str(out), method="svd", targets=r"\.[12]\.", **STORES[store])
            made[store, family] = str(out)
        return made[store, family]

    return get


def dense(folder: str) -> Any:
    """The model that a decomposed checkpoint stands for, with ordinary layers."""
    model = load_dense_or_factored(folder)
    densify(model)
    detach(model)
    return model


def drawn(model: Any, spread: float = 0.05) -> Any:
    """With random numbers in every trained parameter, as training would leave them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=CLOSE)


WHOLE: dict[str, dict[str, Any]] = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 4, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 40, r"^model\.layers\.2\.self_attn\.q_proj": 5},
    },
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    "head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "lm_head": {"target_modules": ["lm_head", "embed_tokens", "gate_proj"]},
    "dora-beside": {"target_modules": ["layers.0.mlp.up_proj"], "use_dora": True},
    "tokens": {"target_modules": ["k_proj"], "trainable_token_indices": [3, 40]},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_configuration_for_the_original_does_the_same_to_the_decomposed(base, kind, tmp_path):
    """Trained on the dense model, loaded on the decomposed one, by PEFT and by lord_tune; folded; written and read."""
    folder = base("packed")
    stock = drawn(get_peft_model(dense(folder), LoraConfig(task_type="CAUSAL_LM", **WHOLE[kind])))
    wanted, plain = logits(stock), logits(load_dense_or_factored(folder))
    assert not close(wanted, plain)
    saved(stock, tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(load_dense_or_factored(folder), str(tmp_path / "adapter"))
    assert close(logits(by_peft), wanted)
    ours = load_adapter(load_dense_or_factored(folder), tmp_path / "adapter")
    assert close(logits(ours), wanted)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), plain)
    saved(ours, tmp_path / "again")
    assert close(logits(load_adapter(load_dense_or_factored(folder), tmp_path / "again")), wanted)
    folded = lord_tune.fold(ours)
    assert close(logits(folded), wanted)
    assert not [name for name, m in folded.named_modules() if type(m).__module__.startswith("peft")]
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(load_dense_or_factored(str(tmp_path / "folded"))), logits(folded))


def test_a_configuration_for_gpt2_too(base, tmp_path):
    """Conv1D: weights stored as (in, out), biases."""
    folder = base("wide", "gpt2")
    for number, targets in enumerate((None, "all-linear", ["c_fc", "mlp.c_proj"])):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=True)
        stock = drawn(get_peft_model(dense(folder), config))
        stock.save_pretrained(tmp_path / str(number))
        ours = load_adapter(load_dense_or_factored(folder), tmp_path / str(number))
        assert close(logits(ours), logits(stock))
        assert close(logits(lord_tune.fold(ours)), logits(stock))


def test_training_around_a_layer_gives_the_gradients_of_the_dense_model(base):
    gradients = []
    for model in (dense(base()), load_dense_or_factored(base())):
        torch.manual_seed(0)
        model = drawn(get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")))
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name


INSIDE: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 7},
    "alpha": {"alpha_pattern": {"q_proj.left": 64}, "rank_pattern": {"left": 3}},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize("kind", INSIDE)
def test_lora_on_the_factors_keeps_its_whole_configuration(base, kind, tmp_path):
    """`load` and `export` with what PEFT itself loads, not with what they understood."""
    folder = base("wide")
    config = LoraConfig(target_modules=["left", "right"], task_type="CAUSAL_LM", **INSIDE[kind])
    trained = drawn(get_peft_model(load_dense_or_factored(folder), config))
    wanted = logits(trained)
    saved(trained, tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(load_dense_or_factored(folder), str(tmp_path / "adapter"))
    assert close(logits(by_peft), wanted)
    ours, _ = lord_tune.load(str(tmp_path / "adapter"))
    assert torch.equal(logits(ours), logits(by_peft))
    result = lord_tune.export(str(tmp_path / "adapter"), str(tmp_path / "out"), "factored")
    assert result["comparison"]["max_logit_difference"] < CLOSE
    exported, _ = lord_tune.load(str(tmp_path / "out"))
    assert close(logits(exported), wanted)


def test_scalings_are_those_of_the_formulas(base):
    """L' = L + s B A with s = alpha / sqrt(r) or a layer's own alpha / r, in float64."""
    config = LoraConfig(target_modules=["left"], r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj.left": 9})
    model = drawn(get_peft_model(load_dense_or_factored(base()), config))
    tensors = {name: p.detach().double() for name, p in model.named_parameters()}
    start = {n: dense_factor(y.left) for n, y in factored_layers(load_dense_or_factored(base())).items()}
    folded = factored_layers(lord_tune.fold(model))
    for name, left in start.items():
        scaling = 6 / (9 if name.endswith("q_proj") else 4) ** 0.5
        a, b = (tensors[f"base_model.model.{name}.left.lora_{x}.default.weight"] for x in "AB")
        expected = left + scaling * b @ a
        assert torch.allclose(dense_factor(folded[name].left), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoHaConfig", {}),
        ("LoKrConfig", {}),
        ("VeraConfig", {"r": 4}),
        ("IA3Config", {"feedforward_modules": ["left"]}),
        ("OFTConfig", {"oft_block_size": 4}),
        ("BOFTConfig", {"boft_block_size": 4}),
        ("HRAConfig", {}),
        ("AdaLoraConfig", {"total_step": 10}),
    ],
)
def test_other_kinds_of_adapters_are_folded_as_they_compute(base, kind, options):
    config = getattr(peft, kind)(target_modules=["left"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_dense_or_factored(base()), config)
    wanted = logits(drawn(model, 0.02))
    assert not close(wanted, logits(load_dense_or_factored(base())))
    folded = lord_tune.fold(model)
    assert close(logits(folded), wanted)
    assert not [name for name, m in folded.named_modules() if type(m).__module__.startswith("peft")]


@pytest.mark.parametrize("options", [{"alora_invocation_tokens": [5, 6]}, {"lora_bias": True}])
def test_an_adapter_that_is_no_change_of_the_weight_is_not_folded(base, options):
    config = LoraConfig(target_modules=["right"], task_type="CAUSAL_LM", **options)
    model = drawn(get_peft_model(load_dense_or_factored(base()), config))
    keys = list(model.state_dict())
    for act in (lord_tune.fold, lord_tune.merge):
        with pytest.raises(UsageError, match="self_attn.q_proj.right"):
            act(model)
    assert list(model.state_dict()) == keys


def test_lora_on_a_backbone_and_around_a_dense_layer_is_folded(base):
    model = load_dense_or_factored(base("packed"))
    config = LoraConfig(target_modules=["left", "right", "backbone", "lm_head"], lora_bias=False, task_type="CAUSAL_LM")
    model = drawn(get_peft_model(model, config))
    wanted = logits(model)
    ranks = {name: layer.rank for name, layer in factored_layers(model.get_base_model()).items()}
    folded = lord_tune.fold(model)
    assert close(logits(folded), wanted)
    assert {name: layer.rank - 8 for name, layer in factored_layers(folded).items()} == ranks


def test_what_cannot_be_folded_is_refused_by_name_and_left_alone(base, tmp_path):
    model = load_dense_or_factored(base(), "bfloat16")
    adapted = drawn(get_peft_model(model, LoraConfig(target_modules=["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"])))
    before, keys = logits(adapted), list(adapted.state_dict())
    with pytest.raises(UsageError, match="layers.0.mlp.up_proj.*bfloat16.*float32"):
        lord_tune.fold(adapted)
    assert list(adapted.state_dict()) == keys and torch.equal(logits(adapted), before)
    prompted = get_peft_model(
        load_dense_or_factored(base()), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(UsageError, match="PROMPT_TUNING"):
        lord_tune.fold(prompted)
    tied = load_dense_or_factored(base("wide", "gpt2"))
    tied = drawn(get_peft_model(tied, LoraConfig(target_modules=["wte", "c_fc"], fan_in_fan_out=True)))
    with pytest.raises(UsageError, match="wte.*shares its weight with.*lm_head"):
        lord_tune.fold(tied)
    merged = get_peft_model(load_dense_or_factored(base("lord")), LoraConfig(target_modules=["left"]))
    merged.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        lord_tune.fold(merged)


def test_a_16_bit_base_is_exported_with_dense_layers_adapted(base, llama_dir, tmp_path):
    source = load_dense_or_factored(str(llama_dir)).to(torch.bfloat16)
    source.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    lord_tune.decompose(str(tmp_path / "half"), str(tmp_path / "lord"), method="svd", targets=r"\.1\.", rank=8)
    model = load_dense_or_factored(str(tmp_path / "lord"))
    assert model.dtype == torch.bfloat16
    saved(drawn(get_peft_model(model, LoraConfig(target_modules="all-linear"))), tmp_path / "adapter")
    result = lord_tune.export(str(tmp_path / "adapter"), str(tmp_path / "out"), "dense")
    assert result["comparison"]["kl"] < 1e-6


REFUSED: dict[str, tuple[Any, str, str]] = {
    "dora around a layer": (lambda: LoraConfig(target_modules=["q_proj"], use_dora=True), "wide", "use_dora.*q_proj"),
    "pissa around a layer": (lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "wide", "pissa"),
    "loha around a layer": (lambda: peft.LoHaConfig(target_modules=["q_proj"]), "wide", "left"),
    "dora on codes": (lambda: LoraConfig(target_modules=["left"], use_dora=True), "int8", "use_dora.*int8"),
    "olora on codes": (lambda: LoraConfig(target_modules=["left"], init_lora_weights="olora"), "int8", "olora.*int8"),
    "oft on codes": (lambda: peft.OFTConfig(target_modules=["left"]), "int8", "OFT.*int8"),
    "layer and part": (lambda: LoraConfig(target_modules=r".*q_proj.*"), "wide", "its part"),
    "parameters": (lambda: LoraConfig(target_parameters=["q_proj.weight"]), "wide", "target_parameters"),
    "replication": (
        lambda: LoraConfig(target_modules=["left"], layer_replication=[(0, 2), (1, 3)]),
        "wide",
        "layer_re",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused_before_anything_is_touched(base, case):
    config, store, words = REFUSED[case]
    model = load_dense_or_factored(base(store))
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(UsageError, match=words):
        get_peft_model(model, config())
    assert list(model.state_dict()) == keys and torch.equal(logits(model), before)


@pytest.mark.parametrize("store", ["wide", "lord"])
def test_an_adapter_of_factors_is_a_difference(base, store):
    """W = Q + L0 R0 + sum_a s_a (B_a A_a - L0 R0), in float64, for scales, sums and both."""
    start = load_dense_or_factored(base(store))
    model = drawn(expose_factors(load_dense_or_factored(base(store))))
    expose_factors(model, adapter_name="b")
    model.set_adapter("b")
    drawn(model, 0.08)
    layers = factored_layers(model.get_base_model())

    def expected(scales: dict[str, float]) -> torch.Tensor:
        reference = copy.deepcopy(start)
        reference.set_attn_implementation("eager")
        densify(reference, torch.float64)
        reference.double()
        for name, layer in layers.items():
            left, right = (
                dense_factor(f) for f in (factored_layers(start)[name].left, factored_layers(start)[name].right)
            )
            weight = reference.get_submodule(name).weight
            for adapter, scale in scales.items():
                b, a = (m[adapter].weight.detach().double() for m in (layer.host.lora_B, layer.host.lora_A))
                weight.data += scale * (b @ a - left @ right)
        return logits(reference).float()

    def scaled(**scales: float) -> torch.Tensor:
        for layer in layers.values():
            for adapter, scale in scales.items():
                layer.host.set_scale(adapter, scale)
        model.base_model.set_adapter(list(scales))
        return logits(model)

    for scales in (
        {"default": 1.0},
        {"default": 0.0},
        {"b": 0.5},
        {"default": 1.0, "b": 1.0},
        {"default": -1.0, "b": 2.5},
    ):
        assert close(scaled(**scales), expected(scales)), scales
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        assert close(logits(model), expected({"default": -0.5, "b": 1.25}))
    lord_tune.merge(model)
    assert close(logits(model), expected({"default": -1.0, "b": 2.5}))
    with peft.helpers.rescale_adapter_scale(model, 2.0):
        assert close(logits(model), expected({"default": -2.0, "b": 5.0}))
    wanted = expected({"default": -1.0, "b": 2.5})
    with pytest.raises(UsageError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")
    assert close(logits(lord_tune.fold(model)), wanted)


@pytest.mark.parametrize("mode", ["factors", "split", "lora", "whole"])
def test_each_row_of_a_batch_may_have_its_adapter(base, mode):
    store = "packed" if mode in ("split", "lora") else "lord"
    model = load_dense_or_factored(base(store))
    if mode == "whole":
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        drawn(model).add_adapter("b", copy.deepcopy(config))
    else:
        put = (
            (lambda m, **o: add_lora(m, rank=4, **o))
            if mode == "lora"
            else (lambda m, **o: expose_factors(m, mode=mode, **o))
        )
        model = put(model)
        put(drawn(model), adapter_name="b")
    model.set_adapter("b")
    drawn(model, 0.08)

    def alone(name: str) -> torch.Tensor:
        with torch.no_grad():
            if name == "__base__":
                return load_dense_or_factored(base(store))(input_ids=BATCH).logits
            model.set_adapter(name)
            return model(input_ids=BATCH).logits

    found = {name: alone(name) for name in ("default", "b", "__base__")}
    assert not close(found["default"], found["b"]) and not close(found["default"], found["__base__"])
    rows = ["b", "__base__", "default", "b"]
    wanted = torch.stack([found[name][row] for row, name in enumerate(rows)])
    for merged in (False, True):
        if merged and mode != "whole":
            model.set_adapter("default")
            lord_tune.merge(model)
        with torch.no_grad():
            assert close(model(input_ids=BATCH, adapter_names=rows).logits, wanted)
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=BATCH, adapter_names=rows[:2])


def test_rows_with_adapters_of_different_layers(base):
    """A layer without the adapter of a row computes the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = drawn(expose_factors(load_dense_or_factored(base()), "q_proj"))
        expose_factors(model, "mlp", adapter_name="b")
    model.set_adapter("b")
    drawn(model)
    found = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        with torch.no_grad():
            found[name] = model(input_ids=BATCH).logits
    with torch.no_grad():
        mixed = model(input_ids=BATCH, adapter_names=["default", "b", "b", "default"]).logits
    assert close(mixed, torch.stack([found[n][row] for row, n in enumerate(("default", "b", "b", "default"))]))


def test_scales_refuse_rows(base):
    model = add_scales(load_dense_or_factored(base()))
    with pytest.raises(UsageError, match="adapter_names"):
        model(input_ids=BATCH, adapter_names=["default"] * 4)


def test_a_new_adapter_of_peft_starts_as_no_difference(base):
    model = drawn(expose_factors(load_dense_or_factored(base())))
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights = True
    model.add_adapter("b", config)
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(load_dense_or_factored(base())))
    with pytest.raises((UsageError, CheckpointError), match="rank 4.*rank 8"):
        model.add_adapter("c", LoraConfig(r=4, target_modules=r".*\.host"))
    with pytest.raises(UsageError, match="beside which PEFT cannot wrap"):
        model.add_adapter("c", LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("mode", ["factors", "lora", "whole"])
def test_a_new_head_is_trained_saved_and_loaded(mode, tmp_path):
    folder = tmp_path / "dense"
    tiny_head("sequence").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    lord_tune.decompose(str(folder), str(tmp_path / "lord"), method="svd", backbone="int4", rank=8)
    model = load_dense_or_factored(str(tmp_path / "lord"))
    before = logits(model)
    if mode == "whole":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))
    else:
        model = expose_factors(model) if mode == "factors" else add_lora(model, rank=4)
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    model.train()
    model(input_ids=BATCH, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert float(model.base_model.model.score.modules_to_save["default"].weight.grad.abs().max()) > 0
    after = logits(drawn(model))
    saved(model, tmp_path / "adapter")
    loaded, _ = lord_tune.load(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), after) and not torch.equal(after, before)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    folded = lord_tune.fold(loaded)
    assert close(logits(folded), after)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(load_dense_or_factored(str(tmp_path / "folded"))), logits(folded))


def test_a_base_model_with_an_adapter_on_it_is_not_saved(base, tmp_path):
    for put in (expose_factors, add_lora, add_scales, lambda m: get_peft_model(m, LoraConfig())):
        model = put(load_dense_or_factored(base()))
        with pytest.raises(UsageError, match="adapter on it"):
            model.get_base_model().save_pretrained(tmp_path / "base")
        assert not (tmp_path / "base").exists()
        plain = model.unload()
        if put is not expose_factors:
            plain.save_pretrained(tmp_path / "plain")
            assert torch.equal(logits(load_dense_or_factored(str(tmp_path / "plain"))), logits(plain))


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"backbone": "int4"}, "factors"),
        ({}, "factors"),  # pivoted
        ({"backbone": "int4", "factor_format": "int4", "top_rank": 2}, "split"),
    ],
)
def test_peft_itself_loads_an_adapter_that_is_l_and_r(llama_dir, tmp_path, options, mode):
    """As programs do that know nothing of lord_tune, on a checkpoint that imports it (lm_eval with peft=)."""
    folder = str(tmp_path / "lord")
    lord_tune.decompose(str(llama_dir), folder, method="svd", rank=8, **options)
    saved(drawn(expose_factors(load_dense_or_factored(folder), mode=mode)), tmp_path / "adapter")
    wanted = logits(lord_tune.load(str(tmp_path / "adapter"))[0])
    plain = load_dense_or_factored(folder)
    before = logits(plain)
    model = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert torch.equal(logits(model), wanted) and not close(wanted, before)
    with model.disable_adapter():
        assert close(logits(model), before)


def test_peft_itself_loads_no_adapter_of_other_ranks_and_no_basis(llama_dir, tmp_path):
    for rank in (4, 8):
        lord_tune.decompose(str(llama_dir), str(tmp_path / str(rank)), method="svd", rank=rank, backbone="int4")
    models = {rank: str(tmp_path / str(rank)) for rank in (4, 8)}
    saved(expose_factors(load_dense_or_factored(models[4])), tmp_path / "other")
    saved(lord_tune.add_basis(load_dense_or_factored(models[8])), tmp_path / "basis")
    for name in ("other", "basis"):
        with pytest.raises(CheckpointError, match="does not fit its base model"):
            PeftModel.from_pretrained(load_dense_or_factored(models[8]), str(tmp_path / name))


def test_a_stock_adapter_of_an_ordinary_model_is_loaded_and_not_exported(llama_dir, tmp_path):
    model = drawn(get_peft_model(load_dense_or_factored(str(llama_dir)), LoraConfig(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    loaded, _ = lord_tune.load(str(tmp_path / "adapter"))  # with the tokenizer of its base
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(UsageError, match="has no factored layers.*merge_and_unload"):
        lord_tune.export(str(tmp_path / "adapter"), str(tmp_path / "out"), "dense")
    assert not (tmp_path / "out").exists()


def test_options_of_add_lora_are_peft_s_or_refused(base, tmp_path):
    model = add_lora(load_dense_or_factored(base()), rank=4, alpha=6, use_rslora=True, bias="lora_only")
    assert model.base_model.model.model.layers[1].mlp.up_proj.left.scaling["default"] == 3.0
    assert model.peft_config["default"].bias == "lora_only"
    for name in ("layers_to_transform", "target_modules", "lora_alpha"):
        with pytest.raises(UsageError, match=f"decides `{name}`"):
            add_lora(load_dense_or_factored(base()), **{name: [1]})
    with pytest.raises(UsageError, match="did you mean 'use_rslora'"):
        add_lora(load_dense_or_factored(base()), use_rslra=True)
    with pytest.raises(UsageError, match="use_dora.*int8"):
        add_lora(load_dense_or_factored(base("int8")), use_dora=True)
    exact = drawn(add_lora(load_dense_or_factored(base()), use_dora=True))
    wanted = logits(exact)
    assert close(logits(lord_tune.fold(exact)), wanted)


def test_trl_with_all_linear_is_exported(base, tmp_path):
    """`trl sft --use_peft --lora_target_modules all-linear`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, max_length=64,
        report_to="none", bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"text": code_document(n)} for n in range(8)])
    trainer = SFTTrainer(
        load_dense_or_factored(base("packed")), arguments, train_dataset=rows, processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    wanted = logits(trainer.model.eval())
    assert not close(wanted, logits(load_dense_or_factored(base("packed"))))
    for form in ("factored", "dense"):
        lord_tune.export(str(tmp_path / "run"), str(tmp_path / form), form)
        assert close(logits(load_dense_or_factored(str(tmp_path / form))), wanted)
    assert any(isinstance(m, FactoredLinear) for m in load_dense_or_factored(str(tmp_path / "factored")).modules())
