"""Random models, small enough to decompose in a second, and a tokenizer and text that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY, POSITIONS = 64, 160, 3, 4, 300, 256
EOS, PAD, MASK = "<eos>", "<pad>", "<mask>"  # ids 256, 257, 258, after the 256 bytes
# transformers' 0.02 leaves the logits of such a small model nearly constant, so no change of a layer would be seen
_SPREAD = 0.12


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}


def llama_config(intermediate: int = INTERMEDIATE, hidden: int = HIDDEN, layers: int = LAYERS) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        initializer_range=_SPREAD,
        **_special_ids(),
    )


def gpt2_config() -> GPT2Config:
    return GPT2Config(
        n_embd=HIDDEN,
        n_inner=INTERMEDIATE,
        n_layer=LAYERS,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        initializer_range=_SPREAD,
        **_special_ids(),
    )


def bert_config() -> BertConfig:
    return BertConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        initializer_range=_SPREAD,
        **_special_ids(),
    )


def _seeded(build: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config).eval()


def tiny_llama(
    seed: int = 0, intermediate: int = INTERMEDIATE, hidden: int = HIDDEN, layers: int = LAYERS
) -> LlamaForCausalLM:
    """Rotary positions, grouped keys and values, gated MLP, no biases."""
    return _seeded(LlamaForCausalLM, llama_config(intermediate, hidden, layers), seed)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Conv1D layers (weights stored as (in, out)) with biases, fused q, k, v, tied head."""
    return _seeded(GPT2LMHeadModel, gpt2_config(), seed)


def tiny_bert(seed: int = 0) -> BertForMaskedLM:
    """An encoder with biases and a masked-token head."""
    return _seeded(BertForMaskedLM, bert_config(), seed)


_WIDTHS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "initializer_range": _SPREAD,
    **_special_ids(),
}
_GROUPED = _WIDTHS | {"num_key_value_heads": 2}
_GPT2 = gpt2_config().to_diff_dict() | {"initializer_range": _SPREAD}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2}
# their position ids start after the padding id
_OFFSET = _WIDTHS | {"pad_token_id": 1}
_OPT = {key: value for key, value in _WIDTHS.items() if key not in ("intermediate_size", "initializer_range")}
SLIDING_WINDOW = 32

# name -> class, configuration; what is special about it
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),  # q, k, v with bias
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 16}),  # normed q, k
    "mistral": ("MistralForCausalLM", _GROUPED | {"sliding_window": SLIDING_WINDOW}),
    "gemma3": (  # masks and rotary frequencies that differ between blocks
        "Gemma3ForCausalLM",
        _GROUPED
        | {"head_dim": 16, "sliding_window": SLIDING_WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi": ("PhiForCausalLM", _WIDTHS),  # attention beside the MLP
    "phi3": ("Phi3ForCausalLM", _GROUPED),  # fused q, k, v and gate, up
    "gpt2": ("GPT2LMHeadModel", _GPT2),  # Conv1D
    "bigcode": ("GPTBigCodeForCausalLM", _GPT2 | {"multi_query": True}),
    "starcoder2": ("Starcoder2ForCausalLM", _GROUPED),
    "neox": ("GPTNeoXForCausalLM", _WIDTHS),
    "falcon": ("FalconForCausalLM", _WIDTHS | {"multi_query": True, "bias": True}),  # a linear class of its own
    "opt": (  # projections between the embeddings and the blocks
        "OPTForCausalLM",
        _OPT | {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": 32, "init_std": _SPREAD},
    ),
    "bert": ("BertForMaskedLM", _WIDTHS),
    "roberta": ("RobertaForMaskedLM", _OFFSET),
    "mpnet": ("MPNetForMaskedLM", _OFFSET),  # one position bias for all blocks
    "mpnet-bare": ("MPNetModel", _OFFSET),
    "mixtral": ("MixtralForCausalLM", _EXPERTS | {"num_local_experts": 4}),  # fused experts
    "qwen3-moe": ("Qwen3MoeForCausalLM", _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16}),
}
# further mixtures of experts, which few tests need
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": FAMILIES["mixtral"],
    "qwen3-moe": FAMILIES["qwen3-moe"],
    "gpt-oss": (  # experts transposed, gate and up interleaved, with biases
        "GptOssForCausalLM",
        _EXPERTS
        | {"num_local_experts": 4, "head_dim": 16, "sliding_window": SLIDING_WINDOW}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "deepseek": (  # a dense block before those with experts, shared experts
        "DeepseekV3ForCausalLM",
        _EXPERTS
        | _LATENT
        | {"num_key_value_heads": HEADS, "n_routed_experts": 4, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1},
    ),
}


def tiny_family(name: str, seed: int = 0, layers: int = LAYERS) -> Any:
    """A random model of FAMILIES or MIXTURES. Its biases are random too: zeros would not be missed."""
    kind, given = (FAMILIES | MIXTURES)[name]
    build = getattr(transformers, kind)
    count = "n_layer" if "n_layer" in given else "num_hidden_layers"
    model = _seeded(build, build.config_class(**(given | {count: layers})), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


# heads without a language model's loss: class, configuration, options
CLASSIFIERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sequence": ("LlamaForSequenceClassification", llama_config, {"num_labels": 3}),
    "reward": ("LlamaForSequenceClassification", llama_config, {"num_labels": 1}),
    "token": ("BertForTokenClassification", bert_config, {"num_labels": 5}),
    "question": ("BertForQuestionAnswering", bert_config, {}),
}


def tiny_head(name: str, layers: int = LAYERS) -> Any:
    """A random model of CLASSIFIERS."""
    kind, configuration, options = CLASSIFIERS[name]
    config = configuration()
    config.update(options | {"num_hidden_layers": layers})
    return _seeded(getattr(transformers, kind), config, 0)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (byte-level BPE without merges), so any text round-trips and lengths are easy to predict."""
    alphabet = sorted(ByteLevel.alphabet())
    assert len(alphabet) == 256
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([EOS, PAD, MASK])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of one file or many."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def without_sentinels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a checkpoint that a model computes with."""
    return {name: t for name, t in tensors.items() if (t.dtype, t.shape) != (torch.uint8, (1,))}


def save_tiny(model: Any, folder: Path) -> Path:
    """A Hugging Face directory of `model` with the tiny tokenizer."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def code_document(number: int) -> str:
    """A few lines of Python that differ with `number`; about 400 characters, which are as many tokens."""
    noun = ("window", "matrix", "block", "spectrum", "budget", "layer")[number % 6]
    verb = ("scale", "split", "fold", "count", "merge")[number % 5]
    return (
        f"def {verb}_{noun}_{number}(values, limit={number % 13}):\n"
        f'    """{verb.capitalize()} the {noun} of every entry above {number * 7 % 31}."""\n'
        f"    total = {number}\n"
        f"    for index, value in enumerate(values):\n"
        f"        if value > limit + {number % 4} and index % {number % 3 + 2} == 0:\n"
        f"            total += value * {number * number % 97}\n"
        f"        elif value == {number}:\n"
        f"            raise ValueError('{noun} {number} is not a {verb}')\n"
        f"    return total - len(values) // {number % 5 + 1}\n"
    )


def write_code_rows(path: Path, rows: int = 24) -> Path:
    """A JSONL file with one Python-like document per row in the column `text`; 24 rows are about 9,000 tokens."""
    path.write_text("".join(json.dumps({"text": code_document(number)}) + "\n" for number in range(rows)))
    return path
