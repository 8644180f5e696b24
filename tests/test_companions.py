"""What lies beside the weights of a model goes along."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny, tiny_family

import lord_tune
from lord_tune.errors import CheckpointError
from lord_tune.integrations.companions import LARGEST, companions_of
from lord_tune.integrations.remote_code import REMOTE_FILE

# as SentenceTransformer.save writes it, of a model with pooling, a dense layer and normalisation
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
KEPT = {
    "modules.json": json.dumps(_MODULES),
    "1_Pooling/config.json": '{"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 64, "out_features": 8}',
    "3_Normalize/config.json": "{}",
    "config_sentence_transformers.json": '{"prompts": {"query": "q: "}, "similarity_fn_name": "dot"}',
    "sentence_bert_config.json": '{"max_seq_length": 64}',
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "generation_config.json": '{"temperature": 0.3}',
    "vocab.txt": "a\nb\n",
    "pooling_of_ours.py": "x = 1\n",
    "helpers/more.py": "y = 2\n",
    "LICENSE": "free",
}
LEFT = {
    "onnx/model.onnx": "weights",
    "onnx/config.json": "{}",
    "checkpoint-5/model.safetensors": "weights",
    "checkpoint-5/trainer_state.json": "{}",
    "sparse_linear.pt": "weights",
    "train.jsonl": "{}",
    "client_secret.json": "{}",
    "token": "hf_x",
}
SILENT = {
    "README.md": "the card of the original",
    "tf_model.h5": "weights",
    "optimizer.pt": "state",
    ".env": "TOKEN=x",
    ".git/config": "",
    "helpers/.cache/x": "",
    "helpers/__pycache__/more.cpython-311.pyc": "",
}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding model as sentence-transformers saves it, in a folder with other things."""
    folder = save_tiny(tiny_family("mpnet-bare"), tmp_path_factory.mktemp("models") / "embedder")
    for name, text in (KEPT | LEFT | SILENT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    save_file({"linear.weight": torch.ones(8, 64)}, folder / "2_Dense" / "model.safetensors")
    with (folder / "demo.wav").open("wb") as stream:
        stream.truncate(LARGEST + 1)
    return folder


def check_kept(folder: Path, source: Path) -> None:
    for name in (*KEPT, "2_Dense/model.safetensors"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    for name in (*LEFT, *SILENT, "demo.wav"):
        assert name == "README.md" or not (folder / name).exists(), name
    assert "lord_tune" in (folder / "README.md").read_text()


def test_what_belongs_to_a_model_goes_along_and_the_rest_is_named(embedder, tmp_path, capsys):
    lord_tune.decompose(str(embedder), str(tmp_path / "d"), method="svd", rank=4, backbone="int8")
    said = " ".join(capsys.readouterr().err.split())
    left = "checkpoint-5/, client_secret.json, demo.wav, onnx/, sparse_linear.pt, token, train.jsonl"
    assert f"not copied from {embedder}: {left}; copy by hand what you need" in said
    check_kept(tmp_path / "d", embedder)
    for form in ("dense", "factored"):
        lord_tune.export(str(tmp_path / "d"), str(tmp_path / form), form)
        check_kept(tmp_path / form, embedder)
        assert (tmp_path / form / REMOTE_FILE).exists() == (form == "factored")
        assert ("auto_map" in json.loads((tmp_path / form / "config.json").read_text())) == (form == "factored")
    assert "not copied" not in capsys.readouterr().err


def test_files_that_are_written_anyway_are_not_replaced(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
        (folder / "generation_config.json").write_text(folder.name)
    (source / "vocab.txt").write_text("old")
    companions_of(str(source)).copy(out)
    assert (out / "generation_config.json").read_text() == "out" and (out / "vocab.txt").exists()


def test_of_a_training_output_the_files_of_its_base_but_its_own_tokenizer(tmp_path):
    base, trained = tmp_path / "base", tmp_path / "trained"
    base.mkdir()
    for name in ("config.json", "modules.json", "special_tokens_map.json", "vocab.txt", "chat_template.jinja"):
        (base / name).write_text("{}")
    trained.mkdir()
    (trained / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (trained / "train_config.json").write_text("{}")
    assert companions_of(str(trained)).files == {"modules.json": base / "modules.json"}


@pytest.mark.parametrize("path", ["../outside", "/etc"])
def test_modules_outside_the_model_are_not_read(path, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.safetensors").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"path": path}]))
    assert list(companions_of(str(tmp_path / "model")).files) == ["modules.json"]


def test_of_a_hub_model_the_cached_snapshot_is_read(embedder, tmp_path, monkeypatch):
    cache = tmp_path / "models--someone--embedder"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / ("a" * 40)).symlink_to(embedder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    report = lord_tune.decompose("someone/embedder", str(tmp_path / "d"), method="svd", rank=4, backbone="int8")
    check_kept(tmp_path / "d", embedder)
    assert report["base"]["revision"] == "a" * 40


def test_a_git_lfs_pointer_is_not_a_module(tmp_path):
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(_MODULES))
    (tmp_path / "notes.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert companions_of(str(tmp_path)).left == ("notes.txt",)
    (tmp_path / "2_Dense" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="2_Dense/model.safetensors is a Git LFS pointer"):
        companions_of(str(tmp_path))
