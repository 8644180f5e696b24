"""A GGUF file of a tiny model, as llama.cpp's converter lays it out, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers.pytorch_utils import Conv1D


def reordered(value: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's converter on q and k of the Llama family, as its source has it."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def write_like(model: Any, path: Path, arch: str, alignment: int | None = None, heads_by_block: bool = False) -> Path:
    """In float32."""
    writer = gguf.GGUFWriter(path, arch)
    config = model.config
    blocks = getattr(config, "num_hidden_layers", None) or config.n_layer
    writer.add_block_count(blocks)
    heads = getattr(config, "num_attention_heads", None) or config.n_head
    narrow = getattr(config, "num_key_value_heads", heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv([narrow] * blocks if heads_by_block else narrow)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], blocks)
    turned = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = value.T if key.removesuffix(".weight") in turned else value
        if arch == "llama" and ".q_proj" in key:
            value = reordered(value, heads)
        if arch == "llama" and ".k_proj" in key:
            value = reordered(value, narrow)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), value.contiguous().numpy())
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))  # of the file alone
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
