"""Every wrong call and every broken file: one `error:` line that says what to do, the right exit code, nothing written.

A case is a function that prepares its input and returns the command line. The command runs in this process; everything
it may write to (the output folder, its siblings, the cache) is below `World.runs`, which must be unchanged afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import HIDDEN, INTERMEDIATE, code_document, read_tensors, save_tiny, tiny_llama
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import lord_tune
from lord_tune import decomposing
from lord_tune.cli import _show_warning, _with_flags, main
from lord_tune.errors import CheckpointError, LordError, LordWarning, UsageError
from lord_tune.integrations import sources

LAYER = "model.layers.1.mlp.up_proj"
UNFORESEEN = "rerun with --debug"  # the last resort of `main`; every failure below has a message of its own


@dataclass(frozen=True)
class World:
    """Good inputs to spoil, and the only place a command may write to."""

    llama: Path
    factored: Path  # LoRD at rank 8
    quantized: Path  # NF4 + L R at rank 4
    rows: Path
    tmp: Path

    @property
    def runs(self) -> Path:
        return self.tmp / "runs"

    @property
    def out(self) -> Path:
        return self.runs / "out"

    def copy(self) -> Path:
        """A copy of the dense model, to break."""
        return Path(shutil.copytree(self.llama, self.tmp / "broken"))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def decompose(self, *options: Any, model: Path | None = None, text: Path | None = None) -> list[str]:
        """A whitened decomposition of rank 8 unless `options` give a budget; short windows."""
        words = ["decompose", model or self.llama, self.out, "--calibration", text or self.rows]
        budget = (
            [] if {"--rank", "--average-rank", "--kept-fraction", "--bits-per-weight"} & set(options) else ["--rank", 8]
        )
        short = ["--context-length", 64, "--calibration-tokens", 512]
        return list(map(str, [*words, *budget, *short, *options]))

    def data_free(self, *options: Any, model: Path | None = None) -> list[str]:
        return list(map(str, ["decompose", model or self.llama, self.out, *options]))

    def train(self, *options: Any, model: Path | None = None, rows: Path | None = None) -> list[str]:
        words = ["train", "--model_name_or_path", model or self.factored, "--output_dir", self.out]
        words += ["--dataset_name", rows or self.rows, "--max_steps", 1, "--max_length", 32]
        return list(map(str, [*words, *options]))

    def evaluate(self, model: Path | None = None, text: Path | None = None) -> list[str]:
        words = ["evaluate", model or self.llama, "--text", text or self.rows, "--context-length", 64]
        return list(map(str, [*words, "--max-tokens", 128, "--json", self.runs / "result.json"]))

    def export(self, form: str, *options: Any, model: Path | None = None) -> list[str]:
        return list(map(str, ["export", model or self.factored, self.out, "--format", form, *options]))


@pytest.fixture(scope="module")
def checkpoints(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    lord_tune.decompose(str(llama_dir), str(folder / "lord"), method="svd", rank=8)
    lord_tune.decompose(str(llama_dir), str(folder / "nf4"), method="svd", rank=4, backbone="nf4")
    return folder / "lord", folder / "nf4"


@pytest.fixture
def world(llama_dir, rows_file, checkpoints, tmp_path, monkeypatch) -> World:
    made = World(llama_dir, *checkpoints, rows_file, tmp_path)
    made.runs.mkdir()
    monkeypatch.setenv("LORD_TUNE_CACHE", str(made.runs / "cache"))
    monkeypatch.chdir(made.runs)
    return made


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones too, with the bytes of the files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def run(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """(exit code, stderr) of a command."""
    capfd.readouterr()
    code: Any = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, capfd.readouterr().err


def check_failure(arguments: list[str], code: int, says: str, world: World, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(world.runs)
    came, stderr = run(arguments, capfd)
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in stderr
    assert len(errors) == 1, stderr
    assert lines[-1] == errors[0], f"the message goes on after its first line: {stderr}"
    assert says in errors[0]
    assert UNFORESEEN not in errors[0]
    assert came == code, errors[0]
    assert contents(world.runs) == before


Case = tuple[str, Callable[[World], list[str]], str]  # name, command, a distinctive part of what to do


def parametrized(cases: list[Case]) -> Any:
    return pytest.mark.parametrize(("command", "says"), [pytest.param(c, s, id=name) for name, c, s in cases])


# ---- wrong calls: exit code 2 --------------------------------------------------------------------------------------


def _yaml(content: str | bytes) -> Callable[[World], list[str]]:
    return lambda w: [*w.decompose(), "--config", str(w.file("run.yaml", content))]


def _train_yaml(w: World) -> list[str]:
    return [*w.train(), "--config", str(w.file("run.yaml", "learnin_rate: 1.0e-4\n"))]


def _occupied(*options: str) -> Callable[[World], list[str]]:
    def command(w: World) -> list[str]:
        w.out.mkdir()
        (w.out / "thesis.tex").write_text("years of work")
        return w.decompose(*options)

    return command


def _occupied_export(w: World) -> list[str]:
    w.out.mkdir()
    (w.out / "thesis.tex").write_text("years of work")
    return w.export("dense", "--overwrite")


def _occupied_training(w: World) -> list[str]:
    w.out.mkdir()
    (w.out / "thesis.tex").write_text("years of work")
    return w.train()


def _occupied_partial(w: World) -> list[str]:
    """Not even --overwrite removes what is not ours."""
    partial = w.runs / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    return w.decompose("--overwrite")


def _quantized(content: dict[str, Any]) -> None:
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[World], list[str]]:
    def command(w: World) -> list[str]:
        path = w.copy() / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return w.decompose(model=path.parent)

    return command


def _out_is_file(w: World) -> list[str]:
    w.out.write_text("a file")
    return w.decompose("--overwrite")


def _below_file(w: World) -> list[str]:
    (w.runs / "file").write_text("not a folder")
    return ["decompose", str(w.llama), str(w.runs / "file" / "out"), "--method", "svd", "--rank", "8"]


def _bad_rows(*rows: dict[str, Any]) -> Callable[[World], Path]:
    return lambda w: w.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


unknown_columns = _bad_rows({"body": "text", "title": "t"})
chat = _bad_rows({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})


def _no_rows(w: World) -> list[str]:
    import datasets

    path = w.tmp / "rows.parquet"
    datasets.Dataset.from_dict({"text": []}, features=datasets.Features({"text": datasets.Value("string")})).to_parquet(
        str(path)
    )
    return w.train(rows=path)


def _rank_zero(w: World) -> list[str]:
    folder = w.tmp / "rank0"
    lord_tune.decompose(str(w.llama), str(folder), method="svd", rank=0, backbone="nf4")
    return w.train(model=folder)


def _quantized_factors(w: World) -> list[str]:
    folder = w.tmp / "nf4_factors"
    lord_tune.decompose(str(w.llama), str(folder), method="svd", rank=8, factor_format="nf4")
    return w.train(model=folder)


def _components_apart(form: str = "fp16", *options: str) -> Callable[[World], list[str]]:
    def command(w: World) -> list[str]:
        folder, factors = w.tmp / "apart", {"factor_format": "lloyd2", "top_rank": 2, "top_format": form}
        lord_tune.decompose(str(w.llama), str(folder), method="svd", rank=8, targets="q_proj", **factors)
        return w.train(*options, model=folder)

    return command


def _bare_model(w: World) -> Path:
    return save_tiny(LlamaModel(tiny_llama().config), w.tmp / "bare")


def _not_a_model(w: World) -> Path:
    folder = w.tmp / "holidays"
    folder.mkdir()
    (folder / "photo.txt").write_text("the sea")
    return folder


def _split_of_file(w: World) -> list[str]:
    return w.train("--dataset_test_split", "test")


WRONG_CALLS: list[Case] = [
    # the config file
    ("unknown YAML key", _yaml("kept_fractoin: 0.9\n"), "did you mean 'kept_fraction'?"),
    ("config file missing", lambda w: [*w.decompose(), "--config", str(w.tmp / "no.yaml")], "check the path"),
    ("config file not YAML", _yaml("rank: [8\n"), "not valid YAML"),
    ("config file without keys", _yaml("- rank\n- 8\n"), "expected a YAML mapping (key: value)"),
    ("config file not UTF-8", _yaml(b"targets: caf\xe9\n"), "not valid YAML"),
    # options
    ("unknown option value", lambda w: w.decompose("--method", "whitend"), "'loftq', 'caldera' or 'tucker'"),
    ("unknown option", lambda w: w.decompose("--rnak", "8"), "--rank"),
    ("option not a number", lambda w: w.decompose("--rank", "eight"), "'--rank'"),
    ("unknown verb", lambda w: ["decompos", str(w.llama), str(w.out)], "Did you mean 'decompose'?"),
    ("out missing", lambda w: ["decompose", str(w.llama)], "OUT is missing; see lord-tune decompose --help"),
    ("training key missing", lambda w: ["train", "--output_dir", str(w.out)], "--model_name_or_path is missing"),
    (
        "an average rank above every side",
        lambda w: w.decompose("--backbone", "nf4", "--average-rank", 5000),
        "Rank 5000 exceeds the smaller side of every layer",
    ),
    (
        "neither budget",
        lambda w: w.data_free("--method", "svd"),
        "Expected one of --rank, --average-rank, --kept-fraction, --bits-per-weight, --max-bytes, --full-rank "
        "and --plan; got none.",
    ),
    (
        "both budgets",
        lambda w: w.decompose("--rank", 8, "--kept-fraction", 0.9),
        "got --rank and --kept-fraction.",
    ),
    (
        "bits and rank beside a backbone",
        lambda w: w.decompose("--rank", 8, "--bits-per-weight", 6, "--backbone", "nf4"),
        "got --rank and --bits-per-weight.",
    ),
    (
        "three budgets",
        lambda w: w.decompose("--rank", 8, "--bits-per-weight", 6, "--kept-fraction", 0.5),
        "got --rank and --kept-fraction and --bits-per-weight.",
    ),
    (
        "bits and kept fraction",
        lambda w: w.decompose("--bits-per-weight", 6, "--kept-fraction", 0.5),
        "got --kept-fraction and --bits-per-weight.",
    ),
    (
        "bits of 0",
        lambda w: w.decompose("--bits-per-weight", 0),
        "Got --bits-per-weight 0.0; expected a number above 0",
    ),
    ("bits not a number", lambda w: w.decompose("--bits-per-weight", "few"), "bits-per-weight"),
    (
        "too few bits for the backbone",
        lambda w: w.decompose("--bits-per-weight", 4, "--backbone", "nf4"),
        "nf4 alone takes 4.500 for 'model.layers.0.self_attn.q_proj'. Give more, or choose a backbone of fewer bits.",
    ),
    (
        "too few bits for any format",
        lambda w: w.decompose("--bits-per-weight", 3, "--factor-format", "fp16"),
        "the narrowest format, lloyd2, takes 5.621 with rank 8. Give at least that, a coarser factor_format",
    ),
    (
        "too few bits for the rank",
        lambda w: w.decompose("--bits-per-weight", 3, "--rank", 16, "--factor-format", "int4"),
        "with rank 16. Give at least that",
    ),
    (
        "components apart of whole factors",
        lambda w: w.decompose("--rank", 8, "--top-rank", 2),
        "--top-rank stores components finer than the others; it needs a low-precision --factor-format.",
    ),
    (
        "components apart of 16-bit factors",
        lambda w: w.decompose("--rank", 8, "--top-rank", 2, "--factor-format", "fp16"),
        "it needs a low-precision --factor-format",
    ),
    (
        "all components apart",
        lambda w: w.decompose("--rank", 8, "--top-rank", 8, "--factor-format", "int4"),
        "Got --top-rank 8 with --rank 8; expected fewer than all components.",
    ),
    (
        "components apart in a format without one",
        lambda w: w.decompose("--top-rank", 2, "--top-format", "int4", "--factor-format", "int4"),
        "'fp32', 'fp16', 'bf16' or 'int8'",
    ),
    (
        "format of components that are not apart",
        lambda w: w.decompose("--top-format", "int8", "--factor-format", "int4"),
        "--top-format has no effect",
    ),
    (
        "negative components apart",
        lambda w: w.decompose("--top-rank", -1, "--factor-format", "int4"),
        "Got -1 for --top-rank",
    ),
    (
        "gradients for no weighting",
        lambda w: w.decompose("--weighting", "fisher", "--backbone", "e8-2"),
        "--weighting has no effect",
    ),
    (
        "sensitivity without gradients",
        lambda w: w.decompose("--method", "caldera", "--backbone", "e8-2", "--sensitivity-tokens", 99),
        "--sensitivity-tokens has no effect",
    ),
    (
        "iterations without alternation",
        lambda w: w.decompose("--method", "caldera", "--backbone", "e8-2", "--rank", 0, "--iterations", 2),
        "--iterations has no effect",
    ),
    ("spqr option alone", lambda w: w.decompose("--backbone", "int3", "--spqr-bits", 4), "--spqr-bits has no effect"),
    ("spqr of 5 bits", lambda w: w.decompose("--backbone", "spqr", "--spqr-bits", 5), "Got 5 for --spqr-bits"),
    ("half of all outliers", lambda w: w.decompose("--backbone", "spqr", "--outliers", 0.5), "Got 0.5 for --outliers"),
    ("rotation of nothing", lambda w: w.decompose("--incoherence"), "--incoherence has no effect"),
    ("caldera alone", lambda w: w.decompose("--method", "caldera"), "pass --backbone nf4"),
    (
        "caldera without text",
        lambda w: w.data_free("--method", "caldera", "--rank", 8, "--backbone", "e8-2"),
        "pass --calibration FILE",
    ),
    ("kept fraction above 1", lambda w: w.decompose("--kept-fraction", 1.5), "Got --kept-fraction 1.5; expected"),
    ("kept fraction of 0", lambda w: w.decompose("--kept-fraction", 0), "a number between 0 and 1"),
    ("rank 0 alone", lambda w: w.decompose("--rank", 0), "needs a backbone"),
    ("negative rank", lambda w: w.decompose("--rank", -1, "--backbone", "nf4"), "a rank is at least 1"),
    ("option without effect", lambda w: w.decompose("--iterations", 3), "--iterations has no effect"),
    (
        "kept fraction beside NF4",
        lambda w: w.decompose("--kept-fraction", 0.05, "--backbone", "nf4"),
        "of the bytes. Allow more",
    ),
    ("loftq alone", lambda w: w.data_free("--method", "loftq", "--rank", 8), "pass --backbone nf4"),
    ("no calibration text", lambda w: w.data_free("--rank", 8), "pass --calibration FILE"),
    ("bad block size", lambda w: w.decompose("--backbone", "nf4", "--block-size", 48), "use one of 32, 64"),
    ("calibration tokens 0", lambda w: w.decompose("--calibration-tokens", 0), "Got 0 for --calibration-tokens"),
    ("negative sink weight", lambda w: w.decompose("--sink-weight", -1), "Got -1.0 for --sink-weight"),
    ("export format unknown", lambda w: w.export("onnx"), "'dense', 'factored', 'peft'"),
    ("export dtype without effect", lambda w: w.export("factored", "--dtype", "float16"), "--dtype has no effect"),
    ("unknown training key", lambda w: w.train("--learnin_rate", "1e-4"), "did you mean 'learning_rate'?"),
    ("unknown training key in YAML", _train_yaml, "did you mean 'learning_rate'?"),
    ("unknown own training key", lambda w: w.train("--lora_alpah", "16"), "did you mean 'lora_alpha'?"),
    ("training value of wrong type", lambda w: w.train("--learning_rate", "fast"), "learning_rate"),
    ("old dtype spelling", lambda w: w.train("--torch_dtype", "float32"), "write dtype"),
    ("lora_r for factors", lambda w: w.train("--lora_r", 8), "set mode: lora"),
    ("unknown mode", lambda w: w.train("--mode", "full"), "'factors', 'split', 'lora', 'scales' or 'basis'"),
    ("split without components apart", lambda w: w.train("--mode", "split"), "decompose with --top-rank"),
    ("components apart as factors", _components_apart(), "has its first 2 components stored apart; use mode: split"),
    ("components apart in int8", _components_apart("int8", "--mode", "split"), "stored as int8"),
    ("lora option for split", lambda w: w.train("--mode", "split", "--lora_r", 4), "no effect in mode: split"),
    (
        "decoding once what is not packed",
        lambda w: w.train("--dequantize_once"),
        "no quantized layers, so --dequantize-once has no effect; remove it",
    ),
    (
        "decoding once for a perplexity",
        lambda w: [*w.evaluate(), "--dequantize-once"],
        "no quantized layers, so --dequantize-once has no effect",
    ),
    ("training word alone", lambda w: ["train", "stray", *w.train()[1:]], "write --key value"),
    # what the model allows
    (
        "rank above break-even",
        lambda w: w.decompose("--rank", 64),
        "its factors would hold more numbers than W. Choose at most 63, or add a backbone, for example nf4",
    ),
    ("rank above every side", lambda w: w.decompose("--rank", 70, "--backbone", "nf4"), "smaller side"),
    ("kept fraction too small", lambda w: w.decompose("--kept-fraction", 0.05), "Allow more"),
    ("no layer matches", lambda w: w.decompose("--targets", "nosuchlayer"), "are named like model.layers.0"),
    ("all excluded", lambda w: w.decompose("--exclude", "."), "No layer matches"),
    ("bad targets", lambda w: w.decompose("--targets", "q_proj["), "not a regular expression"),
    ("bad exclude", lambda w: w.decompose("--exclude", "*"), "not a regular expression"),
    ("bad training targets", lambda w: w.train("--targets", "("), "not a regular expression"),
    ("no layer to train", lambda w: w.train("--targets", "nosuchlayer"), "they are named like model.layers.0"),
    ("decomposed already", lambda w: w.decompose(model=w.factored), "start from the original dense model"),
    ("training a dense model", lambda w: w.train(model=w.llama), "run `lord-tune decompose` first"),
    ("training rank 0", _rank_zero, "Decompose it with --rank 16"),
    ("training NF4 factors", _quantized_factors, "use mode: lora"),
    ("exporting a dense model", lambda w: w.export("dense", model=w.llama), "ordinary checkpoint already"),
    ("peft of LoRD", lambda w: w.export("peft"), "Export with --format factored or dense"),
    ("evaluating a bare model", lambda w: w.evaluate(model=_bare_model(w)), "no language-model head"),
    ("inspecting a dense model", lambda w: ["inspect", str(w.llama)], "run lord-tune decompose first"),
    # files and folders
    ("model missing", lambda w: w.decompose(model=w.tmp / "nowhere"), "check the path"),
    ("model missing, evaluate", lambda w: w.evaluate(model=w.tmp / "nowhere"), "check the path"),
    ("model missing, train", lambda w: w.train(model=w.tmp / "nowhere"), "check the path"),
    ("model missing, export", lambda w: w.export("dense", model=w.tmp / "nowhere"), "check the path"),
    ("model missing, inspect", lambda w: ["inspect", str(w.tmp / "nowhere")], "does not exist; pass one that"),
    ("gguf missing", lambda w: w.decompose(model=w.tmp / "nowhere.gguf"), "check the path"),
    ("model is a file", lambda w: w.decompose(model=w.rows), "expected a model folder, a .gguf file or a Hub id"),
    ("not a model, evaluate", lambda w: w.evaluate(model=_not_a_model(w)), "not a Hugging Face model folder"),
    ("not a model, inspect", lambda w: ["inspect", str(_not_a_model(w))], "pass a factored checkpoint"),
    ("calibration file missing", lambda w: w.decompose(text=w.tmp / "no.txt"), "check the path"),
    ("calibration rows missing", lambda w: w.decompose(text=w.tmp / "no.jsonl"), "check the path"),
    ("evaluation text missing", lambda w: w.evaluate(text=w.tmp / "no.txt"), "check the path"),
    ("export text missing", lambda w: w.export("dense", "--text", w.tmp / "no.txt"), "check the path"),
    ("dataset missing", lambda w: w.train(rows=w.tmp / "no.jsonl"), "check the path"),
    ("calibration not UTF-8", lambda w: w.decompose(text=w.file("a.txt", b"caf\xe9 " * 99)), "not UTF-8"),
    ("evaluation text not UTF-8", lambda w: w.evaluate(text=w.file("a.txt", b"caf\xe9 " * 99)), "not UTF-8"),
    ("evaluation text empty", lambda w: w.evaluate(text=w.file("a.txt", "")), "give files with text in them"),
    ("calibration a folder", lambda w: w.decompose(text=w.llama), "give its files"),
    ("calibration not Parquet", lambda w: w.decompose(text=w.file("a.parquet", b"PAR1" + bytes(99))), "not be read"),
    ("calibration dataset with a dot offline", lambda w: w.decompose(text=Path("nobody/data.v1")), "nobody/data.v1"),
    ("quantized already", _config(_quantized), "is quantized (bitsandbytes); start from the original dense model"),
    ("partial folder of others", _occupied_partial, "move it away"),
    ("calibration text empty", lambda w: w.decompose(text=w.file("a.txt", "")), "give files with text in them"),
    ("calibration rows blank", lambda w: w.decompose(text=_bad_rows({"text": " \n"})(w)), "row 1: 'text' is blank"),
    ("calibration on chat", lambda w: w.decompose(text=chat(w)), "give plain text"),
    ("dataset of other columns", lambda w: w.train(rows=unknown_columns(w)), "Rename the columns"),
    ("calibration of other columns", lambda w: w.decompose(text=unknown_columns(w)), "Rename the columns"),
    ("dataset without rows", _no_rows, "give rows"),
    ("dataset of no bytes", lambda w: w.train(rows=w.file("a.jsonl", "")), "give rows"),
    ("dataset of an empty list", lambda w: w.train(rows=w.file("a.json", "[]")), "give rows"),
    ("dataset not JSON", lambda w: w.train(rows=w.file("a.jsonl", "not json\n")), "line 1 is not JSON"),
    ("dataset a picture", lambda w: w.train(rows=w.file("a.png", b"\x89PNG\0")), "is not UTF-8 text"),
    ("training on chat", lambda w: w.train(rows=chat(w)), "no chat template; give plain text"),
    ("split of a plain file", _split_of_file, "test"),
    ("configuration of a plain file", lambda w: w.train("--dataset_config", "python"), "dataset_config"),
    ("out holds other files", _occupied(), "choose an empty folder or pass --overwrite"),
    ("out holds other files, overwrite", _occupied("--overwrite"), "--overwrite will not replace it"),
    ("export over other files", _occupied_export, "--overwrite will not replace it"),
    ("out is a file", _out_is_file, "Choose another output"),
    ("out below a file", _below_file, "expected a folder to write out into"),
    ("result is a folder", lambda w: [*w.evaluate(), "--json", str(w.tmp)], "--json"),
    ("training over other files", _occupied_training, "choose another output_dir"),
]


@parametrized(WRONG_CALLS)
def test_wrong_call(command, says, world, capfd):
    check_failure(command(world), 2, says, world, capfd)


# ---- failed work: exit code 1 --------------------------------------------------------------------------------------


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = read_tensors(folder)
    change(state)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _nan_embedding(w: World) -> list[str]:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.embed_tokens.weight"][:, 0] = torch.nan  # no layer that is decomposed

    return w.decompose(model=_weights(w.copy(), spoil))


def _overflowing_activations(w: World) -> list[str]:
    def spoil(state: dict[str, torch.Tensor]) -> None:  # finite weights whose product overflows float32
        for name in ("gate_proj", "up_proj"):
            state[f"model.layers.0.mlp.{name}.weight"] *= 1e30

    return w.decompose(model=_weights(w.copy(), spoil))


def _absent_tensor(w: World) -> list[str]:
    """transformers would fill it with random numbers and only log a table."""
    return w.decompose(model=_weights(w.copy(), lambda state: state.pop(f"{LAYER}.weight")))


def _absent_factor(w: World) -> list[str]:
    folder = Path(shutil.copytree(w.factored, w.tmp / "broken"))
    return w.evaluate(model=_weights(folder, lambda state: state.pop(f"{LAYER}.right.weight")))


def _truncated(w: World) -> list[str]:
    path = w.copy() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return w.decompose(model=path.parent)


def _corrupt_header(w: World) -> list[str]:
    path = w.copy() / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    return w.decompose(model=path.parent)


def _sharded(w: World) -> Path:
    folder = w.tmp / "sharded"
    save_tiny(tiny_llama(), folder)
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def _missing_shard(w: World) -> list[str]:
    folder = _sharded(w)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    return w.decompose(model=folder)


def _truncated_shard(w: World) -> list[str]:
    path = sorted(_sharded(w).glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    return w.decompose(model=path.parent)


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[World], list[str]]:
    """The checkpoint with one weight deep in it replaced."""

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[f"{LAYER}.weight"] = change(state[f"{LAYER}.weight"]).contiguous()

    return lambda w: w.decompose(model=_weights(w.copy(), spoil))


def _no_weights(w: World) -> list[str]:
    folder = w.copy()
    (folder / "model.safetensors").unlink()
    return w.decompose(model=folder)


def _no_tokenizer(w: World) -> list[str]:
    folder = w.copy()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return w.decompose(model=folder)


def _pointer(name: str) -> Callable[[World], list[str]]:
    """What a clone without Git LFS holds in place of a file."""

    def command(w: World) -> list[str]:
        folder = w.copy()
        if name.endswith(".bin"):
            (folder / "model.safetensors").unlink()
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4665f3\nsize 538090408\n"
        (folder / name).write_text(pointer)
        return w.evaluate(model=folder / name) if name.endswith(".gguf") else w.decompose(model=folder)

    return command


def _broken_config(w: World) -> list[str]:
    folder = w.copy()
    (folder / "config.json").write_text("{not json")
    return w.decompose(model=folder)


def _newer_format(w: World) -> list[str]:
    folder = Path(shutil.copytree(w.factored, w.tmp / "broken"))
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["format_version"] = 999
    (folder / "config.json").write_text(json.dumps(content))
    return w.evaluate(model=folder)


def _adapter_without_weights(w: World) -> list[str]:
    folder = w.tmp / "adapter"
    folder.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(w.factored), "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return w.evaluate(model=folder)


FAILED_WORK: list[Case] = [
    ("NaN in an embedding", _nan_embedding, "model.embed_tokens"),
    ("Inf activations", _overflowing_activations, "run the model in float32"),
    ("tensor absent", _absent_tensor, LAYER),
    ("factor absent", _absent_factor, LAYER),
    ("truncated weights", _truncated, "download or write it again"),
    ("corrupt header", _corrupt_header, "download or write it again"),
    ("missing shard", _missing_shard, "download it again"),
    ("truncated shard", _truncated_shard, "model-00002"),
    ("tensor of another shape", _tensor(lambda t: t[:100]), f"'{LAYER}.weight' is (100, 64)"),
    ("integer weights", _tensor(lambda t: (100 * t).to(torch.int8)), f"'{LAYER}.weight' holds I8"),
    ("no weights", _no_weights, "broken"),
    ("LFS pointer", _pointer("model.safetensors"), "model.safetensors is a Git LFS pointer"),
    ("LFS pointer, .bin", _pointer("pytorch_model.bin"), "pytorch_model.bin is a Git LFS pointer"),
    ("LFS pointer, tokenizer", _pointer("tokenizer.json"), "tokenizer.json is a Git LFS pointer"),
    ("LFS pointer, .gguf", _pointer("model.gguf"), "run `git lfs pull` in its folder"),
    ("no tokenizer", _no_tokenizer, "no usable tokenizer"),
    ("config of another size", _config(lambda c: c.update(intermediate_size=96)), "could not be loaded"),
    ("config not JSON", _broken_config, "could not be loaded"),
    ("newer format", _newer_format, "update lord_tune"),
    ("adapter without weights", _adapter_without_weights, "could not be read"),
    ("garbage gguf", lambda w: w.decompose(model=w.file("model.gguf", b"GGUF" + bytes(999))), "could not be read as"),
    ("text named gguf", lambda w: w.evaluate(model=w.file("model.gguf", "no model")), "could not be read as GGUF"),
    ("unknown Hub id offline", lambda w: w.decompose(model=Path("nobody/nothing")), "nobody/nothing"),
    ("calibration too short", lambda w: w.decompose(text=w.file("a.txt", "x = 1\n" * 9)), "smaller --context-length"),
    (
        "every layer stays dense",
        lambda w: w.decompose("--kept-fraction", 0.1, "--allocation", "uniform"),
        "choose another budget",
    ),
    ("written differs", lambda w: w.export("dense", "--dtype", "bfloat16", "--threshold", 0), "raise --threshold"),
]


@parametrized(FAILED_WORK)
def test_failed_work(command, says, world, capfd):
    check_failure(command(world), 1, says, world, capfd)


def test_diverged_training_keeps_no_adapter(world, capfd):
    """transformers' Trainer logs a NaN loss as 0, so the weights must be looked at."""
    words = world.train("--max_steps", 3, "--learning_rate", "1e30", "--warmup_steps", 0, "--max_grad_norm", 0)
    code, stderr = run(words, capfd)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and "learning_rate" in errors[0]
    assert not (world.out / "adapter_model.safetensors").exists()


# ---- interrupted writing -------------------------------------------------------------------------------------------


def _write_and_fail(error: BaseException) -> Callable[..., None]:
    def write(folder: Path, *rest: Any) -> None:
        (folder / "config.json").write_text("half of it")
        raise error

    return write


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "config.json"), 1, "check permissions and disk space"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero\nsecond line"), 1, "rerun with --debug for the traceback"),
    ],
    ids=["disk full", "Ctrl-C", "defect"],
)
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an earlier run"])
def test_failed_writing_leaves_what_was_there_and_can_be_resumed(error, code, says, earlier, world, capfd, monkeypatch):
    if earlier:
        lord_tune.decompose(str(world.llama), str(world.out), method="svd", rank=4)
    before = contents(world.runs)
    command = world.data_free("--method", "svd", "--rank", 8, "--overwrite")
    with monkeypatch.context() as patched:
        patched.setattr(decomposing, "write_index", _write_and_fail(error))
        came, stderr = run(command, capfd)
    assert came == code
    assert says in stderr.splitlines()[-1] and "Traceback" not in stderr
    partial = world.out.with_name(world.out.name + ".partial")
    assert f"is kept in {partial}; continue with the same command and --resume" in stderr
    shards = {path.name for path in partial.glob("*.safetensors")}
    assert len(shards) == 4  # three blocks and the rest
    assert {k: v for k, v in contents(world.runs).items() if partial.name not in str(k)} == before
    came, stderr = run([*command, "--resume"], capfd)
    assert came == 0 and "3 blocks are written" in stderr and not partial.exists()
    assert {path.name for path in world.out.glob("*.safetensors")} == shards and not (world.out / ".work").exists()
    lord_tune.load(str(world.out))


def test_python_is_told_keys_and_the_command_line_flags(world, capfd):
    options = {"calibration": [str(world.file("a.txt", "x = 1\n" * 9))], "rank": 8}
    with pytest.raises(LordError, match="smaller `context_length`"):
        lord_tune.decompose(str(world.llama), str(world.out), **options)
    assert "smaller --context-length" in run(world.decompose(text=world.tmp / "a.txt"), capfd)[1]
    assert _with_flags("`lora_r` of `the model` by `train`") == "--lora_r of `the model` by `train`"
    _show_warning("see `max_tokens`", LordWarning, __file__, 1)
    assert capfd.readouterr().err == "warning: see --max-tokens\n"


def test_debug_shows_the_error_itself(world):
    with pytest.raises(UsageError, match="check the path"):
        main([*world.decompose(model=world.tmp / "nowhere"), "--debug"])


def test_warnings_are_one_line_each(world, capfd):
    """Text for fewer windows than asked for is a warning, and the run goes on."""
    text = world.file("a.txt", code_document(1))
    code, stderr = run([*world.decompose(text=text), "--targets", "mlp"], capfd)
    warned = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    assert code == 0 and len(warned) == 1 and "windows of 64 tokens" in warned[0]
    assert (world.out / "decomposition.json").is_file()


# ---- faults in the middle of a run: what is finished is kept, and --resume finishes it -------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """The weights and what describes them; the record and the card also hold times."""
    kept = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".json") and p.name != "decomposition.json"]
    return {path.name: path.read_bytes() for path in kept}


def errors_of(stderr: str) -> list[str]:
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["NaN", "Inf"])
@pytest.mark.parametrize("budget", [("--rank", 8), ("--kept-fraction", 0.8)], ids=["known ranks", "chosen ranks"])
def test_a_broken_weight_deep_in_the_model_is_named_before_any_block_is_done(value, budget, world, capfd):
    """The forward pass that every run is compared with reads every weight."""

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[f"{LAYER}.weight"][3, 5] = value

    code, stderr = run(world.decompose(*budget, model=_weights(world.copy(), spoil)), capfd)
    (error,) = errors_of(stderr)
    assert code == 1 and f"'{LAYER}.weight' holds 1 NaN or Inf values; repair the checkpoint" in error
    assert "what is finished is kept" not in stderr and not [*world.runs.iterdir()]


def test_a_float64_tensor_is_cast_to_compute_and_kept_as_stored_where_untouched(world, capfd):
    """One tensor of another precision is no reason to refuse a model, nor to round what is not decomposed."""
    norm = "model.layers.1.input_layernorm.weight"

    def widen(state: dict[str, torch.Tensor]) -> None:
        state[norm], state[f"{LAYER}.weight"] = state[norm].double() + 1e-12, state[f"{LAYER}.weight"].double()

    model = _weights(world.copy(), widen)
    code, _ = run(world.decompose(model=model), capfd)
    written = read_tensors(world.out)
    assert code == 0 and torch.equal(written[norm], read_tensors(model)[norm]) and written[norm].dtype == torch.float64
    assert written[f"{LAYER}.right.weight"].dtype == torch.float32


def test_a_dataset_id_may_hold_a_dot(world, capfd, monkeypatch):
    asked = []

    def load(name: str, *rest: Any, **more: Any) -> datasets.Dataset:
        asked.append(name)
        return datasets.Dataset.from_dict({"text": [code_document(n) for n in range(12)]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    code, _ = run(world.decompose("--targets", "q_proj", text=Path("org/data.v1")), capfd)
    assert code == 0 and asked == ["org/data.v1"]
    code, stderr = run(world.decompose("--overwrite", text=Path("org/missing.txt")), capfd)
    assert code == 2 and "The text file org/missing.txt does not exist" in stderr and len(asked) == 1


def test_a_missing_model_folder_is_told_from_a_hub_id_without_asking(world, capfd, monkeypatch):
    monkeypatch.chdir(world.runs.parent)
    monkeypatch.setattr(sources, "_check_hub", lambda name: pytest.fail(f"the Hub was asked for {name}"))
    code, stderr = run(["evaluate", f"{world.runs.name}/nothing", "--text", str(world.rows)], capfd)
    assert code == 2 and "nothing does not exist" in stderr


def test_a_hub_id_without_network_is_not_asked_for_again_and_again(monkeypatch):
    def unreachable(*address: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources.socket, "getaddrinfo", unreachable)
    for key in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(CheckpointError, match="nobody/nothing was not found.* cannot be reached"):
        sources.resolve_model("nobody/nothing")


class Unrolled(PreTrainedModel):
    """A causal model of two different layers: no list of blocks to walk."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)
        self.head = nn.Linear(HIDDEN, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, **rest: Any) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        return CausalLMOutput(logits=self.head(hidden + self.down(torch.relu(self.up(hidden)))))


FISHER = ("--rank", 8, "--method", "caldera", "--weighting", "fisher", "--backbone", "lloyd2", "--iterations", 1)


@pytest.mark.parametrize(
    "budget", [("--rank", 8), ("--kept-fraction", 0.8), FISHER], ids=["known ranks", "chosen ranks", "fisher"]
)
def test_a_model_without_blocks_is_run_whole_with_a_warning(budget, world, capfd, monkeypatch):
    monkeypatch.setattr(transformers, "Unrolled", Unrolled, raising=False)
    torch.manual_seed(0)
    model = save_tiny(Unrolled(tiny_llama().config), world.tmp / "unrolled")
    code, stderr = run(world.decompose(*budget, model=model), capfd)
    assert code == 0, stderr
    warned = [line for line in stderr.splitlines() if line.startswith("warning: ") and "no list of blocks" in line]
    assert len(warned) == 1
    layers = json.loads((world.out / "decomposition.json").read_text())["layers"]
    # the text has about 48 different tokens, whose embeddings rank 48 reproduces
    assert set(layers) == {"up", "down"} and all(0 <= entry["error_calibrated"] < 1 for entry in layers.values())
    assert lord_tune.load(str(world.out))[0](torch.arange(9)[None]).logits.isfinite().all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root: " + mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """A file that leaves `free` bytes."""
    space = os.statvfs(folder)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - free))
    return ballast


@pytest.mark.parametrize(
    ("free", "budget", "what"),
    [
        # 16 windows of 64 x 64 float32 are 262 kB of hidden states in front of a block, those of two blocks coexist
        (200_000, ("--rank", 8, "--calibration-tokens", 1024), "states-writing"),
        # no text, so no states: a block's shard is 53 kB, and the third does not fit beside two lines of the journal
        (150_000, ("--method", "svd", "--rank", 12), "model-00003"),
        # one window in each of three streams is 98 kB of states; the forward pass that they are compared with, one more
        # window of states and logits, is 142 kB; bases and curves of a block are 140 kB
        (
            345_000,
            ("--kept-fraction", 0.8, "--method", "whitened", "--targets", "layers.0", "--calibration-tokens", 64),
            "analysis-00000",
        ),
    ],
    ids=["hidden states", "shard", "analysis"],
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_space(
    free, budget, what, world, small_disk, capfd, monkeypatch
):
    """The disk is filled by somebody else while the run goes on: before it began there was space."""
    monkeypatch.setattr(decomposing, "check_space", lambda *asked: None)

    def command(out: Path) -> list[str]:
        words = ["decompose", world.llama, out, "--context-length", 64, "--calibration", world.rows, *budget]
        if "svd" in budget:
            words = ["decompose", world.llama, out, *budget]
        return list(map(str, words))

    assert run(command(world.out), capfd)[0] == 0
    ballast = fill(small_disk, free)
    code, stderr = run(command(small_disk / "out"), capfd)
    (error,) = errors_of(stderr)
    assert code == 1 and "disk space" in error and what in error, stderr
    assert not (small_disk / "out").exists()
    assert not [path for path in small_disk.rglob("*") if path.name.endswith(".partial") and path.is_file()]
    ballast.unlink()
    code, stderr = run([*command(small_disk / "out"), "--resume"], capfd)
    assert code == 0, stderr
    assert files_of(small_disk / "out") == files_of(world.out)


def test_ctrl_c_ends_with_130_and_one_line_and_the_run_can_be_resumed(world, capfd):
    """A real signal to a real process, in the middle of its blocks."""
    command = world.decompose("--shrinkage", "auto")
    assert run(command, capfd)[0] == 0
    whole = files_of(world.out)
    shutil.rmtree(world.out)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lord_tune.__file__).parent.parent)}
    # the real command line, which pauses after each block: on a busy machine the signal would come after the end
    paused = (
        "import signal, sys, time; from lord_tune.cli import main; from lord_tune.console import LiveTable; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs ignore it
        "show = LiveTable.status; LiveTable.status = lambda *call: (show(*call), time.sleep(20)); main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", paused, *command], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seen = []
    for line in process.stderr:  # until the first block is written
        seen.append(line)
        if "writing: block 1/3" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    code = process.wait(60)
    lines = rest.splitlines()
    assert code == 130, rest
    assert "Traceback" not in rest and lines[-1] == "interrupted"
    partial = world.runs / "out.partial"
    assert lines[-2] == f"what is finished is kept in {partial}; continue with the same command and --resume"
    code, stderr = run([*command, "--resume"], capfd)
    assert code == 0 and "continuing the run" in stderr
    assert files_of(world.out) == whole
