"""Low rank as ordinary linear layers with a modelling file: what stock transformers makes of it without lord_tune."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, save_tiny, tiny_bert, tiny_family, tiny_gpt2, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import lord_tune
from lord_tune.errors import UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import factored_layers

CALIBRATION = {"calibration_tokens": 512, "context_length": 64}
IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def decomposed(rows_file, tmp_path_factory):
    """(family, options) -> folder"""
    made = {}
    builders = {"llama": lambda: tiny_llama(intermediate=192), "gpt2": tiny_gpt2, "bert": tiny_bert}

    def decompose(family, **options):
        key = family + json.dumps(options, sort_keys=True)
        if key not in made:
            model = builders.get(family, lambda: tiny_family(family))()
            folder = tmp_path_factory.mktemp("out")
            text = {} if options.get("method") == "svd" else {"calibration": [str(rows_file)], **CALIBRATION}
            lord_tune.decompose(str(save_tiny(model, folder / "m")), str(folder / "d"), **text, **options)
            made[key] = folder / "d"
        return made[key]

    return decompose


CASES = {
    "pivoted and dense": ("llama", {"kept_fraction": 0.7}),
    "pairs": ("llama", {"rank": 8, "form": "plain", "method": "svd"}),
    "a bias that was not there": ("llama", {"rank": 8, "method": "afm", "targets": "q_proj"}),
    "packed factors": ("llama", {"rank": 8, "method": "svd", "factor_format": "int8"}),
    "components apart": ("llama", {"rank": 8, "method": "svd", "factor_format": "int4", "top_rank": 2}),
    "Conv1D": ("gpt2", {"rank": 8, "method": "svd", "targets": "attn|c_fc"}),
    "an encoder": ("bert", {"rank": 8, "method": "svd"}),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_computes_the_same(decomposed, tmp_path, case):
    family, options = CASES[case]
    source, folder = decomposed(family, **options), tmp_path / "e"
    result = lord_tune.export(str(source), str(folder), "vllm")
    assert result["comparison"]["kl"] < 1e-6 and result["comparison"]["max_logit_difference"] < 1e-4
    ours = load_dense_or_factored(str(source))
    stored, layers = load_file(folder / "model.safetensors"), factored_layers(ours)
    described = json.loads((folder / "config.json").read_text())["low_rank"]
    assert {layer["rank"] for layer in described.values()} == {layer.rank for layer in layers.values()}
    numbers = sum(value.numel() for value in stored.values() if value.is_floating_point())
    assert numbers == sum(value.numel() for value in plain_numbers(ours, layers))
    if case == "packed factors":
        assert result["notes"] == ["L and R are stored in int8, and were decoded into float32"]
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    with torch.no_grad():
        found = auto.from_pretrained(folder, trust_remote_code=True)(input_ids=IDS).logits
        body = AutoModel.from_pretrained(folder, trust_remote_code=True)(input_ids=IDS).last_hidden_state
        expected, hidden = ours(input_ids=IDS).logits, ours.base_model(input_ids=IDS).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(body, hidden, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mixtral", "qwen3-moe")])
def test_every_family_has_the_form(decomposed, tmp_path, family):
    source = decomposed(family, rank=8, method="svd")
    comparison = lord_tune.export(str(source), str(tmp_path / "e"), "vllm")["comparison"]
    assert comparison["relative_difference"] < 1e-5


def plain_numbers(model, layers):
    """The tensors of the model with L and R decoded."""
    for name, value in model.state_dict().items():
        if not any(name.startswith(owner + ".") for owner in layers) and name not in model.all_tied_weights_keys:
            yield value
    for layer in layers.values():
        left, right = layer.dense_factors()
        pivoted = layer.plan.form == "pivoted"
        yield from (left[layer.rank :] if pivoted else left, right, *([] if layer.bias is None else [layer.bias]))


def test_it_loads_where_lord_tune_cannot_be_imported(decomposed, tmp_path):
    folder = tmp_path / "e"
    lord_tune.export(str(decomposed("llama", kept_fraction=0.7)), str(folder), "vllm")
    code = """
import sys
sys.modules["lord_tune"] = None  # every import of it fails
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(sum(type(module).__name__ == "Pivoted" for module in model.modules()))
"""
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(run.stdout) == len(json.loads((folder / "config.json").read_text())["low_rank"]) > 0


def test_a_trained_adapter_is_in_it(decomposed, rows_file, tmp_path):
    source = decomposed("llama", kept_fraction=0.7)
    common = {
        "dataset_name": str(rows_file),
        "max_steps": 3,
        "max_length": 64,
        "learning_rate": 3e-3,
        "mode": "factors",
    }
    lord_tune.train(model_name_or_path=str(source), output_dir=str(tmp_path / "a"), **common)
    result = lord_tune.export(str(tmp_path / "a"), str(tmp_path / "e"), "vllm")
    assert result["comparison"]["kl"] < 1e-6
    forms = {layer["form"] for layer in json.loads((tmp_path / "e" / "config.json").read_text())["low_rank"].values()}
    assert forms == {"pivoted"}


def test_it_saves_trains_and_takes_an_adapter(decomposed, tmp_path):
    lord_tune.export(str(decomposed("llama", kept_fraction=0.7)), str(tmp_path / "e"), "vllm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert any(".chosen." in n for n, p in tuned.named_parameters() if p.grad is not None)


@pytest.mark.slow
def test_weights_are_written_in_16_bits(decomposed, tmp_path):
    result = lord_tune.export(str(decomposed("llama", kept_fraction=0.7)), str(tmp_path), "vllm", dtype="bfloat16")
    assert 0 < result["comparison"]["kl"] < 0.05 and result["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16, torch.int32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_what_has_no_such_form_is_refused(decomposed, tmp_path):
    beside = decomposed("llama", rank=4, method="svd", backbone="int4")
    with pytest.raises(UsageError, match=r"has backbone int4 beside L and R, and `format` vllm holds L R alone"):
        lord_tune.export(str(beside), str(tmp_path / "e"), "vllm")
    experts = decomposed("mixtral", rank=4, method="svd")
    with pytest.raises(UsageError, match="a stock model holds them in one tensor"):
        lord_tune.export(str(experts), str(tmp_path / "e"), "vllm")
    with pytest.raises(UsageError, match="writes no adapter"):
        lord_tune.export(str(beside), str(tmp_path / "e"), "vllm", pad_ranks=True)
    assert not (tmp_path / "e").exists()
