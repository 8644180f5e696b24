"""Every joint on three families: decompose, reload, expose, train, fold, save, export, in both modes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import code_document, read_tensors, tiny_tokenizer, without_sentinels, write_code_rows

import lord_tune
from lord_tune.adapters.attach import add_lora, coverage, expose_factors, mode_of
from lord_tune.adapters.fold import fold
from lord_tune.adapters.loading import load_adapter
from lord_tune.errors import CheckpointError, ExportMismatch, LordWarning, UsageError
from lord_tune.exports.run import export_model
from lord_tune.exports.verify import compare, outputs_of, probe_ids
from lord_tune.integrations.files import fingerprint
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.transformers_quantizer import attach
from lord_tune.layers import FactoredLinear, QuantizedLinear, dequantize_once, factored_layers
from lord_tune.layers.sizes import sizes
from lord_tune.quantizers import DTYPES
from lord_tune.storage import read_json, sha256_files

FAMILIES = ["llama", "gpt2", "bert"]
STORES = {  # plain where L and R train: exposing pivoted factors rounds (tests/test_pivoted.py)
    "lord": {"form": "plain", "kept_fraction": 0.8, "allocation": "uniform"},
    "lord-fp16": {"form": "plain", "rank": 12, "factor_format": "fp16"},
    "lord-afm": {"form": "plain", "method": "afm", "rank": 16},
    "lord-nf4": {"rank": 16, "factor_format": "nf4"},
    "nf4": {"backbone": "nf4", "rank": 8},
    "nf4-loftq": {"backbone": "nf4", "rank": 8, "method": "loftq", "double_quant": True, "factor_format": "bf16"},
    "nf4-alone": {"backbone": "nf4", "rank": 0, "method": "svd"},
    "int3": {"backbone": "int3", "rank": 8, "group_size": 24},
    "e8-caldera": {"backbone": "e8-2", "rank": 8, "method": "caldera", "iterations": 2, "factor_format": "lloyd4"},
}
# what L and R are stored in does not depend on the family, so one or two of them each
_CALDERA = {"method": "caldera", "iterations": 1, "rank": 8, "factor_format": "lloyd4", "top_rank": 2}
PACKED = {
    "spqr-over-lord": {"kept_fraction": 0.8, "allocation": "uniform", "factor_format": "spqr"},
    "e8-over-lord": {"rank": 12, "factor_format": "e8-3", "method": "afm"},
    "lloyd-top": _CALDERA | {"backbone": "lloyd2"},
    "int8-top": {"backbone": "int4", "rank": 8, "factor_format": "int3", "top_rank": 3, "top_format": "int8"},
}
COMBINATIONS = [(family, store) for family in FAMILIES for store in STORES]
COMBINATIONS += [("gpt2", "spqr-over-lord"), ("bert", "e8-over-lord"), ("llama", "int8-top")]
COMBINATIONS += [("llama", "lloyd-top"), ("gpt2", "lloyd-top")]
STORES |= PACKED
CALIBRATION = {"calibration_tokens": 512, "context_length": 64}
IDS = torch.tensor([tiny_tokenizer()(code_document(40))["input_ids"][:48]])


@pytest.fixture(scope="session")
def factored(request, tmp_path_factory, rows_file):
    """(family, store) -> a factored checkpoint, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, store: str) -> Path:
        if (family, store) not in made:
            base = request.getfixturevalue(f"{family}_dir")
            out = tmp_path_factory.mktemp("factored") / f"{family}-{store}"
            options = dict(STORES[store])
            if options.get("method") not in ("svd", "loftq"):
                options |= CALIBRATION | {"calibration": [str(rows_file)]}
            lord_tune.decompose(str(base), str(out), **options)
            made[family, store] = out
        return made[family, store]

    return get


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train_a_little(model, steps: int = 3) -> None:
    """SGD, so that every trained parameter with a gradient moves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def is_packed(store: str) -> bool:
    return STORES[store].get("factor_format", "fp32") not in DTYPES


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("family", "store"), COMBINATIONS)
def test_reload_and_resave_are_bit_exact(factored, family, store, tmp_path):
    folder = factored(family, store)
    model = load_dense_or_factored(str(folder))
    assert factored_layers(model) and all(not p.requires_grad for p in model.parameters() if p.dtype == torch.uint8)
    model.save_pretrained(tmp_path / "again")
    first, second = (read_tensors(path) for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)
    again = load_dense_or_factored(str(tmp_path / "again"))
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("family", FAMILIES)
def test_decomposed_output_is_the_saved_output(factored, family, rows_file, request):
    """What the method optimised is what is stored: the reloaded layer's weight is Q + L R of the calibrated split."""
    model = load_dense_or_factored(str(factored(family, "nf4")))
    dense = load_dense_or_factored(str(request.getfixturevalue(f"{family}_dir")))
    report = json.loads((factored(family, "nf4") / "decomposition.json").read_text())
    for name, layer in factored_layers(model).items():
        module = dense.get_submodule(name)
        weight = module.weight.T if layer.plan.conv1d else module.weight
        error = float((weight - layer.dense_weight()).detach().norm() / weight.detach().norm())
        assert 0.01 < error < 0.14  # feedback moves weights further than to the nearest code
        entry = report["layers"][name]
        assert entry["error_calibrated"] < entry["error_backbone"] and entry["error_calibrated"] <= entry["error_plain"]
        if module.bias is not None:
            assert torch.equal(layer.bias, module.bias)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("mode", ["factors", "lora"])
@pytest.mark.parametrize(("family", "store"), [pair for pair in COMBINATIONS if pair[1] != "nf4-alone"])
def test_expose_train_save_reload_and_fold(factored, family, store, mode, tmp_path):
    """Exposing changes nothing; training moves it; the saved adapter and the folded model equal the trained one."""
    folder = str(factored(family, store))
    model = load_dense_or_factored(folder)
    before, ranks = logits(model), {name: layer.rank for name, layer in factored_layers(model).items()}
    if mode == "factors" and is_packed(store):
        with pytest.raises(UsageError, match="mode: split" if store == "lloyd-top" else "mode: lora"):
            expose_factors(model)
        return
    exposed = expose_factors(model) if mode == "factors" else add_lora(model, rank=4)
    # 16-bit factors are widened for training and NF4 factors decoded: same values, another order of rounding
    assert torch.allclose(logits(exposed), before, atol=1e-5)
    covered = coverage(exposed)
    expected = 0
    for name, layer in factored_layers(exposed.get_base_model()).items():
        m, n = layer.plan.shape
        inner = ranks[name] - layer.plan.top_rank  # components apart get no LoRA
        expected += ranks[name] * (m + n) if mode == "factors" else 4 * (m + n + 2 * inner)
    assert covered.mode == mode and covered.trainable_parameters == expected and not covered.untouched
    train_a_little(exposed)
    after = logits(exposed.eval())
    assert float((after - before).abs().max()) > 1e-4
    exposed.save_pretrained(tmp_path / "adapter")
    reloaded = load_adapter(load_dense_or_factored(folder), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), after)
    folded = fold(exposed)
    assert {n: layer.rank for n, layer in factored_layers(folded).items()} == ranks and mode_of(folded) is None
    if mode == "factors":
        assert torch.equal(logits(folded), after)
    else:  # (L + dL)(R + dR) is rounded once to float32: 6e-8 per product, of logits below 10
        assert torch.allclose(logits(folded), after, atol=2e-5)
    attach(folded)
    folded.save_pretrained(tmp_path / "folded")
    assert torch.equal(logits(load_dense_or_factored(str(tmp_path / "folded"))), logits(folded))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_split_trains_the_components_apart_alone(factored, family, tmp_path):
    """Q and the packed rest of L R stay; fp16 components widen exactly."""
    folder = str(factored(family, "lloyd-top"))
    model = load_dense_or_factored(folder)
    before, stored = logits(model), read_tensors(Path(folder))
    frozen = {k: v for k, v in stored.items() if ".top_" not in k}
    exposed = expose_factors(model, mode="split")
    assert torch.equal(logits(exposed), before)
    covered = coverage(exposed)
    layers = factored_layers(exposed.get_base_model())
    assert covered.mode == mode_of(exposed) == "split" and not covered.untouched
    assert set(covered.trained.values()) == {2} and covered.trained.keys() == layers.keys()
    assert covered.trainable_parameters == sum(2 * sum(layer.plan.shape) for layer in layers.values())
    exposed(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in exposed.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
    train_a_little(exposed)
    after = logits(exposed.eval())
    assert float((after - before).abs().max()) > 1e-4
    exposed.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    reloaded = load_adapter(load_dense_or_factored(folder), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), after) and mode_of(reloaded) == "split"
    folded = fold(exposed)
    assert torch.equal(logits(folded), after)
    attach(folded)
    folded.save_pretrained(tmp_path / "folded")
    again = load_dense_or_factored(str(tmp_path / "folded"))
    assert torch.equal(logits(again), logits(folded))
    assert {(layer.plan.top_rank, layer.plan.top_format) for layer in factored_layers(again).values()} == {(2, "fp32")}
    written = read_tensors(tmp_path / "folded")
    assert written.keys() == stored.keys() and all(torch.equal(written[key], frozen[key]) for key in frozen)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "stored", [{"rank": 0}, {"bits_per_weight": 2.5, "backbone": "e8-2"}], ids=["rank 0", "no bits left"]
)
@pytest.mark.parametrize("form", ["nf4", "int4", "spqr", "lloyd4", "e8-2"])
def test_layers_without_low_rank_have_no_packed_factors(llama_dir, form, stored, tmp_path):
    """No format packs a matrix without columns: rotations would search its odd part for ever, NF4 decodes NaN."""
    options = {"method": "svd", "targets": "q_proj", "backbone": "int4"} | stored
    lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), factor_format=form, **options)
    lord_tune.decompose(str(llama_dir), str(tmp_path / "plain"), **options)
    packed, plain = (load_dense_or_factored(str(tmp_path / name)) for name in ("out", "plain"))
    assert {layer.rank for layer in factored_layers(packed).values()} == {0}
    assert torch.equal(logits(packed), logits(plain)) and torch.isfinite(logits(plain)).all()


def test_split_is_refused_where_nothing_of_it_can_train(factored):
    with pytest.raises(UsageError, match="`top_rank`"):
        expose_factors(load_dense_or_factored(str(factored("llama", "nf4"))), mode="split")
    with pytest.raises(UsageError, match="stored as int8.*mode: lora"):
        expose_factors(load_dense_or_factored(str(factored("llama", "int8-top"))), mode="split")


def test_an_adapter_of_one_kind_does_not_load_on_another_base(factored, tmp_path):
    """The adapter of whole factors has rank 8, the components apart have 2."""
    exposed = expose_factors(load_dense_or_factored(str(factored("llama", "nf4"))))
    exposed.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_adapter(load_dense_or_factored(str(factored("llama", "lloyd-top"))), tmp_path / "adapter")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("family", "store"), [("llama", "lloyd-top"), ("gpt2", "spqr-over-lord"), ("llama", "nf4")])
def test_weights_decoded_once_compute_the_same_and_are_never_saved(factored, family, store, tmp_path):
    model = load_dense_or_factored(str(factored(family, store)))
    before = logits(model)
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert dequantize_once(model) == sum(4 * m.in_features * m.out_features for m in packed) > 0
    # one product in another order of sums, in rotated coordinates for lloyd: 1e-6 of logits below 10
    assert torch.allclose(logits(model), before, atol=2e-5)
    model.save_pretrained(tmp_path / "again")
    first, second = read_tensors(factored(family, store)), read_tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for module in packed:
        module.drop_dense()
    assert torch.equal(logits(model), before)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("family", "store"), [("llama", "lloyd-top"), ("llama", "int3"), ("llama", "nf4")])
def test_stock_lora_attaches_to_the_packed_backbone(factored, family, store, tmp_path):
    """Any format is a base for PEFT's own LoRA; merging into the codes stops instead of losing the update."""
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = str(factored(family, store))
    model = load_dense_or_factored(folder)
    before = logits(model)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=r".*\.backbone", task_type="CAUSAL_LM"))
    assert torch.equal(logits(peft), before)  # B starts as zero
    train_a_little(peft)
    after = logits(peft.eval())
    assert float((after - before).abs().max()) > 1e-4
    with peft.disable_adapter():
        assert torch.equal(logits(peft), before)
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_dense_or_factored(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), after)
    with pytest.raises(UsageError, match="lord_tune.fold"):
        peft.merge_and_unload()
    assert torch.allclose(logits(lord_tune.fold(peft)), after, atol=1e-4)


def test_exposed_factors_are_moved_not_copied(factored):
    model = load_dense_or_factored(str(factored("llama", "nf4")))
    name, layer = next(iter(factored_layers(model).items()))
    left, right, bytes_before = layer.left.weight, layer.right.weight, sizes(model)["model_bytes"]
    exposed = expose_factors(model)
    assert layer.host.lora_B["default"].weight is left and layer.host.lora_A["default"].weight is right
    assert layer.left is None and layer.right is None and layer.backbone is None
    assert sizes(exposed)["model_bytes"] == bytes_before


def test_every_trained_parameter_gets_a_gradient_and_nothing_else(factored):
    for store, mode in (("lord", "factors"), ("nf4", "factors"), ("lord-nf4", "lora")):
        model = load_dense_or_factored(str(factored("llama", store)))
        exposed = expose_factors(model) if mode == "factors" else add_lora(model, rank=4)
        exposed(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in exposed.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name


def test_a_stock_adapter_load_does_not_double_the_factors(factored, tmp_path):
    """Plain PEFT on the factored checkpoint puts L and R where they belong, and does not add them a second time."""
    from peft import PeftModel

    folder = str(factored("llama", "nf4"))
    expose_factors(load_dense_or_factored(folder)).save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load_dense_or_factored(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(stock), logits(lord_tune.load(str(tmp_path / "adapter"))[0].eval()))
    assert torch.allclose(logits(stock), logits(load_dense_or_factored(folder)), atol=1e-5)


def test_saved_adapter_is_an_ordinary_lora_adapter(factored, tmp_path):
    expose_factors(load_dense_or_factored(str(factored("llama", "lord")))).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all(".lora_A." in key or ".lora_B." in key for key in keys)


def test_partial_targets_warn_with_names_and_none_is_an_error(factored):
    model = load_dense_or_factored(str(factored("llama", "nf4")))
    with pytest.warns(LordWarning, match="do not train: .*q_proj"):
        exposed = expose_factors(model, targets="mlp")
    assert all(".mlp." in name for name in coverage(exposed).trained)
    with pytest.raises(UsageError, match="matches none"):
        expose_factors(load_dense_or_factored(str(factored("llama", "nf4"))), targets="nothing_like_it")


def test_partially_exposed_models_reload_and_fold(factored, tmp_path):
    folder = str(factored("llama", "nf4"))
    with pytest.warns(LordWarning):
        exposed = expose_factors(load_dense_or_factored(folder), targets="mlp")
    train_a_little(exposed)
    exposed.save_pretrained(tmp_path / "adapter")
    after = logits(exposed.eval())
    assert torch.equal(logits(load_adapter(load_dense_or_factored(folder), tmp_path / "adapter")), after)
    assert torch.equal(logits(fold(exposed)), after)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_lord_tune_loading_fails_loudly(factored, family):
    code = (
        f"import transformers; transformers.{'AutoModelForMaskedLM' if family == 'bert' else 'AutoModelForCausalLM'}"
        f".from_pretrained({str(factored(family, 'lord'))!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0 and "mismatched" in run.stderr


def test_auto_model_loads_after_import(factored):
    code = (
        "import lord_tune; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(factored('llama', 'nf4'))!r}, dtype='auto', device_map='cpu')\n"
        "print(sum(type(x).__name__ == 'FactoredLinear' for x in m.modules()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "21"


def test_sharded_checkpoints_load(factored, tmp_path):
    model = load_dense_or_factored(str(factored("llama", "nf4")))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_dense_or_factored(str(tmp_path))), logits(model))


def test_a_manifest_that_does_not_fit_is_refused(factored, tmp_path):
    import shutil

    folder = tmp_path / "bad"
    shutil.copytree(factored("llama", "lord"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.self_attn.q_proj"]["shape"] = [64, 32]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="q_proj"):
        load_dense_or_factored(str(folder))


EXPORTED = [(family, store) for family in FAMILIES for store in ("lord", "lord-nf4", "nf4", "nf4-loftq")]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("family", "store"), [*EXPORTED, ("llama", "lloyd-top")])
def test_dense_export_is_an_ordinary_checkpoint(factored, family, store, tmp_path):
    model, tokenizer = lord_tune.load(str(factored(family, store)))
    reference = logits(model)
    result = lord_tune.export(str(factored(family, store)), str(tmp_path / "dense"), "dense")
    assert result["comparison"]["kl"] < 1e-6
    code = (
        f"import sys, transformers, torch; from safetensors.torch import load_file, save_file\n"
        f"m = transformers.{type(model).__name__}.from_pretrained({str(tmp_path / 'dense')!r}).eval()\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        f"with torch.no_grad(): y = m(input_ids=ids).logits\n"
        f"assert 'lord_tune' not in sys.modules\n"
        f"save_file({{'y': y}}, {str(tmp_path / 'y.safetensors')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    # float32 sums in another order over 3 layers
    assert torch.allclose(load_file(tmp_path / "y.safetensors")["y"], reference, atol=1e-4)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("double_quant", [False, True])
def test_peft_export_loads_with_stock_libraries(llama_dir, rows_file, tmp_path, double_quant):
    """intermediate 160 is no multiple of 64, which bitsandbytes' CPU kernel decodes wrongly: attention only."""
    out = tmp_path / "factored"
    lord_tune.decompose(
        str(llama_dir), str(out), rank=8, backbone="nf4", targets="self_attn|gate_proj", double_quant=double_quant,
        calibration=[str(rows_file)], **CALIBRATION,
    )  # fmt: skip
    result = lord_tune.export(str(out), str(tmp_path / "peft"), "peft")
    assert result["comparison"]["kl"] < 1e-6 and result["comparison"]["max_logit_difference"] < 1e-3
    config = json.loads((tmp_path / "peft" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 8
    base = json.loads((tmp_path / "peft" / "base" / "config.json").read_text())
    assert base["quantization_config"]["quant_method"] == "bitsandbytes"
    stored = load_file(tmp_path / "peft" / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(stored[f"{name}.weight"], read_tensors(out)[f"{name}.backbone.weight"])


def test_peft_export_writes_all_components(llama_dir, rows_file, tmp_path):
    """Those apart and the packed rest as one pair of matrices, decoded."""
    lord_tune.decompose(
        str(llama_dir), str(tmp_path / "d"), rank=6, backbone="nf4", targets="q_proj|k_proj", factor_format="int8",
        top_rank=2, top_format="fp16", calibration=[str(rows_file)], **CALIBRATION,
    )  # fmt: skip
    result = lord_tune.export(str(tmp_path / "d"), str(tmp_path / "peft"), "peft")
    assert result["comparison"]["kl"] < 1e-6 and result["comparison"]["max_logit_difference"] < 1e-3
    adapter = load_file(tmp_path / "peft" / "adapter" / "adapter_model.safetensors")
    layer = factored_layers(load_dense_or_factored(str(tmp_path / "d")))["model.layers.0.self_attn.q_proj"]
    a, b = (adapter[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    assert a.shape == (6, 64) and torch.allclose(b.double() @ a.double(), torch.mm(*layer.dense_factors()), atol=1e-6)


def test_factored_export_of_a_split_adapter_keeps_the_packed_rest(factored, rows_file, tmp_path):
    base, out = factored("llama", "lloyd-top"), str(tmp_path / "run")
    lord_tune.train(model_name_or_path=str(base), dataset_name=str(rows_file), output_dir=out, mode="split", **TRAINING)
    lord_tune.export(out, str(tmp_path / "factored"), "factored")
    first, second = read_tensors(base), read_tensors(tmp_path / "factored")
    assert first.keys() == second.keys()
    changed = {
        key for key in first if first[key].dtype != second[key].dtype or not torch.equal(first[key], second[key])
    }
    assert changed == {key for key in first if ".top_" in key}
    trained, exported = lord_tune.load(out)[0], lord_tune.load(str(tmp_path / "factored"))[0]
    assert torch.allclose(logits(trained), logits(exported), atol=2e-5)
    assert lord_tune.export(out, str(tmp_path / "dense"), "dense")["comparison"]["kl"] < 1e-6


def test_peft_export_refuses_what_bitsandbytes_decodes_wrongly(factored, tmp_path):
    with pytest.raises(UsageError, match="not a multiple of 64"):
        lord_tune.export(str(factored("llama", "nf4")), str(tmp_path / "x"), "peft")
    with pytest.raises(UsageError, match="NF4 backbone"):
        lord_tune.export(str(factored("llama", "lord")), str(tmp_path / "x"), "peft")


def test_dense_export_of_afm_keeps_or_refuses_its_biases(factored, tmp_path):
    """GPT-2 has a place for the biases; Llama's dense class would drop them silently."""
    assert lord_tune.export(str(factored("gpt2", "lord-afm")), str(tmp_path / "g"), "dense")["comparison"]["kl"] < 1e-6
    with pytest.raises(UsageError, match="bias"):
        lord_tune.export(str(factored("llama", "lord-afm")), str(tmp_path / "l"), "dense")
    assert not (tmp_path / "l").exists()


def test_export_fails_over_the_threshold_and_leaves_nothing(factored, tmp_path):
    with pytest.raises(ExportMismatch, match="KL"):
        lord_tune.export(str(factored("llama", "nf4")), str(tmp_path / "x"), "dense", dtype="bfloat16", threshold=0.0)
    assert list(tmp_path.iterdir()) == []


def test_export_notices_a_wrong_write(factored, tmp_path, monkeypatch):
    """If what was written were not the model, the comparison would say so."""
    monkeypatch.setattr(FactoredLinear, "dense_weight", lambda self, dtype=None: torch.zeros(*self.plan.shape))
    model, tokenizer = lord_tune.load(str(factored("llama", "lord")))
    with pytest.raises(ExportMismatch):
        export_model(model, tokenizer, tmp_path, "dense")


def test_compare_measures_kl():
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    exact = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert compare(p, q).kl == pytest.approx(float(exact), rel=1e-5) and compare(p, p).kl == 0


TRAINING = {
    "max_steps": 4,
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "disable_tqdm": True,
    "learning_rate": 0.003,
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("family", "store", "mode"), [
    ("llama", "lord", "factors"), ("llama", "nf4", "factors"), ("llama", "lord-nf4", "lora"),
    ("gpt2", "nf4", "factors"), ("gpt2", "lord", "lora"), ("bert", "nf4", "factors"), ("bert", "lord", "lora"),
])  # fmt: skip
def test_train_evaluate_and_export(factored, family, store, mode, rows_file, tmp_path):
    out = str(tmp_path / "run")
    metrics = lord_tune.train(
        model_name_or_path=str(factored(family, store)), dataset_name=str(rows_file), output_dir=out, mode=mode,
        **TRAINING,
    )  # fmt: skip
    assert metrics["steps"] == 4
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    before, after = (lord_tune.evaluate(m, text=[str(rows_file)], context_length=64, max_tokens=2000)
                     for m in (str(factored(family, store)), out))  # fmt: skip
    assert after["loss"] < before["loss"]
    result = lord_tune.export(out, str(tmp_path / "dense"), "dense")
    assert result["comparison"]["kl"] < 1e-6
    lord_tune.export(out, str(tmp_path / "factored"), "factored")
    trained, _ = lord_tune.load(out)
    exported, _ = lord_tune.load(str(tmp_path / "factored"))
    assert torch.allclose(logits(trained), logits(exported), atol=2e-5)


def test_resume_continues_the_same_run(factored, rows_file, tmp_path):
    """Two more steps after a stop at step 2 give the adapter of the uninterrupted run."""
    options = TRAINING | {"lr_scheduler_type": "constant", "warmup_steps": 0}
    base = {"model_name_or_path": str(factored("llama", "nf4")), "dataset_name": str(rows_file)}
    whole = lord_tune.train(**base, output_dir=str(tmp_path / "whole"), **options)
    first = lord_tune.train(**base, output_dir=str(tmp_path / "parts"), **(options | {"max_steps": 2}))
    second = lord_tune.train(**base, output_dir=str(tmp_path / "parts"), **options)
    assert first["resumed_from"] is None and second["resumed_from"].endswith("checkpoint-2")
    losses = [[e["loss"] for e in run["history"] if "loss" in e] for run in (whole, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    adapters = [load_file(tmp_path / part / "adapter_model.safetensors") for part in ("whole", "parts")]
    assert all(torch.allclose(adapters[0][k], adapters[1][k], atol=1e-6) for k in adapters[0])
    with pytest.raises(UsageError, match="learning_rate"):
        lord_tune.train(**base, output_dir=str(tmp_path / "parts"), **(options | {"learning_rate": 0.1}))


def rows(path: Path, entries: list[dict]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_completions_only_are_trained_and_shown(factored, tmp_path, capsys):
    data = rows(tmp_path / "d.jsonl", [{"prompt": "ask me ", "completion": "answer"}] * 8)
    lord_tune.train(
        model_name_or_path=str(factored("llama", "nf4")), dataset_name=data, output_dir=str(tmp_path / "r"), **TRAINING
    )
    printed = capsys.readouterr().out
    assert "ask me ⟦answer<eos>⟧" in printed and "prompt + completion" in printed


def test_alpaca_rows_are_rendered(factored, tmp_path, capsys):
    data = rows(tmp_path / "d.jsonl", [{"instruction": "Add", "input": "", "output": "3"}] * 8)
    lord_tune.train(
        model_name_or_path=str(factored("llama", "nf4")), dataset_name=data, output_dir=str(tmp_path / "r"), **TRAINING
    )
    assert "### Instruction:\nAdd\n\n### Response:\n⟦3<eos>⟧" in capsys.readouterr().out


def test_chat_rows_need_and_use_the_template(factored, tmp_path, capsys):
    model = transformers.AutoTokenizer.from_pretrained(str(factored("llama", "nf4")))
    assert model.chat_template is None
    import shutil

    folder = tmp_path / "chat"
    shutil.copytree(factored("llama", "nf4"), folder)
    model.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    model.save_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data = rows(tmp_path / "d.jsonl", [{"messages": messages}] * 8)
    lord_tune.train(model_name_or_path=str(folder), dataset_name=data, output_dir=str(tmp_path / "r"), **TRAINING)
    assert "⟦user: hi<eos>assistant: yo<eos>⟧" in capsys.readouterr().out


def test_truncated_completions_without_an_end_are_refused(factored, tmp_path):
    data = rows(tmp_path / "d.jsonl", [{"prompt": "ask me ", "completion": "answer " * 40}] * 8)
    with pytest.raises(Exception, match="end-of-text"):
        lord_tune.train(
            model_name_or_path=str(factored("llama", "nf4")), dataset_name=data, output_dir=str(tmp_path / "r"),
            **TRAINING,
        )  # fmt: skip


def test_evaluate_counts_what_is_stored(factored, tmp_path, rows_file):
    for store in ("lord", "nf4", "lord-fp16"):
        folder = factored("llama", store)
        result = lord_tune.evaluate(
            str(folder), text=[str(rows_file)], context_length=64, max_tokens=500, json=str(tmp_path / "r.json")
        )
        stored = read_tensors(folder)
        assert result["model_bytes"] == sum(t.numel() * t.element_size() for t in without_sentinels(stored).values())
        keys = ["perplexity", "loss", "tokens", "context_length", "parameters", "model_bytes", "linear_bits_per_weight",
                "tokens_per_second", "peak_rss_bytes", "peak_memory_bytes", "texts"]  # fmt: skip
        new = {"model", "perplexity_standard_error", "loss_standard_error", "windows"}
        assert set(result) == {*keys, *new} and json.loads((tmp_path / "r.json").read_text()) == result
        report = json.loads((folder / "decomposition.json").read_text())
        weights = sum(e["shape"][0] * e["shape"][1] for e in report["layers"].values())
        bits = sum(e["bits_per_weight"] * e["shape"][0] * e["shape"][1] for e in report["layers"].values())
        assert result["linear_bits_per_weight"] == pytest.approx(bits / weights, rel=1e-9)


def test_perplexity_is_the_definition(llama_dir, tmp_path):
    """Non-overlapping windows, tokens 2..n predicted, float32 logits."""
    (tmp_path / "t.txt").write_text(code_document(3))
    result = lord_tune.evaluate(str(llama_dir), text=[str(tmp_path / "t.txt")], context_length=64)
    model, tokenizer = lord_tune.load(str(llama_dir))
    ids = torch.tensor(tokenizer(code_document(3))["input_ids"] + [tokenizer.eos_token_id])
    total = count = 0
    for start in range(0, len(ids) // 64 * 64, 64):
        window = ids[start : start + 64]
        with torch.no_grad():
            scores = model(window[None]).logits[0].log_softmax(-1)
        total -= float(scores[:-1].gather(1, window[1:, None]).sum())
        count += 63
    assert result["tokens"] == count and result["loss"] == pytest.approx(total / count, rel=1e-5)


def test_write_rows_helper_gives_enough_text(tmp_path):
    from lord_tune.data.texts import documents

    assert sum(map(len, documents([str(write_code_rows(tmp_path / "x.jsonl"))]))) > 4000


def test_probe_and_outputs(llama_dir):
    model, tokenizer = lord_tune.load(str(llama_dir))
    assert outputs_of(model, probe_ids(tokenizer, "abc def")).shape == (7, 300)
    with pytest.raises(UsageError, match="at least 2"):
        probe_ids(tokenizer, "a")


def test_a_model_without_a_head_is_decomposed_and_has_no_perplexity(tmp_path, rows_file):
    """Its sensitivity is that of the last hidden states, which are what an encoder is used for."""
    from tiny import bert_config, save_tiny

    torch.manual_seed(0)
    base = save_tiny(transformers.BertModel(bert_config()).eval(), tmp_path / "bert")
    options = {"kept_fraction": 0.8, "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(base), str(tmp_path / "out"), **options)
    dense, factored_model = (load_dense_or_factored(str(p)) for p in (base, tmp_path / "out"))
    with torch.no_grad():
        states = [m(input_ids=IDS).last_hidden_state[0] for m in (dense, factored_model)]
    assert float(torch.nn.functional.cosine_similarity(*states, dim=-1).mean()) > 0.8
    with pytest.raises(UsageError, match="no language-model head"):
        lord_tune.evaluate(str(tmp_path / "out"), text=[str(rows_file)])
    with pytest.raises(UsageError, match="no language-model head"):
        lord_tune.train(
            model_name_or_path=str(tmp_path / "out"), dataset_name=str(rows_file), output_dir=str(tmp_path / "r")
        )
    assert (
        lord_tune.export(str(tmp_path / "out"), str(tmp_path / "dense"), "dense")["comparison"]["relative_difference"]
        < 1e-5
    )


def test_a_checkpoint_that_lacks_its_head_alone_says_how_to_use_it_without(tmp_path, rows_file):
    """As all-mpnet-base-v2 is published: a head is named and not there."""
    from tiny import bert_config, save_tiny

    folder = save_tiny(transformers.BertModel(bert_config(), add_pooling_layer=False).eval(), tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    named = folder / "config.json"
    named.write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(CheckpointError, match='all of its head, .* write "BertModel" under `architectures`'):
        lord_tune.decompose(str(folder), str(tmp_path / "out"), method="svd", rank=4)
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layer.0." not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="download or write it again"):
        lord_tune.decompose(str(folder), str(tmp_path / "out"), method="svd", rank=4)
    assert not (tmp_path / "out").exists()


def test_bfloat16_checkpoints_keep_their_dtype_and_train_in_float32(tmp_path, rows_file):
    from tiny import save_tiny, tiny_llama

    base = save_tiny(tiny_llama().to(torch.bfloat16), tmp_path / "bf16")
    options = {"rank": 8, "backbone": "nf4", "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(base), str(tmp_path / "out"), **options)
    stored = read_tensors(tmp_path / "out")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.left.weight"].dtype == torch.bfloat16
    lord_tune.train(
        model_name_or_path=str(tmp_path / "out"),
        dataset_name=str(rows_file),
        output_dir=str(tmp_path / "r"),
        **TRAINING,
    )
    adapter = load_file(tmp_path / "r" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert lord_tune.export(str(tmp_path / "r"), str(tmp_path / "f"), "factored")["comparison"]["kl"] < 1e-4


def test_a_finished_run_is_not_trained_further(factored, rows_file, tmp_path):
    """The trainer would take one more step from a last checkpoint at an epoch's inside and write another adapter."""
    base = {"model_name_or_path": str(factored("llama", "nf4")), "dataset_name": str(rows_file)}
    options = base | {"output_dir": str(tmp_path / "run")} | TRAINING
    lord_tune.train(**options)
    with pytest.raises(UsageError, match="finished run"):
        lord_tune.train(**options)


def test_adapters_that_are_truncated_incomplete_or_of_another_base_are_refused(factored, rows_file, tmp_path):
    base = {"model_name_or_path": str(factored("llama", "nf4")), "dataset_name": str(rows_file)}
    lord_tune.train(**base, output_dir=str(tmp_path / "run"), **TRAINING)
    path = tmp_path / "run" / "adapter_model.safetensors"
    whole = path.read_bytes()
    state = {key: value.clone() for key, value in load_file(path).items()}  # not mapped to the file that is cut
    path.write_bytes(whole[:5000])
    with pytest.raises(CheckpointError, match="could not be read"):
        lord_tune.load(str(tmp_path / "run"))
    dropped = next(key for key in state if "lora_B" in key)
    save_file({key: value for key, value in state.items() if key != dropped}, path)
    with pytest.raises(CheckpointError, match="not complete|lacks"):
        lord_tune.load(str(tmp_path / "run"))
    save_file({key: value[:2].contiguous() for key, value in state.items()}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        lord_tune.load(str(tmp_path / "run"))


def test_rank_zero_has_nothing_to_train_in_either_mode(llama_dir, tmp_path):
    from lord_tune.adapters.attach import add_lora, expose_factors

    lord_tune.decompose(str(llama_dir), str(tmp_path / "q"), method="svd", rank=0, backbone="nf4")
    for expose in (add_lora, expose_factors):
        with pytest.raises(UsageError, match="rank 0"):
            expose(lord_tune.load(str(tmp_path / "q"))[0])


def test_bfloat16_models_export_although_they_compute_in_bfloat16(tmp_path, rows_file):
    """Large logits make the rounding of the bfloat16 reference alone a KL of 5e-4."""
    from tiny import save_tiny, tiny_llama

    model = tiny_llama(intermediate=192)
    model.lm_head.weight.data *= 3
    base = save_tiny(model.to(torch.bfloat16), tmp_path / "base")
    options = {"rank": 8, "backbone": "nf4", "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(base), str(tmp_path / "d"), **options)
    kl = [lord_tune.export(str(tmp_path / "d"), str(tmp_path / f), f)["comparison"]["kl"] for f in ("dense", "peft")]
    assert all(1e-4 < value < 5e-2 for value in kl)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_without_checksums_is_known_by_its_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    known = fingerprint(str(tmp_path))
    (tmp_path / "decomposition.json").write_text('{"totals": {"seconds": 1.5}}')
    assert fingerprint(str(tmp_path)) == known == hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "decomposition.json").write_text('{"shards": {"model.safetensors": "another"}}')
    assert fingerprint(str(tmp_path)) != known


def test_an_adapter_of_another_checkpoint_is_refused(llama_dir, rows_file, tmp_path):
    """Same ranks and shapes, another Q: L and R would be silently wrong."""
    base = {"backbone": "nf4", "rank": 8}
    text = {"calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(llama_dir), str(tmp_path / "base"), **base, **text)
    lord_tune.train(
        model_name_or_path=str(tmp_path / "base"), output_dir=str(tmp_path / "r"), dataset_name=str(rows_file),
        **TRAINING,
    )  # fmt: skip
    made = read_json(tmp_path / "base" / "decomposition.json")
    written = sorted((tmp_path / "base").glob("*.safetensors"))
    assert made["shards"] == {path.name: sha256_files([path]) for path in written}
    shutil.rmtree(tmp_path / "base")  # `overwrite` refuses: an adapter belongs to it
    lord_tune.decompose(str(llama_dir), str(tmp_path / "base"), **base, **text)
    assert read_json(tmp_path / "base" / "decomposition.json")["totals"]["seconds"] != made["totals"]["seconds"]
    lord_tune.load(str(tmp_path / "r"))  # the same command made the same weights
    shutil.rmtree(tmp_path / "base")
    lord_tune.decompose(str(llama_dir), str(tmp_path / "base"), method="loftq", **base)
    with pytest.raises(CheckpointError, match="not the checkpoint"):
        lord_tune.load(str(tmp_path / "r"))
    with pytest.raises(UsageError, match="another base"):  # nor does a longer run continue on it
        lord_tune.train(
            model_name_or_path=str(tmp_path / "base"), output_dir=str(tmp_path / "r"), dataset_name=str(rows_file),
            **(TRAINING | {"max_steps": 6}),
        )  # fmt: skip
