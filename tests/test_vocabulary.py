"""Tokens that the tokenizer knows and the embedding lacks: named before a forward pass ends in an index error."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny import MASK, PAD, code_document, llama_config, save_tiny, tiny_llama
from transformers import BertForMaskedLM, LlamaForCausalLM

import lord_tune
from lord_tune.errors import CheckpointError, LordWarning, UsageError
from lord_tune.integrations.vocabulary import check_vocabulary

WARNED = r"The tokenizer has the token '<mask>' with id 258, and the model's embedding has rows for the ids 0 to 257"
REFUSED = r"The text holds the token '<mask>' with id 258, and the model's embedding has rows for the ids 0 to 257 only"
TRAINING: dict[str, Any] = {"max_length": 64, "max_steps": 1, "use_cpu": True, "report_to": "none"}


def smaller(folder: Path, rows: int) -> Path:
    """A one-block model whose embedding has `rows` rows, with the tiny tokenizer of 259 ids."""
    config = llama_config(layers=1)
    config.vocab_size, config.pad_token_id = rows, None
    return save_tiny(LlamaForCausalLM(config), folder)


def rows_of(path: Path, more: str = "") -> str:
    path.write_text("".join(json.dumps({"text": more + code_document(n) + more}) + "\n" for n in range(8)))
    return str(path)


def decompose(model: Path, out: Path, text: str | None = None) -> None:
    given = {} if text is None else {"calibration": [text], "calibration_tokens": 256, "context_length": 64}
    lord_tune.decompose(str(model), str(out), method="svd", rank=2, **given)


def train(model: Path, out: Path, text: str, **options: Any) -> None:
    lord_tune.train(model_name_or_path=str(model), dataset_name=text, output_dir=str(out), **(TRAINING | options))


def test_a_token_without_an_embedding_is_named_before_it_is_used(tmp_path):
    model, out = smaller(tmp_path / "model", 258), tmp_path / "d"
    good, bad = rows_of(tmp_path / "good.jsonl"), rows_of(tmp_path / "bad.jsonl", MASK)
    with pytest.raises(CheckpointError, match=REFUSED):
        decompose(model, out, bad)
    assert not out.with_name("d.partial").exists()
    with pytest.warns(LordWarning, match=WARNED):
        decompose(model, out, good)
    with pytest.raises(CheckpointError, match=REFUSED):
        lord_tune.evaluate(str(out), [good, bad], context_length=64)
    with pytest.warns(LordWarning, match=WARNED):
        lord_tune.evaluate(str(out), [good], context_length=64)
    for options in ({}, {"packing": True}):
        with pytest.raises(CheckpointError, match=REFUSED):
            train(out, tmp_path / "t", bad, max_length=512, **options)
    with pytest.raises(CheckpointError, match=REFUSED):
        train(out, tmp_path / "t", good, eval_dataset_name=bad, eval_strategy="steps", max_length=512)
    assert not (tmp_path / "t").exists()
    with pytest.raises(CheckpointError, match=REFUSED):
        lord_tune.export(str(out), str(tmp_path / "e"), "dense", text=bad)


def test_pairs_are_looked_through_too(tmp_path):
    decompose(smaller(tmp_path / "model", 258), tmp_path / "d")
    pairs = tmp_path / "pairs.jsonl"
    for column in ("prompt", "chosen", "rejected"):
        row = {"prompt": "def f():\n", "chosen": "    return 1\n", "rejected": "    pass\n"}
        pairs.write_text((json.dumps(row | {column: row[column] + MASK}) + "\n") * 4)
        with pytest.raises(CheckpointError, match=REFUSED):
            train(tmp_path / "d", tmp_path / "t", str(pairs), objective="dpo")


def test_padding_without_an_embedding_matters_where_something_is_padded(tmp_path):
    decompose(smaller(tmp_path / "model", 257), tmp_path / "d")
    text = rows_of(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match=rf"filled up with the token '{PAD}', id 257, .* 0 to 256 only; set pack"):
        train(tmp_path / "d", tmp_path / "t", text, per_device_train_batch_size=2)
    with pytest.warns(LordWarning, match="token '<pad>' with id 257 and 1 more"):
        train(tmp_path / "d", tmp_path / "t", text, packing=True)


def test_the_mask_of_a_masked_model_counts_as_text(bert_dir):
    bert = BertForMaskedLM.from_pretrained(bert_dir)
    tokenizer = lord_tune.load(str(bert_dir))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vocabulary(bert, tokenizer, [])
        check_vocabulary(tiny_llama(), tokenizer, [])
    bert.resize_token_embeddings(258)
    with pytest.raises(CheckpointError, match=REFUSED):
        check_vocabulary(bert, tokenizer, [])
