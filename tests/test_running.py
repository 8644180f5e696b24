"""How any model is run on token ids: the longest window, and a loss where labels are missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lord_tune.integrations.running import max_length, run_model

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
