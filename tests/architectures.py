"""Tiny random models of every text architecture that transformers has and that a few common settings can make small."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

_NO_TEXT = {"MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}  # their ids are those of sounds, several a step
_TOO_LARGE = 4_000_000  # numbers; some architectures have widths that no common setting reaches
SPREAD = 0.12  # of random weights; transformers' 0.02 leaves outputs nearly constant

_WIDTHS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    "encoder_layers": 2,
    "vocab_size": 300,
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 256),
    "pad_token_id": 257,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "initializer_range": SPREAD,
    "embedding_size": 32,
    "sliding_window": 32,
}
_PADDED: dict[str, Any] = {"pad_token_id": 1, "max_position_embeddings": 258}  # position ids start after the padding id
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
_RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 32,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}

# architecture -> what it needs beside the common settings, or (variant of it) what makes it another case
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("CamembertForCausalLM", "CamembertForMaskedLM", "Data2VecTextForMaskedLM", "RobertaForCausalLM"),
            *("RobertaForMaskedLM", "RobertaPreLayerNormForMaskedLM", "XLMRobertaForMaskedLM", "XmodForMaskedLM"),
            *("XLMRobertaXLForMaskedLM", "LongformerForMaskedLM", "EsmForMaskedLM"),
        ),
        _PADDED,
    ),
    "Gemma3nForCausalLM": {
        **_MIXED,
        "num_hidden_layers": 4,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma4ForCausalLM": {
        **_MIXED,
        "num_hidden_layers": 4,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 16,
    },
    "DebertaV2ForMaskedLM": _RELATIVE,
    "DebertaV2ForMaskedLM:conv": _RELATIVE | {"conv_kernel_size": 3, "conv_act": "gelu"},
    "Qwen3NextForCausalLM": {
        "num_hidden_layers": 4,
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    }
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2},
    "Qwen3_5ForCausalLM": {
        "num_hidden_layers": 4,
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    }
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2},
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 32},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8},
    "LlamaForSequenceClassification": {"num_labels": 3},
    "Qwen2ForSequenceClassification": {"num_labels": 1},
    "BertForTokenClassification": {"num_labels": 5},
    "BertForQuestionAnswering": {},
    "LlamaModel": {},
    "Qwen3Model": {},
    "BertModel": {},
    "T5EncoderModel": {},
    "RwkvForCausalLM": {"attention_hidden_size": 64, "context_length": 256},
    "MambaForCausalLM": {"state_size": 8},
}


def names() -> list[str]:
    """Every architecture with a language-model head that transformers' auto classes know, and some without a head."""
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    found = {name for mapping in mappings for entry in mapping.values() for name in _all(entry)}
    return sorted((found | set(_SPECIAL)) - _NO_TEXT)


def _all(entry: Any) -> list[str]:
    return [entry] if isinstance(entry, str) else list(entry)


def build(name: str) -> Any | None:
    """A random model, its biases random too; None where the common settings do not make it small or do not fit it."""
    build_model = getattr(transformers, name.partition(":")[0])
    kind = build_model.config_class
    keys = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", {}))
    for base in kind.__mro__:
        keys |= set(getattr(base, "__annotations__", {}))
    given = {key: value for key, value in _WIDTHS.items() if key in keys}
    given |= {"num_key_value_heads": 4} if "kv_lora_rank" in keys else {}  # latent attention has as many as heads
    given |= _SPECIAL.get(name, {})
    try:
        with torch.device("meta"):
            if sum(p.numel() for p in build_model(kind(**given)).parameters()) > _TOO_LARGE:
                return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_model(kind(**given)).eval()
    except Exception:  # these settings do not belong together in this architecture
        return None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.std() < 0.1 and "norm" not in key.lower():
                parameter.normal_(0, SPREAD, generator=generator)
            elif parameter.dim() <= 1 and bool((parameter == 0).all()):
                parameter.normal_(0, 0.3, generator=generator)
    return model
