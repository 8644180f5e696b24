"""The export for llama.cpp: against the gguf package, and in llama.cpp where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import reordered, write_like
from tiny import save_tiny, tiny_gpt2, tiny_llama, write_code_rows

import lord_tune
from lord_tune.errors import ExportMismatch, UsageError
from lord_tune.exports import gguf as export_file
from lord_tune.exports import gguf_places
from lord_tune.exports.llama_cpp import compared_in_engine
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import factored_layers
from lord_tune.quantizers.engines import Block

CALIBRATION = {"calibration_tokens": 512, "context_length": 64}
Q, DOWN = "blk.1.attn_q.weight", "blk.1.ffn_down.weight"


@pytest.fixture(autouse=True)
def no_engine(request, monkeypatch):
    """The tiny files have no tokenizer, without which llama.cpp runs nothing."""
    if "llama_cpp" not in request.node.name:
        monkeypatch.setattr(export_file, "compared_in_engine", lambda *files: "not run")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(model folder, its GGUF file)"""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_llama(intermediate=192)
    return save_tiny(model, folder / "llama"), write_like(model, folder / "llama.gguf", "llama")


@pytest.fixture(scope="module")
def decomposed(source, rows_file, tmp_path_factory):
    made = {}

    def decompose(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            out = tmp_path_factory.mktemp("out") / "d"
            given = {"calibration": [str(rows_file)], **CALIBRATION} | options
            lord_tune.decompose(str(source[0]), str(out), **given)
            made[key] = out
        return made[key]

    return decompose


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def decoded(tensor: gguf.ReaderTensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()


CASES = {
    "q4_0": {"backbone": "q4_0", "rank": 8},
    "q4_1": {"backbone": "q4_1", "rank": 8},
    "q5_0, ranks by layer": {"backbone": "q5_0", "average_rank": 8},
    "q5_1": {"backbone": "q5_1", "rank": 8},
    "q8_0, Q alone": {"backbone": "q8_0", "rank": 0},
    "packed L R": {"backbone": "q4_0", "rank": 8, "factor_format": "int8"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_holds_our_codes_and_everything_else_is_the_files(source, decomposed, tmp_path, case):
    folder, given = tmp_path / "e", decomposed(**CASES[case])
    result = lord_tune.export(str(given), str(folder), "gguf", like=str(source[1]))
    assert result["comparison"]["kl"] < 1e-6
    layers = factored_layers(load_dense_or_factored(str(given)))
    like, written = tensors(source[1]), tensors(folder / "model.gguf")
    assert list(like) == list(written)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    adapter = tensors(folder / "adapter.gguf") if (folder / "adapter.gguf").is_file() else {}
    seen = set()
    for name, layer in layers.items():
        key = names.get_name(f"{name}.weight", (".weight",))
        kind, quantizer = name.rpartition(".")[2], layer.backbone.quantizer
        assert isinstance(quantizer, Block) and written[key].tensor_type.name == quantizer.name.upper()
        heads = {"q_proj": 4, "k_proj": 2}.get(kind)
        own = layer.backbone.dequantize(torch.float32)
        assert torch.equal(decoded(written[key]), own if heads is None else reordered(own, heads)), name
        if layer.rank:
            left, right = (factor.float() for factor in layer.dense_factors())
            left = left if heads is None else reordered(left, heads)
            assert torch.equal(decoded(adapter[f"{key}.lora_a"]), right.half().float())
            assert torch.equal(decoded(adapter[f"{key}.lora_b"]), left.half().float())
            seen |= {f"{key}.lora_a", f"{key}.lora_b"}
        like.pop(key)
    assert seen == set(adapter) and bool(adapter) == (case != "q8_0, Q alone")
    for name, tensor in like.items():
        assert np.array_equal(tensor.data, written[name].data) and tensor.tensor_type == written[name].tensor_type
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    assert fields["general.name"].contents() == "tiny" and fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    if adapter:
        fields = gguf.GGUFReader(folder / "adapter.gguf").fields
        values = [fields[f"{key}"].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")]
        assert values == ["adapter", "lora", 0.0] and fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize("stored", ["f16", "q8_0", "f32"])
def test_what_has_no_type_is_multiplied_out(source, decomposed, tmp_path, stored):
    folder = tmp_path / "e"
    for number, options in enumerate(({"kept_fraction": 0.7}, {"backbone": "nf4", "rank": 8})):
        given = decomposed(**options)
        options = {"like": str(source[1]), "dense_type": stored, "threshold": 0.01, "overwrite": number > 0}
        result = lord_tune.export(str(given), str(folder), "gguf", **options)
        assert not (folder / "adapter.gguf").exists()
        layers = factored_layers(load_dense_or_factored(str(given)))
        assert any(f"{len(layers)} decomposed layers as {stored.upper()}" == note for note in result["notes"])
        assert any("backbone nf4" in note for note in result["notes"]) == (number == 1)
        if "model.layers.1.mlp.down_proj" in layers:
            found = decoded(tensors(folder / "model.gguf")[DOWN])
            own = layers["model.layers.1.mlp.down_proj"].dense_weight()
            limit = {"f32": 0, "f16": 2**-11, "q8_0": 1 / 254}[stored]  # of the largest weight of a block
            assert float((found - own).abs().max()) <= limit * float(own.abs().max())


def test_one_model_may_hold_both(source, rows_file, tmp_path):
    plan = tmp_path / "plan.json"
    lord_tune.plan(str(source[0]), backbone="q4_0", rank=8, save=str(plan))
    edited = json.loads(plan.read_text())
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        edited["layers"][f"model.layers.1.{name}"]["backbone"] = "nf4"
    plan.write_text(json.dumps(edited))
    text = {"calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(source[0]), str(tmp_path / "d"), plan=str(plan), **text)
    result = lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "gguf", like=str(source[1]))
    assert result["comparison"]["kl"] < 1e-5
    assert {"19 decomposed layers as Q4_0", "2 decomposed layers as F16"} <= set(result["notes"])
    adapter = tensors(tmp_path / "e" / "adapter.gguf")
    assert f"{Q}.lora_a" not in adapter and len(adapter) == 2 * 19


def test_factors_in_8_bits_where_their_rows_are_whole_blocks(source, decomposed, tmp_path):
    folder = tmp_path / "e"
    given = {"like": str(source[1]), "adapter_type": "q8_0", "threshold": 0.01}
    lord_tune.export(str(decomposed(backbone="q4_0", rank=32)), str(folder), "gguf", **given)
    assert {t.tensor_type.name for t in tensors(folder / "adapter.gguf").values()} == {"Q8_0"}
    lord_tune.export(str(decomposed(backbone="q4_0", rank=8)), str(folder), "gguf", overwrite=True, **given)
    kinds = {name.rpartition(".")[2]: t.tensor_type.name for name, t in tensors(folder / "adapter.gguf").items()}
    assert kinds == {"lora_a": "Q8_0", "lora_b": "F16"}


def test_layers_stored_transposed(rows_file, tmp_path):
    """GPT-2: Conv1D, fused q k v, biases, tied embeddings."""
    model = tiny_gpt2()
    folder = save_tiny(model, tmp_path / "model")
    like = write_like(model, tmp_path / "like.gguf", "gpt2")
    given = {"backbone": "q4_0", "rank": 8, "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(folder), str(tmp_path / "d"), **given)
    result = lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "gguf", like=str(like))
    assert result["comparison"]["kl"] < 1e-6
    layer = factored_layers(load_dense_or_factored(str(tmp_path / "d")))["transformer.h.0.attn.c_attn"]
    written = tensors(tmp_path / "e" / "model.gguf")["blk.0.attn_qkv.weight"]
    assert torch.equal(decoded(written), layer.backbone.dequantize(torch.float32))


def test_square_layers_stored_transposed_may_stay_as_they_are(rows_file, tmp_path):
    model = tiny_gpt2()
    folder = save_tiny(model, tmp_path / "model")
    like = write_like(model, tmp_path / "like.gguf", "gpt2")
    given = {"backbone": "q4_0", "rank": 8, "targets": "c_fc", "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(folder), str(tmp_path / "d"), **given)
    assert lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "gguf", like=str(like))["comparison"]["kl"] < 1e-6


def test_a_bias_that_the_method_changed_is_written_as_it_is(rows_file, tmp_path):
    """Its values say nothing about where it lies: nothing is added to it."""
    model = tiny_gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_fc.bias"):
                parameter.zero_()
    folder = save_tiny(model, tmp_path / "model")
    like = write_like(model, tmp_path / "like.gguf", "gpt2")
    given = {"backbone": "q4_0", "method": "afm", "rank": 4, "calibration": [str(rows_file)], **CALIBRATION}
    lord_tune.decompose(str(folder), str(tmp_path / "d"), **given)
    lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "gguf", like=str(like))
    written = tensors(tmp_path / "e" / "model.gguf")
    for number in range(2):
        layer = factored_layers(load_dense_or_factored(str(tmp_path / "d")))[f"transformer.h.{number}.mlp.c_fc"]
        assert float(layer.bias.abs().max()) > 0
        assert torch.equal(decoded(written[f"blk.{number}.ffn_up.bias"]), layer.bias.float())


def test_what_a_file_may_say_beside_its_tensors(source, decomposed, tmp_path):
    """Another alignment, empty lists, a number of heads for each block."""
    model = load_dense_or_factored(str(source[0]))
    like = write_like(model, tmp_path / "like.gguf", "llama", alignment=64, heads_by_block=True)
    result = lord_tune.export(str(decomposed(backbone="q4_0", rank=8)), str(tmp_path / "e"), "gguf", like=str(like))
    assert result["comparison"]["kl"] < 1e-6


def test_ones_that_a_converter_adds_are_seen(tmp_path):
    """Gemma's norms."""
    model = tiny_llama(intermediate=192)
    own = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.1
    model.model.norm.weight.data = own + 1
    place, _ = gguf_places.Located(write_like(model, tmp_path / "l.gguf", "llama")).place("model.norm.weight", own)
    assert place.added == 1 and torch.allclose(place.back(place.into(own)), own, atol=1e-6)


def test_a_trained_adapter_is_folded_first(source, decomposed, rows_file, tmp_path):
    given = {"model_name_or_path": str(decomposed(backbone="q4_0", rank=8)), "dataset_name": str(rows_file)}
    short = {"max_steps": 2, "max_length": 32, "learning_rate": 1e-2, "warmup_steps": 0, "save_strategy": "no"}
    lord_tune.train(output_dir=str(tmp_path / "run"), bf16=False, **given, **short)
    result = lord_tune.export(str(tmp_path / "run"), str(tmp_path / "e"), "gguf", like=str(source[1]))
    assert result["comparison"]["kl"] < 1e-5


# --- what is refused ---


def refused(given, like, tmp_path, reason, **options):
    with pytest.raises(UsageError, match=reason):
        lord_tune.export(str(given), str(tmp_path / "e"), "gguf", like=str(like), **options)
    assert not (tmp_path / "e").exists()


def test_a_file_of_another_model(source, decomposed, tmp_path):
    given = decomposed(backbone="q4_0", rank=8)
    other = write_like(tiny_llama(intermediate=192, seed=1), tmp_path / "other.gguf", "llama")
    refused(
        given, other, tmp_path, "token_embd.weight' in .* is not .*pass a GGUF file of the original|cosine of the two"
    )
    wider = write_like(tiny_llama(hidden=128, intermediate=192), tmp_path / "wider.gguf", "llama")
    refused(given, wider, tmp_path, r"\(300, 64\) and .* is \(300, 128\)")
    fewer = write_like(tiny_llama(intermediate=192, layers=2), tmp_path / "fewer.gguf", "llama")
    refused(given, fewer, tmp_path, "has no tensor in")
    extra = tiny_llama(intermediate=192, layers=4)  # its last block would run
    extra.load_state_dict(tiny_llama(intermediate=192).state_dict(), strict=False)
    like = write_like(extra, tmp_path / "extra.gguf", "llama")
    refused(given, like, tmp_path, "'blk.3.* is not in the model")
    sibling = tiny_llama(intermediate=192)
    with torch.no_grad():
        sibling.model.norm.weight += 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    like = write_like(sibling, tmp_path / "sibling.gguf", "llama")
    refused(given, like, tmp_path, "output_norm.weight.* is not 'model.norm.weight' of the model")


def test_files_that_are_none(source, decomposed, tmp_path):
    given = decomposed(backbone="q4_0", rank=8)
    cut = tmp_path / "cut.gguf"
    whole = source[1].read_bytes()
    cut.write_bytes(whole[:5000])
    refused(given, cut, tmp_path, "is not a GGUF file that can be read")
    for length in range(4, 1500, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="is not a GGUF file that can be read"):
            gguf_places.opened(cut)
    cut.write_text("hello")
    refused(given, cut, tmp_path, "is not a GGUF file that can be read")
    refused(given, tmp_path / "missing.gguf", tmp_path, "does not exist")
    with pytest.raises(UsageError, match="pass `like` FILE.gguf"):
        lord_tune.export(str(given), str(tmp_path / "e"), "gguf")
    with pytest.raises(UsageError, match="`like` has no effect"):
        lord_tune.export(str(given), str(tmp_path / "e"), "dense", like=str(source[1]))


def test_words_that_are_no_text_are_refused_where_they_are_needed():
    class Words:
        name, types = "tokenizer.ggml.tokens", []

        def contents(self):
            return str(b"\xff\xfe", "utf-8")

    found = gguf_places.Field.of(Words())
    with pytest.raises(UsageError, match=r"tokenizer.ggml.tokens' of the GGUF file is not UTF-8 text"):
        found.contents()


def test_biases_without_a_place(source, decomposed, tmp_path):
    given = decomposed(method="afm", backbone="q4_0", rank=8)
    refused(given, source[1], tmp_path, "the method afm added it")


# --- the engine ---


@pytest.mark.slow
def test_llama_cpp_computes_the_same(tmp_path):
    """SmolLM2 with L R in two blocks, and that another model is noticed."""
    pytest.importorskip("xllamacpp")
    rows = write_code_rows(tmp_path / "code.jsonl")
    text = {"calibration": [str(rows)], "calibration_tokens": 1024, "context_length": 128}
    given = {"backbone": "q4_0", "average_rank": 16, "targets": r"\.(3|20)\.", **text}
    lord_tune.decompose("demo", str(tmp_path / "d"), **given)
    result = lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "gguf", like="demo")
    assert any("run in llama.cpp" in note for note in result["notes"]), result["notes"]
    model, tokenizer = lord_tune.load(str(tmp_path / "d"))
    ids = torch.tensor([tokenizer("def main(argv):\n    return len(argv)\n\nclass Point:\n")["input_ids"]])
    for layer in factored_layers(model).values():
        layer.left.weight.data.mul_(-30)  # an adapter that changes the model
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    with pytest.raises(ExportMismatch, match="computes another model"):
        compared_in_engine(tmp_path / "e" / "model.gguf", tmp_path / "e" / "adapter.gguf", ids, logits)
