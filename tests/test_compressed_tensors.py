"""The export that inference engines read: against the library of its format, and in stock transformers + peft."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import lord_tune
from lord_tune.errors import UsageError
from lord_tune.exports.stock import padded_rank
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import factored_layers

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402

CALIBRATION = {"calibration_tokens": 512, "context_length": 64}
NAME = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tiny_llama(intermediate=192), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def decomposed(model, rows_file, tmp_path_factory):
    """options -> folder"""
    made = {}

    def decompose(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("out") / "d"
            given = {"backbone": "w4a16", "rank": 8, "group_size": 32} | options
            given = {name: value for name, value in given.items() if value is not None}
            lord_tune.decompose(str(model), str(out), calibration=[str(rows_file)], **CALIBRATION, **given)
            made[key] = out
        return made[key]

    return decompose


CASES = {
    "asymmetric": {"backbone": "w8a16", "group_size": 64, "symmetric": False},
    "symmetric": {},
    "rows and groups": {"backbone": "w2a16", "group_size": 96},
    "2 bits": {"backbone": "w2a16", "symmetric": False},
    "ranks by layer": {"rank": None, "average_rank": 8},
    "a row": {"group_size": 1000},
    "a row, asymmetric": {"group_size": 1000, "symmetric": False},
    "Q alone": {"rank": 0},
    "packed L R": {"factor_format": "int8"},
    "some layers": {"targets": "q_proj|down_proj"},
}


def theirs(folder, name):
    """A layer's weight, decoded by compressed-tensors."""
    config = json.loads((folder / "base" / "config.json").read_text())["quantization_config"]
    stored = load_file(folder / "base" / "model.safetensors")
    parts = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
    groups = [g for g in config["config_groups"].values() if g["targets"] == ["Linear"] or name in g["targets"]]
    assert len(groups) == 1 and name not in config["ignore"]
    return PackedQuantizationCompressor.decompress(parts, QuantizationScheme(**groups[0]))["weight"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES)
def test_the_base_holds_our_codes_and_the_pair_is_the_model(decomposed, tmp_path, case):
    source, folder = decomposed(**CASES[case]), tmp_path / "e"
    result = lord_tune.export(str(source), str(folder), "compressed-tensors")
    assert result["comparison"]["kl"] < 1e-6 and result["comparison"]["max_logit_difference"] < 1e-3
    layers = factored_layers(load_dense_or_factored(str(source)))
    for name, layer in layers.items():
        assert torch.equal(theirs(folder, name), layer.backbone.dequantize(torch.float32)), name
    assert (folder / "adapter").is_dir() == (case != "Q alone")
    if case != "Q alone":
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        found = {k: v.shape[0] for k, v in adapter.items() if "lora_A" in k}
        assert found == {f"base_model.model.{n}.lora_A.weight": x.rank for n, x in layers.items() if x.rank}
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] and config["init_lora_weights"] is True
        assert config["rank_pattern"] == config["alpha_pattern"]
    if case == "ranks by layer":
        assert len(set(found.values())) > 1
    assert "/tmp" not in (folder / "base" / "config.json").read_text()


def test_a_packed_base_runs_without_lord_tune(decomposed, tmp_path):
    """As transformers loads it by default: packed, decoded when it runs."""
    source, folder = decomposed(rank=0), tmp_path / "e"
    lord_tune.export(str(source), str(folder), "compressed-tensors")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder / "base")(input_ids=ids).logits
        expected = load_dense_or_factored(str(source))(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_layers_of_one_model_may_be_stored_in_different_bits(model, rows_file, tmp_path):
    text = {"calibration": [str(rows_file)], **CALIBRATION}
    plan = tmp_path / "plan.json"
    lord_tune.plan(str(model), backbone="w4a16", group_size=32, rank=8, save=str(plan))
    edited = json.loads(plan.read_text())
    edited["layers"][NAME]["backbone"] = "w8a16"
    edited["layers"][NAME.replace("v_proj", "q_proj")]["backbone_options"]["group_size"] = 16
    plan.write_text(json.dumps(edited))
    lord_tune.decompose(str(model), str(tmp_path / "d"), plan=str(plan), **text)
    lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "compressed-tensors")
    config = json.loads((tmp_path / "e" / "base" / "config.json").read_text())["quantization_config"]
    assert sorted(len(group["targets"]) for group in config["config_groups"].values()) == [1, 1, 19]
    for name, layer in factored_layers(load_dense_or_factored(str(tmp_path / "d"))).items():
        assert torch.equal(theirs(tmp_path / "e", name), layer.backbone.dequantize(torch.float32)), name


@pytest.mark.slow
def test_in_16_bits_codes_and_scales_are_the_same_numbers(decomposed, tmp_path):
    source, folder = decomposed(), tmp_path / "e"
    result = lord_tune.export(str(source), str(folder), "compressed-tensors", dtype="bfloat16")
    assert result["comparison"]["kl"] < 0.01
    stored = load_file(folder / "base" / "model.safetensors")
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {torch.bfloat16}
    layer = factored_layers(load_dense_or_factored(str(source)))[NAME]
    scale = layer.backbone.parts()["scales"]
    assert torch.equal(stored[f"{NAME}.weight_scale"].float(), scale.float())


@pytest.mark.slow
def test_ranks_are_padded_to_one_that_engines_take(decomposed, tmp_path):
    source, folder = decomposed(rank=None, average_rank=8), tmp_path / "e"
    result = lord_tune.export(str(source), str(folder), "compressed-tensors", pad_ranks=True)
    assert result["comparison"]["kl"] < 1e-6
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    ranks = {v.shape[0] for k, v in adapter.items() if "lora_A" in k}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert ranks == {config["r"]} and config["lora_alpha"] == config["r"] and not config["rank_pattern"]
    largest = max(x.rank for x in factored_layers(load_dense_or_factored(str(source))).values())
    assert config["r"] == padded_rank(largest) >= largest
    with pytest.raises(UsageError, match="at most 512"):
        padded_rank(513)


REFUSED = {
    "another grid": ({"backbone": "int4"}, "does not have"),
    "L and R alone": ({"backbone": None, "group_size": None}, "would be zeros"),
    "broken groups": ({"group_size": 48}, "no multiple of its groups of 48"),
    "rotated": ({"incoherence": True}, "rotated backbone"),
    "zero points of rows and groups": ({"group_size": 96, "symmetric": False}, "one kind of layer alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_such_form_is_refused_before_any_work(decomposed, tmp_path, case):
    options, reason = REFUSED[case]
    with pytest.raises(UsageError, match=reason):
        lord_tune.export(str(decomposed(**options)), str(tmp_path / "e"), "compressed-tensors")
    assert not (tmp_path / "e").exists()


def test_conv1d_layers_are_refused(rows_file, tmp_path):
    model = save_tiny(tiny_gpt2(), tmp_path / "model")
    given = {"backbone": "w4a16", "rank": 4, "group_size": 32, "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(model), str(tmp_path / "d"), **given)
    with pytest.raises(UsageError, match="nn.Linear alone"):
        lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "compressed-tensors")


@pytest.mark.slow
def test_an_encoder_decoder_is_compared_as_it_runs(rows_file, tmp_path):
    torch.manual_seed(0)
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    config = T5Config(**shape, decoder_start_token_id=0, pad_token_id=257, eos_token_id=256)
    model = save_tiny(T5ForConditionalGeneration(config), tmp_path / "model")
    given = {"backbone": "w4a16", "rank": 4, "group_size": 32, "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(model), str(tmp_path / "d"), **given)
    result = lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "compressed-tensors")
    assert result["comparison"]["kl"] < 1e-6


def test_without_the_package_a_sentence_says_what_to_install(decomposed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UsageError, match="pip install compressed-tensors"):
        lord_tune.export(str(decomposed()), str(tmp_path / "e"), "compressed-tensors")


def test_options_of_other_forms_are_refused(decomposed, tmp_path):
    with pytest.raises(UsageError, match="writes no adapter"):
        lord_tune.export(str(decomposed()), str(tmp_path / "e"), "dense", pad_ranks=True)
