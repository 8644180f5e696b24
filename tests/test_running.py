"""How any model is run on token ids: the longest window, and a loss where labels are missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny import CLASSIFIERS, save_tiny, tiny_head

import lord_tune
from lord_tune.allocation import factor_cost
from lord_tune.calibration.corpus import file_windows
from lord_tune.errors import UsageError
from lord_tune.integrations.running import max_length, run_model, summed_loss
from lord_tune.layers import factored_layers

_SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_LED: dict[str, Any] = {
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 48,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "attention_window": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


@pytest.mark.parametrize(
    ("kind", "options", "longest"),
    [
        ("RobertaForMaskedLM", {}, 62),
        ("CamembertForMaskedLM", {}, 62),
        ("XLMRobertaForMaskedLM", {}, 62),
        ("XmodForMaskedLM", {"languages": ["en_XX"], "default_language": "en_XX"}, 62),
        ("Data2VecTextForMaskedLM", {}, 62),
        ("LongformerForMaskedLM", {"attention_window": 16}, 62),
        ("LukeForMaskedLM", {"entity_vocab_size": 10, "entity_emb_size": 8}, 62),
        ("EsmForMaskedLM", {"mask_token_id": 4}, 62),
        ("MPNetForMaskedLM", {}, 62),
        ("IBertForMaskedLM", {}, 62),
        ("BertForMaskedLM", {}, 64),  # padding has no position of its own
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}, 64),  # its table is two rows longer
        ("MptForCausalLM", {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}, 64),
        ("LEDForConditionalGeneration", _LED, 48),
    ],
)
def test_the_longest_window_runs_and_one_token_more_does_not(kind, options, longest):
    build = getattr(transformers, kind)
    model = build(build.config_class(**_SMALL | options)).eval()
    assert max_length(model) == longest
    with torch.device("meta"):
        assert max_length(build(build.config_class(**_SMALL | options))) == longest
    with torch.no_grad():
        run_model(model, torch.randint(5, 250, (1, longest)))
        with pytest.raises((RuntimeError, IndexError)):
            run_model(model, torch.randint(5, 250, (1, longest + 1)))


@pytest.mark.parametrize("name", ["sequence", "token", "question"])
def test_without_labels_the_loss_estimates_how_much_the_outputs_move(name):
    """Hutchinson: the mean squared gradient of the random projection is the squared norm of the Jacobian."""
    model = tiny_head(name, layers=1).requires_grad_(False)
    layer, head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-2:]
    head.weight[1:] = head.weight[0]  # outputs that move together: their sum would move more than they do
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda m, args, output: seen.append(output.requires_grad_(True)))
    estimated = exact = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(1, 250, (1, 4), generator=generator)
        loss, count = summed_loss(model, ids)
        assert count == 4
        estimated += float(torch.autograd.grad(loss, seen.pop())[0].square().sum())
        found = model(input_ids=ids)
        outputs = torch.cat([value.flatten() for key, value in found.items() if key.endswith("logits")])
        rows = torch.autograd.grad(outputs, seen.pop(), torch.eye(len(outputs)), is_grads_batched=True)[0]
        exact += float(rows.square().sum())
    # three outputs or more: the relative standard deviation of the sum is at most sqrt(2 / 200) = 0.1
    assert 0.7 < estimated / exact < 1.3


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads_without_a_language_models_loss_are_decomposed_and_loaded_again(name, rows_file, tmp_path):
    dense = tiny_head(name)
    base = save_tiny(dense, tmp_path / "base")
    text: dict[str, Any] = {"calibration": [str(rows_file)], "calibration_tokens": 512, "context_length": 64}
    report = lord_tune.decompose(str(base), str(tmp_path / "out"), kept_fraction=0.8, **text)
    again = type(dense).from_pretrained(tmp_path / "out").eval()
    layers = factored_layers(again)
    assert {n: entry["rank"] for n, entry in report["layers"].items() if entry["rank"] != "dense"} == {
        n: layer.rank for n, layer in layers.items()
    }
    sizes = {n: m.weight.numel() for n, m in dense.named_modules() if n in report["layers"]}
    plans = {n: layer.plan for n, layer in layers.items()}
    cost = {n: factor_cost(plan.shape, plan.rank, plan.form) for n, plan in plans.items()}
    kept = sum(cost.get(n, size) for n, size in sizes.items())
    assert 0.75 < kept / sum(sizes.values()) <= 0.8
    with torch.no_grad():
        for key, layer in layers.items():
            dense.get_submodule(key).weight.copy_(layer.dense_weight())
        ids = torch.randint(1, 250, (2, 32))
        expected, found = dense(input_ids=ids), again(input_ids=ids)
    for key in expected:
        if key.endswith("logits"):
            assert torch.allclose(found[key], expected[key], atol=1e-4), key


# ---- what `evaluate` measures --------------------------------------------------------------------------------------

_WORDS: dict[str, Any] = {"vocab_size": 300, "pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 256}
_STACKS: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 257,
    "init_std": 0.12,
}
_T5: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4}
_XLNET: dict[str, Any] = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 300}
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "masked": ("BertForMaskedLM", _SMALL | {"hidden_size": 64, "initializer_range": 0.12}),
    "masked, offset": ("RobertaForMaskedLM", _SMALL | {"initializer_range": 0.12}),
    "decoder, scaled": ("T5ForConditionalGeneration", _WORDS | _T5 | {"decoder_start_token_id": 257}),
    "decoder": ("BartForConditionalGeneration", _WORDS | _STACKS),
}


def built(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    build = getattr(transformers, kind)
    return build(build.config_class(**options)).eval()


@pytest.mark.parametrize("name", MEASURED)
def test_evaluate_measures_the_loss_that_the_model_computes(name, rows_file, tmp_path):
    """Of a decomposed model, against its own forward pass with labels, window by window, and against the definition."""
    base, out = save_tiny(built(*MEASURED[name]), tmp_path / "base"), tmp_path / "out"
    lord_tune.decompose(str(base), str(out), method="svd", rank=6, backbone="int4")
    found = lord_tune.evaluate(str(out), text=[str(rows_file)], context_length=48, max_tokens=48 * 6)
    model, tokenizer = lord_tune.load(str(out))
    assert factored_layers(model)
    own = scores = count = 0.0
    for window in file_windows(str(rows_file), tokenizer, 48, 48 * 6):
        ids = labels = window[None]
        if name.startswith("masked"):
            chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15
            chosen[:, 24] = True
            ids, labels = ids.clone(), torch.where(chosen, ids, -100)
            ids[chosen] = tokenizer.mask_token_id
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        counted = labels[0] != -100
        log_p = output.logits[0, counted].log_softmax(-1)
        scores -= float(log_p.gather(1, labels[0, counted][:, None]).sum())
        own, count = own + float(output.loss) * int(counted.sum()), count + int(counted.sum())
    assert found["tokens"] == count
    # the same sums in another order
    assert found["loss"] == pytest.approx(own / count, rel=1e-5) == pytest.approx(scores / count, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("XLNetLMHeadModel", _XLNET, r"computes a loss of \S+ where the cross-entropy of the next token is"),
        ("BertLMHeadModel", _SMALL | {"initializer_range": 0.12}, "predicts a token from later ones as well"),
        (
            "T5ForConditionalGeneration",
            _WORDS | _T5 | {"decoder_start_token_id": None, "pad_token_id": None},
            "computes no loss of the same text in the decoder",
        ),
    ],
)
def test_a_model_whose_loss_is_another_one_is_refused(kind, options, says, rows_file, tmp_path):
    base = save_tiny(built(kind, options), tmp_path / "base")
    with pytest.raises(UsageError, match=says):
        lord_tune.evaluate(str(base), text=[str(rows_file)], context_length=48, max_tokens=96)
