"""`lord-tune correct`: the codes of other programs' files, read independently of how they are written here."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_like
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_gpt2, tiny_llama, write_code_rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lord_tune
import lord_tune.exports.gguf
from lord_tune.errors import UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import factored_layers
from lord_tune.quantizers import GGML

NAME = "model.layers.1.self_attn.q_proj"
IDS = torch.arange(3, 60)[None]


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """The tiny files have no tokenizer, without which llama.cpp runs nothing."""
    monkeypatch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """m: a folder; m.gguf; r.jsonl. All widths multiples of 256, for K types."""
    folder = tmp_path_factory.mktemp("original")
    model = tiny_llama(intermediate=512, hidden=256)
    save_tiny(model, folder / "m")
    write_like(model, folder / "m.gguf", "llama")
    write_code_rows(folder / "r.jsonl")
    return folder


def quantized_gguf(source, target, kinds):
    """kinds: name of a tensor -> type of GGUF."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType[kinds(tensor.name)]
        if len(tensor.shape) == 2 and kind.name != "F32":
            writer.add_tensor(tensor.name, gguf.quants.quantize(np.array(tensor.data), kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def correct(quantized, original, out, **options):
    given = {"calibration": [str(original / "r.jsonl")], "calibration_tokens": 512, "context_length": 64, "rank": 8}
    return lord_tune.correct(str(quantized), str(original / "m"), str(out), **given | options)


def gains(report):
    """Every corrected layer errs less than its codes alone."""
    errors = [(layer["error_calibrated"], layer["error_backbone"]) for layer in report["layers"].values()]
    assert all(own < alone for own, alone in errors if alone is not None)


def test_a_gguf_file_keeps_its_codes_and_gets_an_adapter(original, tmp_path):
    """Types differ by layer; one layer is whole, and the embedding is quantized as well."""
    kinds = {"blk.0.attn_q.weight": "Q5_1", "blk.1.attn_v.weight": "F32", "token_embd.weight": "Q8_0"}
    file = quantized_gguf(original / "m.gguf", tmp_path / "q.gguf", lambda name: kinds.get(name, "Q4_0"))
    report = correct(file, original, tmp_path / "o")
    assert list(report["heldout_losses"]) == ["original", "quantized", "corrected", "control"]
    gains(report)
    model = load_dense_or_factored(str(tmp_path / "o"))
    layers = factored_layers(model)
    assert "model.layers.1.self_attn.v_proj" not in layers and len(layers) == 20
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    embedding = gguf.quants.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(embedding))
    # rows of q are stored in llama.cpp's order
    theirs = torch.from_numpy(
        gguf.quants.dequantize(tensors["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.Q5_1)
    )
    heads = model.config.num_attention_heads
    turned = theirs.view(heads, -1, 2, 256).transpose(1, 2).reshape(256, 256)
    assert torch.equal(layers["model.layers.0.self_attn.q_proj"].backbone.dequantize(), turned)
    # file + adapter = the checkpoint
    adapter = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "o" / "adapter" / "adapter.gguf").tensors}
    for block in range(3):
        for kind, name in (("ffn_down", "mlp.down_proj"), ("attn_k", "self_attn.k_proj")):
            key = f"blk.{block}.{kind}.weight"
            q, left, right = (
                torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).float()
                for t in (tensors[key], adapter[f"{key}.lora_b"], adapter[f"{key}.lora_a"])
            )
            whole = q + left @ right
            if kind == "attn_k":
                whole = whole.view(model.config.num_key_value_heads, -1, 2, 256).transpose(1, 2).reshape(-1, 256)
            assert torch.allclose(layers[f"model.layers.{block}.{name}"].dense_weight(), whole, atol=2e-3), key


def test_types_that_nothing_here_can_write(original, tmp_path):
    """K types: random blocks, made near the original by their scales alone, are decoded by the gguf package."""
    kind = gguf.GGMLQuantizationType.Q6_K
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (256, 256 // size * stored), dtype=np.uint8)
    blocks[:, -2:] = np.array([0.001], np.float16).view(np.uint8)
    form, parts = GGML("Q6_K"), {"weight": torch.from_numpy(blocks)}
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert torch.equal(form.dequantize(parts, (256, 256), torch.float32), expected)
    assert torch.equal(form.dequantize(form.rows(parts, (256, 256), 3, 9), (6, 256), torch.float32), expected[3:9])
    x = torch.randn(5, 256)
    assert torch.allclose(form.linear(x, parts, (256, 256)), x @ expected.T, atol=1e-4)
    with pytest.raises(UsageError, match="rounds nothing"):
        form.quantize(expected)


def test_it_is_trained_and_exported_like_any_other(original, tmp_path):
    file = quantized_gguf(original / "m.gguf", tmp_path / "q.gguf", lambda name: "Q4_0" if "blk" in name else "F32")
    correct(file, original, tmp_path / "o", rank=32)
    common = {"dataset_name": str(original / "r.jsonl"), "max_steps": 2, "max_length": 64, "mode": "factors"}
    lord_tune.train(model_name_or_path=str(tmp_path / "o"), output_dir=str(tmp_path / "a"), **common)
    text = {"text": str(original / "r.jsonl"), "merge_limit": 9.0}
    with pytest.raises(UsageError, match="holds the blocks of a GGUF file, which nothing here rounds into"):
        lord_tune.export(str(tmp_path / "a"), str(tmp_path / "e"), "factored", merge="nearest", **text)
    result = lord_tune.export(str(tmp_path / "a"), str(tmp_path / "e"), "gguf", like=str(file), threshold=0.01)
    assert result["comparison"]["kl"] < 1e-4
    first, second = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for path in (file, tmp_path / "e" / "model.gguf")
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bitsandbytes_nf4(original, tmp_path, double):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    AutoModelForCausalLM.from_pretrained(original / "m", quantization_config=settings).save_pretrained(tmp_path / "q")
    report = correct(tmp_path / "q", original, tmp_path / "o")
    gains(report)
    assert "loaded on its base by stock transformers and PEFT" in report["adapter_notes"][0]
    ours = load_dense_or_factored(str(tmp_path / "o"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "q"), tmp_path / "o" / "adapter")
    for module in theirs.modules():  # else they are multiplied in bfloat16 on CPUs that can
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits.float(), atol=0.05)


def rounded(weight, bits, group, symmetric):
    """(codes (out, in), scales (out, groups), zeros (out, groups)), by hand."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).view(weight.shape[0], -1, group)
    if symmetric:
        scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half().float()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = ((high - low) / (2**bits - 1)).half().float()
        zeros = (-low / scales).round()
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 2**bits - 1)
    return codes.flatten(1)[:, : weight.shape[1]].int(), scales, zeros.int()


def words(fields, bits):
    """(rows, n) -> int32 (rows, n bits / 32), the low bits first."""
    per = 32 // bits
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % per))
    grouped = fields.view(fields.shape[0], -1, per).long()
    packed = (grouped << (torch.arange(per) * bits)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().contiguous()


def other_folder(original, folder, method, bits, group, symmetric, layers=lambda name: name.endswith("_proj")):
    """The original, quantized in the layout of another program; name -> weight as it decodes."""
    tensors = load_file(original / "m" / "model.safetensors")
    stored, expected = {}, {}
    for key, value in tensors.items():
        name = key.removesuffix(".weight")
        if not layers(name):
            stored[key] = value
            continue
        codes, scales, zeros = rounded(value, bits, group, symmetric)
        spread = [part.repeat_interleave(group, 1)[:, : value.shape[1]] for part in (scales, zeros)]
        expected[name] = (codes - spread[1]) * spread[0]
        if method == "gptq":
            stored[f"{name}.qweight"] = words(codes, bits).T.contiguous()
            stored[f"{name}.qzeros"] = words((zeros - 1).T.contiguous(), bits)
            stored[f"{name}.scales"] = scales.T.half().contiguous()
            stored[f"{name}.g_idx"] = (torch.arange(value.shape[1]) // group).int()
        else:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            for part, of in (("qweight", codes.T), ("qzeros", zeros.T)):
                stored[f"{name}.{part}"] = words(of.reshape(of.shape[0], -1, 8)[..., order].flatten(1), 4)
            stored[f"{name}.scales"] = scales.T.half().contiguous()
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((original / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": group, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize(
    ("method", "bits", "symmetric"), [("gptq", 4, True), ("gptq", 8, False), ("gptq", 2, False), ("awq", 4, False)]
)
def test_gptq_and_awq(original, tmp_path, method, bits, symmetric):
    expected = other_folder(original, tmp_path / "q", method, bits, 64, symmetric)
    report = correct(tmp_path / "q", original, tmp_path / "o")
    layers = factored_layers(load_dense_or_factored(str(tmp_path / "o")))
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert torch.allclose(layer.backbone.dequantize(torch.float32), expected[name], atol=1e-6), name
        assert layer.plan.backbone == f"w{bits}a16"
    assert report["adapter_notes"] == [
        "the adapter was not loaded on its base: the package that runs it is not installed"
    ]
    gains(report)


def test_groups_that_end_short_and_layers_that_are_left_alone(original, tmp_path):
    """Groups of 96 in rows of 256 and 512; and a head that is quantized, which is no layer to correct."""

    def layers(name):
        return name.endswith("_proj") or name == "lm_head"

    expected = other_folder(original, tmp_path / "q", "gptq", 4, 96, False, layers)
    correct(tmp_path / "q", original, tmp_path / "o", targets="mlp")
    model = load_dense_or_factored(str(tmp_path / "o"))
    corrected = factored_layers(model)
    assert corrected.keys() == {name for name in expected if "mlp" in name}
    for name, weight in expected.items():
        own = corrected[name].backbone.dequantize() if name in corrected else model.get_submodule(name).weight
        assert torch.allclose(own, weight, atol=1e-6), name


def test_scales_that_a_quantizer_moved_are_noticed(original, tmp_path):
    """As AWQ does: the norm is divided by what the next weights are multiplied by."""
    other_folder(original, tmp_path / "q", "awq", 4, 64, False)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] /= torch.linspace(0.7, 1.4, 256)
    save_file(tensors, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"moved scales between layers \(AWQ, SmoothQuant\)"):
        correct(tmp_path / "q", original, tmp_path / "o")
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("symmetric", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compressed_tensors(original, tmp_path, symmetric):
    pytest.importorskip("compressed_tensors")
    given = {"backbone": "w4a16", "group_size": 64, "symmetric": symmetric, "method": "svd", "rank": 0}
    lord_tune.decompose(str(original / "m"), str(tmp_path / "d"), **given)
    lord_tune.export(str(tmp_path / "d"), str(tmp_path / "e"), "compressed-tensors")
    report = correct(tmp_path / "e" / "base", original, tmp_path / "o")
    theirs, ours = (factored_layers(load_dense_or_factored(str(tmp_path / name))) for name in ("d", "o"))
    for name, layer in ours.items():
        assert torch.equal(layer.backbone.dequantize(), theirs[name].backbone.dequantize()) and layer.rank == 8
    assert "loaded on its base by stock transformers and PEFT" in report["adapter_notes"][0]


def test_what_does_not_belong_together_is_refused(original, tmp_path):
    kinds = lambda name: "Q4_0" if "blk" in name else "F32"  # noqa: E731
    file = quantized_gguf(original / "m.gguf", tmp_path / "q.gguf", kinds)
    save_tiny(tiny_llama(intermediate=512, hidden=256, seed=7), tmp_path / "other")
    rows = {"calibration": [str(original / "r.jsonl")]}
    with pytest.raises(UsageError, match=r"is not what 'model.layers.0.\S+' was made from"):
        lord_tune.correct(str(file), str(tmp_path / "other"), str(tmp_path / "o"), **rows)
    save_tiny(tiny_gpt2(), tmp_path / "gpt2")
    with pytest.raises(UsageError, match=r"'transformer\S+' of the model has no tensor in"):
        lord_tune.correct(str(file), str(tmp_path / "gpt2"), str(tmp_path / "o"), **rows)
    other_folder(original, tmp_path / "g", "gptq", 4, 64, True)
    with pytest.raises(UsageError, match=r"is not made from the original's \(relative distance 1"):
        lord_tune.correct(str(tmp_path / "g"), str(tmp_path / "other"), str(tmp_path / "o"), **rows)
    with pytest.raises(UsageError, match="is not quantized"):
        lord_tune.correct(str(original / "m"), str(original / "m"), str(tmp_path / "o"), **rows)
    with pytest.raises(UsageError, match="fitted on calibration text"):
        lord_tune.correct(str(file), str(original / "m"), str(tmp_path / "o"))
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (tmp_path / "g" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="is quantized by hqq, which correct does not read"):
        lord_tune.correct(str(tmp_path / "g"), str(original / "m"), str(tmp_path / "o"), **rows)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UsageError, match="is not a GGUF file that can be read"):
        lord_tune.correct(str(tmp_path / "cut.gguf"), str(original / "m"), str(tmp_path / "o"), **rows)
    assert not (tmp_path / "o").exists()
