"""Embeddings and output heads in low precision: stored once, tied exactly, decoded by every loader, trainer and export
to the same numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny import FAMILIES, save_tiny, tiny_llama, write_code_rows
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import lord_tune
from lord_tune.config import EMBEDDINGS, DecomposeConfig
from lord_tune.declared import LOOKUPS
from lord_tune.errors import CheckpointError, UsageError
from lord_tune.layers import QuantizedEmbedding, QuantizedHead, dense_tables, put_table, stored_tables, token_tables
from lord_tune.layers.sizes import PARTS, bytes_by_part, sizes
from lord_tune.plans import Plan, TablePlan
from lord_tune.quantizers import QUANTIZERS, make_quantizer
from lord_tune.quantizers.lookup import check_lookup, round_rows, take_rows

IDS = torch.arange(40).view(2, 20) * 7 % 250
TEXT = {"calibration_tokens": 512, "context_length": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def rows(folder):
    return write_code_rows(folder / "code.jsonl")


@pytest.fixture(scope="module")
def tied_dir(folder):
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return save_tiny(model, folder / "tied")


@pytest.fixture(scope="module")
def tied(folder, tied_dir, rows):
    """Tied, with layers of every kind beside it."""
    made = dict(backbone="int8", rank=8, calibration=[str(rows)], embeddings="nf4", **TEXT)
    lord_tune.decompose(str(tied_dir), str(folder / "tied-nf4"), **made)
    return folder / "tied-nf4"


@pytest.fixture(scope="module")
def untied(folder, llama_dir):
    """Nothing but the embeddings."""
    lord_tune.decompose(str(llama_dir), str(folder / "untied-int4"), embeddings="int4")
    return folder / "untied-int4"


def stored_keys(checkpoint):
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


# --- formats ---


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_are_looked_up_to_the_bit_and_the_search_is_worth_it(name):
    form, shape = make_quantizer(name), (130, 128)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 130)[:, None]
    parts, wanted = round_rows(form, weight), form.empty(shape, "meta")
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {k: (v.shape, v.dtype) for k, v in wanted.items()}
    whole = form.dequantize(parts, shape, torch.float32)
    ids = torch.tensor([5, 129, 0, 5])
    assert torch.equal(take_rows(form, parts, shape, ids), whole[ids])
    plain = form.dequantize(form.quantize(weight), shape, torch.float32)
    assert (weight - whole).norm() < (weight - plain).norm()
    assert len(take_rows(form, parts, shape, ids[:0])) == 0


def test_the_formats_of_the_option_are_those_whose_rows_lie_apart():
    assert EMBEDDINGS == ("dense", *LOOKUPS) and set(LOOKUPS) < set(QUANTIZERS)
    for form, width in (("nf4", 96), ("int3", 60), ("int4", 63)):
        with pytest.raises(UsageError, match=f"Got `embeddings` {form} for rows of {width} numbers"):
            check_lookup(make_quantizer(form), (10, width))


# --- checkpoints ---


def test_a_tied_pair_is_stored_once_and_stays_tied(tied):
    keys = stored_keys(tied)
    assert {key for key in keys if "embed_tokens" in key or "lm_head" in key} == {
        *(f"model.embed_tokens.{key}" for key in ("weight", "unit", "table.weight", "table.absmax"))
    }
    model = AutoModelForCausalLM.from_pretrained(tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedHead)
    assert head.table is embedding.table and model.dtype == torch.float32
    for again in (model.to(torch.bfloat16), AutoModelForCausalLM.from_pretrained(tied, dtype=torch.bfloat16)):
        assert again.dtype == again(IDS).logits.dtype == torch.bfloat16  # not that of the scales
        assert again.get_input_embeddings().table.absmax.dtype == torch.float32
    embedding.table.codes.data.zero_()
    assert (head.weight + 0).unique().numel() == (embedding.weight + 0).unique().numel()


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_outputs_are_those_of_the_decoded_matrices(which, request, tied_dir, llama_dir):
    checkpoint = request.getfixturevalue(which)
    model = lord_tune.load(str(checkpoint))[0]
    reference = lord_tune.load(str(checkpoint))[0]
    assert dense_tables(reference) == (1 if which == "tied" else 2) * 300 * 64
    assert type(reference.get_input_embeddings()) is nn.Embedding
    assert type(reference.get_output_embeddings()) is nn.Linear
    same = reference.get_input_embeddings().weight is reference.get_output_embeddings().weight
    assert same == (which == "tied") and torch.equal(reference(IDS).logits, model(IDS).logits)
    original = lord_tune.load(str(tied_dir if which == "tied" else llama_dir))[0]
    error = (original.get_input_embeddings().weight - model.get_input_embeddings().weight).norm()
    assert 0 < error / original.get_input_embeddings().weight.norm() < 0.12  # 4 bits err by a tenth


def test_bytes_are_those_of_the_files(tied, untied):
    for checkpoint in (tied, untied):
        tensors = stored_keys(checkpoint)
        sentinels = sum(t.shape == (1,) and t.dtype == torch.uint8 for t in tensors.values())
        inside = sum(t.nbytes for t in tensors.values()) - sentinels
        totals = json.loads((checkpoint / "decomposition.json").read_text())["totals"]
        model = lord_tune.load(str(checkpoint))[0]
        parts = totals["bytes_by_part"]
        assert inside == totals["model_bytes"] == sizes(model)["model_bytes"] == sum(parts.values())
        assert parts == bytes_by_part(model) and set(parts) == set(PARTS)
        table = sum(t.nbytes for key, t in tensors.items() if ".table." in key or key.endswith(".unit"))
        assert parts["embeddings"] + parts["head"] == table
        assert (parts["head"] > 0) == (checkpoint == untied)


def test_a_program_that_does_not_import_lord_tune_loads_it(tied):
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tied)!r}, trust_remote_code=True)
ids = torch.arange(40).view(2, 20) * 7 % 250
print("sum", float(model(ids).logits.double().abs().sum()), type(model.lm_head).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    words = run.stdout.split("sum")[-1].split()
    wanted = float(lord_tune.load(str(tied))[0](IDS).logits.double().abs().sum())
    assert words[1] == "QuantizedHead" and float(words[0]) == pytest.approx(wanted, rel=1e-6)


def test_the_bare_model_loads_and_a_saved_one_loads_again(tied, untied, tmp_path):
    bare = AutoModel.from_pretrained(untied)
    assert isinstance(bare.get_input_embeddings(), QuantizedEmbedding) and set(stored_tables(bare)) == {"embed_tokens"}
    model = lord_tune.load(str(tied))[0]
    model.save_pretrained(tmp_path / "again")
    assert stored_keys(tmp_path / "again").keys() == stored_keys(tied).keys()
    again = lord_tune.load(str(tmp_path / "again"))[0] if (tmp_path / "again" / "tokenizer.json").exists() else None
    again = again or AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert stored_tables(again) == stored_tables(model)


def test_an_older_version_says_that_it_is_too_old(tied, tied_dir, folder, rows):
    assert json.loads((tied / "config.json").read_text())["quantization_config"]["format_version"] == 2
    lord_tune.decompose(str(tied_dir), str(folder / "plain"), rank=8, backbone="int4", method="svd")
    manifest = json.loads((folder / "plain" / "config.json").read_text())["quantization_config"]
    assert manifest["format_version"] == 1 and "embeddings" not in manifest


def test_a_manifest_of_another_model_is_refused(tied, tmp_path):
    import shutil

    shutil.copytree(tied, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["embeddings"]["model.embed_tokens"]["shape"] = [301, 64]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises((UsageError, CheckpointError), match=r"is \(301, 64\) in the manifest and \(300, 64\)"):
        lord_tune.load(str(tmp_path / "other"))


# --- rounding ---


def test_a_head_is_rounded_with_feedback_on_what_it_reads(tied_dir, rows, tmp_path):
    """Text makes the logits of a tied pair better, not its rows, where hidden states have a direction in common, as
    they have in trained models."""
    uneven = lord_tune.load(str(tied_dir))
    uneven[0].model.embed_tokens.weight.data += torch.linspace(-2, 2, 64)
    uneven[0].save_pretrained(tmp_path / "m")
    uneven[1].save_pretrained(tmp_path / "m")
    tied_dir = tmp_path / "m"
    text = {"calibration": [str(rows)], "calibration_tokens": 2048, "context_length": 64}
    near = lord_tune.decompose(str(tied_dir), str(tmp_path / "near"), embeddings="int3")
    fed = lord_tune.decompose(str(tied_dir), str(tmp_path / "fed"), embeddings="int3", **text)
    name = "model.embed_tokens"
    assert (near["embeddings"][name]["rounding"], fed["embeddings"][name]["rounding"]) == ("nearest", "feedback")
    assert fed["embeddings"][name]["error"] > near["embeddings"][name]["error"] > 0.1
    model, tokenizer = lord_tune.load(str(tied_dir))
    ids = torch.tensor(tokenizer("\n".join(rows.read_text().splitlines()[-3:]))["input_ids"][:200])[None]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0]
        wanted = model.lm_head(hidden)
        errors = {}
        for kind in ("near", "fed"):
            stored = lord_tune.load(str(tmp_path / kind))[0]
            errors[kind] = float((stored.lm_head(hidden) - wanted).norm() / wanted.norm())
            row = stored.model.embed_tokens.weight - model.model.embed_tokens.weight
            error = float(row.norm() / model.model.embed_tokens.weight.norm())
            report = near if kind == "near" else fed
            assert report["embeddings"][name]["error"] == pytest.approx(error, rel=1e-4)
    assert errors["fed"] < 0.7 * errors["near"]


def test_an_untied_embedding_is_rounded_to_the_nearest(llama_dir, rows, tmp_path):
    text = {"calibration": [str(rows)], **TEXT}
    found = lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), embeddings="int4", **text)["embeddings"]
    assert found["lm_head"]["rounding"] == "feedback" and found["model.embed_tokens"]["rounding"] == "nearest"


# --- plans and budgets ---


def test_a_plan_keeps_what_it_says_of_the_embeddings(tied, tied_dir, rows, tmp_path):
    plan = Plan.read(tied / "plan.json")
    table = plan.embeddings["model.embed_tokens"]
    assert (table.format, table.shape, table.shared) == ("nf4", (300, 64), ("lm_head",))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan and plan.dense().embeddings == {}
    options = {"calibration": [str(rows)], **TEXT}
    lord_tune.decompose(str(tied_dir), str(tmp_path / "out"), plan=str(tied / "plan.json"), **options)
    own, other = stored_keys(tied), stored_keys(tmp_path / "out")
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    with pytest.raises(UsageError, match="`embeddings` has no effect beside this `plan`"):
        lord_tune.decompose(
            str(tied_dir), str(tmp_path / "b"), plan=str(tied / "plan.json"), embeddings="int8", **options
        )
    replace(plan, embeddings={"lm_head": replace(table, shared=())}).save(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="The plan stores an embedding 'lm_head'"):
        lord_tune.decompose(str(tied_dir), str(tmp_path / "b"), plan=str(tmp_path / "plan.json"), **options)
    with pytest.raises(UsageError, match=r"embedding 'x' is not readable"):
        TablePlan.from_dict("x", {"format": "int4"})


def test_max_bytes_counts_the_embeddings_as_they_are_stored(tied_dir, rows, tmp_path, capfd):
    text = {"calibration": [str(rows)], "sensitivity_tokens": 128, **TEXT}
    wanted = {"max_bytes": "95kB", "allocation": "mixed", "mix": ["int2", "e8-2"]}
    with pytest.raises(UsageError, match=r"cannot be met.*are embeddings.*`embeddings` int8 or int4") as caught:
        lord_tune.plan(str(tied_dir), **wanted, **text)
    assert "76.8 kB of them" in str(caught.value)  # 300 x 64 float32
    with_tables = lord_tune.plan(str(tied_dir), **wanted, embeddings="int4", **text)
    assert with_tables["bytes_by_part"]["embeddings"] == 10_804
    report = lord_tune.decompose(str(tied_dir), str(tmp_path / "small"), **wanted, embeddings="int4", **text)
    assert 60_000 < report["totals"]["model_bytes"] <= 95_000
    out = capfd.readouterr().out
    assert "bytes by part" in out and "share" in out


def test_plan_foresees_the_bytes(tied, tied_dir):
    made = json.loads((tied / "decomposition.json").read_text())["totals"]
    options = {"backbone": "int8", "rank": 8, "embeddings": "nf4", "calibration_tokens": 512, "context_length": 64}
    foreseen = lord_tune.plan(str(tied_dir), **options)
    assert foreseen["model_bytes_after"] == made["model_bytes"]
    assert foreseen["bytes_by_part"] == made["bytes_by_part"]


def test_inspect_counts_the_parts_of_a_checkpoint_without_them(tied, tmp_path):
    import shutil

    wanted = lord_tune.inspect(str(tied))["totals"]["bytes_by_part"]
    shutil.copytree(tied, tmp_path / "old")
    (tmp_path / "old" / "decomposition.json").unlink()
    assert lord_tune.inspect(str(tmp_path / "old"))["totals"]["bytes_by_part"] == wanted


# --- training and export ---


MODES = {"factors": {}, "lora": {"lora_r": 2}, "scales": {}, "basis": {"basis_share": 0.5, "basis_every": 1}}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_of_every_mode_leaves_the_tables_alone(mode, tied, rows, tmp_path):
    steps = {"max_steps": 4 if mode == "basis" else 1, "per_device_train_batch_size": 2, "max_length": 32}
    options = {"dataset_name": str(rows), "output_dir": str(tmp_path / "t"), "report_to": "none", **steps}
    metrics = lord_tune.train(model_name_or_path=str(tied), mode=mode, **options, **MODES[mode])
    assert metrics["trainable_parameters"] > 0 and math.isfinite(metrics["train_loss"])
    lord_tune.export(str(tmp_path / "t"), str(tmp_path / "factored"), "factored")
    own, other = stored_keys(tied), stored_keys(tmp_path / "factored")
    table = [key for key in own if "embed_tokens" in key]
    assert all(torch.equal(own[key], other[key]) for key in table)
    assert "lm_head.table.weight" not in other


def test_distillation_sees_the_stored_head(tied, tied_dir, rows, tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 32, "report_to": "none"}
    options |= {"objective": "distill", "teacher_model_name_or_path": str(tied_dir)}
    where = {"dataset_name": str(rows), "output_dir": str(tmp_path / "t")}
    metrics = lord_tune.train(model_name_or_path=str(tied), mode="factors", **options, **where)
    assert 0 < metrics["train_loss"] < 1


def test_gradients_pass_the_head(tied):
    model = lord_tune.load(str(tied))[0]
    reference = lord_tune.load(str(tied))[0]
    dense_tables(reference)
    grads = []
    for each in (model, reference):
        hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        each.get_output_embeddings()(hidden).logsumexp(-1).sum().backward()
        grads.append(hidden.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in model.requires_grad_(True).get_input_embeddings().parameters())


def test_dequantize_once_computes_the_same(tied):
    from lord_tune.layers import dequantize_once

    model = lord_tune.load(str(tied))[0]
    before = model(IDS).logits
    assert dequantize_once(model) > 300 * 64 * 4
    assert torch.allclose(model(IDS).logits, before, atol=1e-4)


def test_a_dense_export_is_the_decoded_model(tied, tmp_path):
    result = lord_tune.export(str(tied), str(tmp_path / "dense"), "dense")
    assert result["comparison"]["kl"] < 1e-6
    model, dense = lord_tune.load(str(tied))[0], AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.get_input_embeddings()) is nn.Embedding
    assert torch.equal(dense.get_input_embeddings().weight, model.get_input_embeddings().weight + 0)
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert "lm_head.weight" not in stored_keys(tmp_path / "dense")


def test_an_export_without_factored_layers_works(untied, tmp_path):
    result = lord_tune.export(str(untied), str(tmp_path / "dense"), "dense")
    assert result["comparison"]["kl"] < 1e-6
    pytest.importorskip("gguf")
    (tmp_path / "like.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"'.*' is stored in int4, and `format` gguf takes all embeddings"):
        lord_tune.export(str(untied), str(tmp_path / "g"), "gguf", like=str(tmp_path / "like.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "layers"),
    [
        ("peft", {"backbone": "nf4", "rank": 8}),
        ("compressed-tensors", {"backbone": "w4a16", "group_size": 64, "rank": 8}),
        ("vllm", {"kept_fraction": 0.9, "allocation": "uniform"}),
    ],
)
@pytest.mark.parametrize("tie", [True, False])
def test_stock_loaders_get_the_decoded_embeddings(form, layers, tie, tmp_path):
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    model = tiny_llama(intermediate=192)
    if tie:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    save_tiny(model, tmp_path / "m")
    lord_tune.decompose(str(tmp_path / "m"), str(tmp_path / "d"), embeddings="int4", method="svd", **layers)
    result = lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), form)
    assert result["comparison"]["kl"] < 1e-4
    assert any("were decoded" in note for note in result["notes"])


# --- what is refused ---


def test_rows_cannot_be_added(tied):
    model = lord_tune.load(str(tied))[0]
    assert model.resize_token_embeddings(300) is model.get_input_embeddings()
    with pytest.raises(UsageError, match="cannot get other rows; resize the original"):
        model.resize_token_embeddings(310)
    with pytest.raises(UsageError, match="`embeddings` dense"):
        model.get_input_embeddings().weight[0] = 0
    with pytest.raises(UsageError, match="`embeddings` dense"):
        model.lm_head.weight = nn.Parameter(torch.zeros(300, 64))


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 8.0


def test_an_embedding_that_does_more_than_to_look_up_is_refused():
    model = tiny_llama()
    model.model.embed_tokens = Scaled(300, 64)
    with pytest.raises(UsageError, match=r"'model.embed_tokens' is a Scaled, which does more than to look rows up"):
        token_tables(model)
    model = tiny_llama()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(UsageError, match="does more than to look rows up"):
        token_tables(model)
    model = tiny_llama()
    model.model.layers[0].other = nn.Linear(64, 300, bias=False)
    model.model.layers[0].other.weight = model.model.embed_tokens.weight
    with pytest.raises(UsageError, match=r"shares its weight with 'model\.layers\.0\.other\.weight'"):
        token_tables(model)


def test_the_scaled_embedding_of_a_real_family_is_refused():
    build = getattr(transformers, "Gemma3ForCausalLM", None)
    if build is None:
        pytest.skip("this transformers has no such family")
    config = transformers.Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=300,
    )  # fmt: skip
    with torch.device("meta"):
        model = build(config)
    with pytest.raises(UsageError, match="does more than to look rows up"):
        token_tables(model)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"embeddings": "int5"}, "Got 'int5' for `embeddings`"),
        ({"embeddings": "int4", "targets": "q"}, "`targets` has no effect where `embeddings` alone"),
        ({"embeddings": "int4", "seed": 3}, "`seed` has no effect where `embeddings` alone"),
        ({"embeddings": "int4", "backbone": "int4"}, "`backbone` has no effect where `embeddings` alone"),
        ({"embeddings": "int4", "block_size": 32}, "`block_size` has no effect where `embeddings` alone"),
        ({"embeddings": "dense"}, "Expected one of `rank`"),
    ],
)
def test_options_without_effect_are_refused(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        DecomposeConfig.build({"model": "m", "out": "o", **values})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_stored_exactly_or_refused(name):
    """Whatever is tied with what: outputs are those of the decoded matrices, or nothing is stored."""
    cls, values = FAMILIES[name]
    build = getattr(transformers, cls)
    torch.manual_seed(0)
    model = build(build.config_class(**values)).eval()
    try:
        tables = token_tables(model)
    except UsageError as error:
        assert "`embeddings`" in str(error)
        return
    assert "embedding" in tables[0].reads
    form = make_quantizer("int4")
    for table in tables:
        weight = model.get_submodule(table.name).get_parameter("weight").detach()
        put_table(model, table.name, table.plan("int4", form.options()))
        model.get_submodule(table.name).table.set_parts(round_rows(form, weight))
        for reader in (table.name, *table.shared):
            module = model.get_submodule(reader)
            if isinstance(module, QuantizedEmbedding):
                module.unit = nn.Parameter(torch.ones(1, dtype=weight.dtype))
    inputs = {"input_ids": IDS % 64 + 3}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        torch.manual_seed(1)
        stored = model(**inputs)[0]
        dense_tables(model)
        torch.manual_seed(1)
        assert torch.allclose(model(**inputs)[0], stored, atol=1e-5)
