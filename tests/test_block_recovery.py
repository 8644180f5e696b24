"""Block-wise recovery inside decompose: each block's L and R tuned to what the original block did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import ForkServer
from test_engine import assert_equal_decompositions, decompose_recorded, written
from tiny import LAYERS, code_document, read_tensors, save_tiny, tiny_family, tiny_tokenizer
from torch import Tensor

import lord_tune
from lord_tune.decomposition import recovery
from lord_tune.errors import LordError, UsageError
from lord_tune.factorizations import Factors
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.layers import PivotedLinear
from lord_tune.layers.factored_linear import build_layer
from lord_tune.plans import LayerPlan

TEXT = {"calibration_tokens": 2048, "context_length": 64}
PLAIN = {"kept_fraction": 0.6, "allocation": "uniform", **TEXT}
TUNED = PLAIN | {"recover_epochs": 3, "recover_learning_rate": 3e-3}
IDS = torch.tensor([tiny_tokenizer()(code_document(number))["input_ids"][:128] for number in range(60, 72)])


@pytest.fixture(scope="module")
def pair(llama_dir, rows_file, tmp_path_factory):
    """The same decomposition without and with recovery."""
    folder = tmp_path_factory.mktemp("recovery")
    return {
        name: decompose_recorded(llama_dir, folder / name, calibration=[str(rows_file)], **options)
        for name, options in (("plain", PLAIN), ("tuned", TUNED))
    }


def block_outputs(model: Any, windows: Tensor, index: int) -> Tensor:
    """(window, position, width) behind a block, in a plain forward pass."""
    found: list[Tensor] = []
    block = model.get_submodule(f"model.layers.{index}")
    handle = block.register_forward_hook(
        lambda module, args, output: found.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    handle.remove()
    return torch.cat(found).double()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_dense_or_factored(str(folder))(input_ids=IDS).logits.double()


def kl_to(wanted: Tensor, found: Tensor) -> float:
    return float(torch.nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True).mean())


def test_the_recorded_errors_are_those_of_whole_models_on_held_out_text(pair, llama_dir):
    """In front of the first block nothing is decomposed; behind the last one everything is, and tuned."""
    dense, plain, tuned = (
        load_dense_or_factored(str(f)) for f in (llama_dir, pair["plain"].folder, pair["tuned"].folder)
    )
    windows, recorded = pair["tuned"].windows["heldout"], pair["tuned"].report["recovery"]
    assert list(recorded) == [str(index) for index in range(LAYERS)]
    for index, key, model in ((0, "before", plain), (0, "after", tuned), (LAYERS - 1, "after", tuned)):
        error = relative_error(block_outputs(model, windows, index), block_outputs(dense, windows, index))
        assert recorded[str(index)][key] == pytest.approx(error, rel=1e-4)  # float32 states


def test_every_block_and_the_whole_model_come_nearer(pair, llama_dir):
    for entry in pair["tuned"].report["recovery"].values():
        assert entry["after"] < entry["before"] and 1 <= entry["epochs"] <= 3
    dense, plain, tuned = (logits(folder) for folder in (llama_dir, pair["plain"].folder, pair["tuned"].folder))
    assert kl_to(dense, tuned) < 0.9 * kl_to(dense, plain)
    assert pair["plain"].report["recovery"] == {}


def test_nothing_but_l_and_r_changes(pair):
    plain, tuned = (read_tensors(pair[name].folder) for name in ("plain", "tuned"))
    assert plain.keys() == tuned.keys()
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    factors = {name for name in plain if name.endswith((".left.rest.weight", ".right.weight"))}
    pivots = {name for name in plain if name.endswith(".left.rows")}  # which rows B holds may change
    assert factors <= changed <= factors | pivots
    assert all(plain[name].dtype == tuned[name].dtype for name in changed)
    manifests = [json.loads((pair[n].folder / "config.json").read_text()) for n in ("plain", "tuned")]
    assert manifests[0] == manifests[1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["gpt2", "bert", "qwen2", "gemma3"])
def test_other_families(family, rows_file, tmp_path):
    base = save_tiny(tiny_family(family), tmp_path / "base")
    report = lord_tune.decompose(str(base), str(tmp_path / "out"), calibration=[str(rows_file)], **TUNED)
    assert len(report["recovery"]) == LAYERS
    assert all(entry["after"] < entry["before"] for entry in report["recovery"].values())


STORES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # what is tuned beside a backbone, and in which dtype
    "bf16": ({"backbone": "nf4", "factor_format": "bf16"}, (".left.weight", ".right.weight")),
    "split": (
        {"backbone": "int3", "factor_format": "lloyd4", "top_rank": 4, "top_format": "fp16"},
        (".top_left.weight", ".top_right.weight"),
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("store", STORES)
def test_q_and_packed_components_stay_as_they_are(llama_dir, rows_file, tmp_path, store):
    options, names = STORES[store]
    given = {"rank": 12, "calibration": [str(rows_file)], **TEXT, **options}
    lord_tune.decompose(str(llama_dir), str(tmp_path / "plain"), **given)
    report = lord_tune.decompose(
        str(llama_dir), str(tmp_path / "tuned"), **given, recover_epochs=2, recover_learning_rate=1e-3
    )
    assert all(entry["after"] < entry["before"] for entry in report["recovery"].values())
    plain, tuned = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "tuned")
    first = ".layers.0."  # later blocks are factorized on dense inputs too, so all that differs is what was tuned
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert {name for name in changed if first in name} == {n for n in plain if first in n and n.endswith(names)}
    assert all(name.endswith(names) for name in changed)
    assert {tuned[name].dtype for name in changed} == {torch.bfloat16 if store == "bf16" else torch.float16}


def test_sequential_fits_the_factors_to_what_tuned_blocks_give(llama_dir, rows_file, tmp_path):
    sequential = {"propagate": "sequential", "rank": 12, "calibration": [str(rows_file)], **TEXT}
    plain = lord_tune.decompose(str(llama_dir), str(tmp_path / "plain"), **sequential)
    tuned = lord_tune.decompose(
        str(llama_dir), str(tmp_path / "tuned"), **sequential, recover_epochs=2, recover_learning_rate=3e-3
    )
    name = f"model.layers.{LAYERS - 1}.self_attn.q_proj"
    assert tuned["layers"][name]["error_calibrated"] != plain["layers"][name]["error_calibrated"]
    dense = load_dense_or_factored(str(llama_dir))
    errors = [
        relative_error(
            block_outputs(load_dense_or_factored(str(tmp_path / run)), IDS, LAYERS - 1),
            block_outputs(dense, IDS, LAYERS - 1),
        )
        for run in ("plain", "tuned")
    ]
    assert errors[1] < 0.95 * errors[0]


def test_what_does_not_help_on_held_out_text_is_not_kept(pair, llama_dir, rows_file, tmp_path, monkeypatch):
    """Here every pass seems to make it worse."""
    errors = iter(float(n) for n in range(100))
    monkeypatch.setattr(recovery, "_heldout_error", lambda *given: next(errors))
    report = lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), calibration=[str(rows_file)], **TUNED)
    assert all(entry["epochs"] == 0 and entry["after"] == entry["before"] for entry in report["recovery"].values())
    plain, kept = read_tensors(pair["plain"].folder), read_tensors(tmp_path / "out")
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pivoted_factors_are_tuned_as_l_and_r(dtype):
    """Open and stored again, in every step the same product; what was learnt is in the stored form."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    plan = LayerPlan(
        shape=(24, 16), rank=5, method="whitened", form="pivoted", left_format=name, right_format=name, bias=False
    )
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((24, 5), (5, 16)))
    layer = build_layer(plan, Factors(left, right), None, None, dtype)
    before = layer.dense_weight(torch.float64)
    pair = recovery._Pair(layer)
    trained = pair.open()
    assert [tuple(value.shape) for value in trained] == [(24, 5), (5, 16)]
    assert all(value.dtype == torch.float32 and value.requires_grad for value in trained)
    torch.testing.assert_close(layer.dense_weight(torch.float64), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    with torch.no_grad():
        trained[0].add_(0.5)
    wanted = layer.dense_weight(torch.float64)
    modules = pair.store()
    assert isinstance(modules[0], PivotedLinear) and modules[0].rest.weight.dtype == modules[1].weight.dtype == dtype
    error = (layer.dense_weight(torch.float64) - wanted).norm() / wanted.norm()
    assert float(error) < 4 * torch.finfo(dtype).eps  # of two rounded factors, entries of C up to 2
    pair.place(pair.stored)
    assert torch.equal(layer.dense_weight(torch.float64), before)


def test_divergence_is_an_error_and_writes_nothing(llama_dir, rows_file, tmp_path):
    with pytest.raises(LordError, match=r"diverged in block 0; lower `recover_learning_rate` \(1e\+38\)"):
        lord_tune.decompose(
            str(llama_dir),
            str(tmp_path / "out"),
            calibration=[str(rows_file)],
            **TUNED | {"recover_learning_rate": 1e38},
        )
    assert not (tmp_path / "out").exists()


def test_layers_left_dense_leave_nothing_to_tune(llama_dir, rows_file, tmp_path):
    report = lord_tune.decompose(
        str(llama_dir), str(tmp_path / "out"), calibration=[str(rows_file)], targets="layers.1.mlp", **TUNED
    )
    assert list(report["recovery"]) == ["1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "method": "svd", "recover_epochs": 1}, "`calibration` FILE"),
        ({"rank": 0, "backbone": "nf4", "recover_epochs": 1, "calibration": ["c"]}, "no L R that `recover_epochs`"),
        ({"rank": 8, "factor_format": "nf4", "recover_epochs": 1, "calibration": ["c"]}, "use bf16"),
        ({"rank": 8, "recover_learning_rate": 1e-3, "calibration": ["c"]}, "`recover_learning_rate` has no effect"),
    ],
)
def test_what_cannot_be_tuned_is_refused(llama_dir, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), **options)


# --- runs that die, and several processes ---


@pytest.fixture(scope="module")
def server():
    made = ForkServer()
    yield made
    made.close()


def words(base: Path, rows: Path, *more: str) -> list[str]:
    options = ["--kept-fraction", "0.6", "--allocation", "uniform", "--calibration-tokens", "512"]
    options += ["--context-length", "64", "--recover-epochs", "2", "--recover-learning-rate", "3e-3"]
    return ["decompose", str(base), "out", "--calibration", str(rows), *options, *more]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "moment",
    [
        ("line", "writing/1", "half"),
        ("rename", "model-00002-of-00004.safetensors", "half"),
        ("rename", "states-student-00001-0.bin", "before"),
    ],
    ids="-".join,
)
def test_a_killed_run_resumes_to_the_same_bytes(server, llama_dir, rows_file, tmp_path, processes, moment):
    assert server.run(tmp_path / "a", words(llama_dir, rows_file), processes=processes).codes == [0] * processes
    assert server.run(tmp_path / "b", words(llama_dir, rows_file), die=moment, processes=processes).killed
    ended = server.run(tmp_path / "b", words(llama_dir, rows_file, "--resume"), processes=processes)
    assert ended.codes == [0] * processes, ended.stderr[-2000:]
    assert written(tmp_path / "a" / "out") == written(tmp_path / "b" / "out")


def test_two_processes_average_their_windows(server, llama_dir, rows_file, tmp_path):
    """A step is one window of each, so the result is another one, from the same decomposition."""
    folders = {}
    for processes in (1, 2):
        ended = server.run(tmp_path / str(processes), words(llama_dir, rows_file), processes=processes)
        assert ended.codes == [0] * processes, ended.stderr[-2000:]
        folders[processes] = tmp_path / str(processes) / "out"
    reports = {n: json.loads((folder / "decomposition.json").read_text())["recovery"] for n, folder in folders.items()}
    for index, entry in reports[2].items():
        assert entry["after"] < entry["before"]
        if index == "0":
            assert entry["before"] == pytest.approx(reports[1]["0"]["before"], rel=1e-5)
    with pytest.raises(AssertionError):
        assert_equal_decompositions(folders[1], folders[2])
