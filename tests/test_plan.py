"""`lord-tune plan`: what it foresees from config.json alone is what `decompose` then does, writes and needs.

Sizes and ranks are equal to the byte; the peak memory, measured in processes of their own, is within a quarter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import ARCHITECTURES, DECOMPOSE, ROOT, recipe_id
from tiny import code_document, save_tiny, tiny_bert, tiny_family, tiny_gpt2, tiny_llama, write_code_rows
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lord_tune
from lord_tune import commands, decomposing
from lord_tune.cli import main
from lord_tune.decomposition import Rates, TextSize
from lord_tune.layers import FactoredLinear
from lord_tune.plans import LayerPlan
from lord_tune.yaml_files import load_yaml

SHORT = {"context_length": 64, "calibration_tokens": 512}


def tiny_mixtral() -> MixtralForCausalLM:
    """Four experts behind a router."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **ids, max_position_embeddings=256))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "mixtral": tiny_mixtral,
}
BUDGETS: dict[str, dict[str, Any]] = {
    "nf4": {"rank": 8, "backbone": "nf4"},
    "nf4, double quantized": {"rank": 8, "backbone": "nf4", "double_quant": True},
    "bf16 factors": {"rank": 8, "factor_format": "bf16"},
    "nf4 factors": {"rank": 8, "factor_format": "nf4"},
    "some layers dense": {"rank": 24},
    "uniform": {"kept_fraction": 0.8, "allocation": "uniform"},
    "loss weighted": {"kept_fraction": 0.8},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    "spqr": {"rank": 8, "backbone": "spqr", "outliers": 0.03, "factor_format": "spqr", "spqr_bits": 4},
    "components apart": {"rank": 8, "backbone": "int4", "factor_format": "lloyd3", "top_rank": 3},
    "components apart in int8": {"rank": 6, "factor_format": "e8-2", "top_rank": 2, "top_format": "int8"},
    "as many apart as there are": {"rank": 3, "factor_format": "int3", "top_rank": 2, "top_format": "bf16"},
    "caldera": {"rank": 8, "backbone": "e8-3", "method": "caldera", "iterations": 1, "factor_format": "lloyd4"},
    "bits": {"bits_per_weight": 7.0, "backbone": "lloyd3", "factor_format": "int4"},
    "bits, format chosen": {"bits_per_weight": 9.0, "factor_format": "fp16"},
    "bits and rank": {"bits_per_weight": 6.0, "rank": 4, "factor_format": "lloyd2", "top_rank": 1},
}
BUDGETS |= QUANTIZED


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """family -> (the model's folder, a folder with its config.json alone), saved once."""
    folder = tmp_path_factory.mktemp("families")

    def get(name: str) -> tuple[Path, Path]:
        whole, bare = folder / name, folder / f"{name}_config"
        if not whole.exists():
            save_tiny(FAMILIES[name](), whole)
            bare.mkdir()
            shutil.copy(whole / "config.json", bare)
        return whole, bare

    return get


@pytest.fixture
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "measure", lambda *probe: Rates(1e10, 1e10, 1e10, 1e10))


@pytest.mark.parametrize(
    ("tokens", "length", "weighted"),
    [(512, 64, 4096), (512, 64, 100), (1025, 64, 640), (1040, 48, 1), (10, 64, 256), (1500, 100, 4096)],
)
def test_the_foreseen_text_is_what_is_read(tokens, length, weighted, models, tmp_path, monkeypatch):
    """Windows to calibrate on, held out and of the backward pass, where there is text enough."""
    seen = []

    def estimate_of(*given: Any) -> Any:
        seen.extend(value for value in given if isinstance(value, TextSize))
        raise StopIteration

    for module in (commands, decomposing):
        monkeypatch.setattr(module, "estimate_of", estimate_of)
    whole, _ = models("llama")
    options = {"calibration_tokens": tokens, "context_length": length, "sensitivity_tokens": weighted}
    options |= {"kept_fraction": 0.8, "calibration": [str(write_code_rows(tmp_path / "rows.jsonl"))]}
    for verb, names in ((lord_tune.plan, [whole]), (lord_tune.decompose, [whole, tmp_path / "out"])):
        with pytest.raises(StopIteration):
            verb(*map(str, names), **options)
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0].heldout > 0


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("family", "budget"),
    [(f, b) for f in FAMILIES for b in BUDGETS if f == "llama" or b not in QUANTIZED]
    + [("gpt2", "bits, format chosen"), ("bert", "components apart")],
)
def test_sizes_and_ranks_are_those_that_decompose_writes(family, budget, models, rows_file, tmp_path, fixed_rates):
    whole, bare = models(family)
    assert [path.name for path in bare.iterdir()] == ["config.json"]
    options = BUDGETS[budget] | SHORT
    plan = lord_tune.plan(str(bare), json=str(tmp_path / "plan.json"), **options)
    report = lord_tune.decompose(str(whole), str(tmp_path / "out"), calibration=[str(rows_file)], **options)
    totals = report["totals"]
    assert plan["parameters"] == totals["parameters_before"]
    assert plan["linear_parameters"] == totals["linear_parameters"]
    assert plan["layers"] == totals["layers"] and plan["model_bytes"] == totals["model_bytes_before"]
    if budget == "loss weighted":  # the text decides
        assert plan["ranks"] is plan["model_bytes_after"] is plan["linear_bits_per_weight"] is None
        return
    ranks = {name: "dense" if rank is None else rank for name, rank in plan["ranks"].items()}
    assert ranks == {name: entry["rank"] for name, entry in report["layers"].items()}
    assert plan["model_bytes_after"] == totals["model_bytes"]
    assert plan["linear_bits_per_weight"] == pytest.approx(totals["linear_bits_per_weight"], rel=1e-12)


# ---- bits per weight -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3.0, 4.0, 6.5])
@pytest.mark.parametrize(
    "stored",
    [
        {"factor_format": "fp16"},
        {"factor_format": "lloyd4", "incoherence": False},
        {"factor_format": "e8-2", "top_rank": 4, "top_format": "fp16"},
    ],
    ids=["fp16", "lloyd4", "e8-2 with 4 apart"],
)
def test_the_rank_is_the_largest_that_fits(stored, bits, random_llamas, fixed_rates):
    """Stored bits are recounted from the plans of the layers; one more step of 8 exceeds them or the matrix."""
    model = random_llamas("small")
    options = stored | {"backbone": "e8-2"}
    found = lord_tune.plan(str(model), bits_per_weight=bits, **options, **SHORT)
    assert set(found["ranks"]) and found["linear_bits_per_weight"] <= bits
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig.from_pretrained(model))
    checked = {}
    for name, rank in found["ranks"].items():
        shape = tuple(skeleton.get_submodule(name).weight.shape)
        if shape in checked:
            assert checked[shape] == rank
            continue
        checked[shape] = rank
        assert rank % 8 == 0 and bits_of(shape, rank, **options) <= bits
        assert rank + 8 > min(shape) or bits_of(shape, rank + 8, **options) > bits
    assert len(checked) == 3


def bits_of(shape: tuple[int, int], rank: int, backbone: str, factor_format: str, **options: Any) -> float:
    """Bytes of the parameters of a layer that is built, times 8, per weight."""
    forms = {"incoherence": options.get("incoherence", True), "seed": 0}
    forms = forms if forms["incoherence"] else {}
    top = min(options.get("top_rank", 0), max(rank - 1, 0))
    plan = LayerPlan(
        shape, rank, "whitened", backbone, forms if backbone.startswith("e8") else {}, factor_format, factor_format,
        {} if factor_format == "fp16" else forms, top, options.get("top_format", "fp32"),
    )  # fmt: skip
    layer = FactoredLinear(plan, device="meta")
    return 8 * sum(p.numel() * p.element_size() for p in layer.parameters()) / (shape[0] * shape[1])


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("method", "bits", "rank", "chosen"),
    [
        ("whitened", 3.0, None, "lloyd2"),
        ("whitened", 4.0, None, "lloyd3"),
        ("whitened", 5.0, None, "lloyd4"),
        ("whitened", 9.5, None, "int8"),
        ("whitened", 7.0, 64, "lloyd2"),  # rank 64 takes 4 bits of a 512 x 512 layer at 16 bits
        ("caldera", 3.0, None, "e8-2"),
        ("caldera", 5.0, None, "e8-4"),
        ("caldera", 5.0, 0, "e8-4"),
    ],
)
def test_the_format_is_the_widest_that_leaves_the_rank(method, bits, rank, chosen, random_llamas, fixed_rates, capfd):
    model = random_llamas("small")
    given = {} if rank is None else {"rank": rank}
    common = {"method": method, "factor_format": "fp16", "targets": "q_proj"} | SHORT  # layers of one shape
    options = {"bits_per_weight": bits} | common | given
    found = lord_tune.plan(str(model), **options)
    assert f"{chosen} + L R" in " ".join(capfd.readouterr().out.split())
    least = 8 if rank is None else rank
    ranks = set(found["ranks"].values())
    assert min(ranks) >= least and (rank is None or ranks == {rank}) and found["linear_bits_per_weight"] <= bits
    order = ["e8-2", "e8-3", "e8-4", "int8"] if method == "caldera" else ["lloyd2", "lloyd3", "lloyd4", "int8"]
    wider = order[order.index(chosen) + 1 :]
    for form in wider[:1]:  # which would not fit
        assert lord_tune.plan(str(model), backbone=form, rank=least, **common)["linear_bits_per_weight"] > bits


# ---- memory --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "nf4": ["--backbone", "nf4", "--rank", "16"],
    "uniform": ["--kept-fraction", "0.8", "--allocation", "uniform", "--form", "plain"],
    "loss_weighted": ["--kept-fraction", "0.8", "--form", "plain"],
    "pivoted": ["--kept-fraction", "0.8", "--allocation", "uniform"],
    "two_sided": ["--method", "two_sided", "--kept-fraction", "0.8", "--form", "plain"],
    "two_sided beside nf4": ["--method", "two_sided", "--backbone", "nf4", "--rank", "16"],
}
EMBEDDINGS = {
    "embeddings": ["--embeddings", "int4", "--kept-fraction", "0.8", "--allocation", "uniform", "--form", "plain"]
}
SIZES = {  # hidden size, intermediate size, blocks, vocabulary
    "small": (512, 2048, 2, 8000),
    "wide": (1024, 4096, 2, 2000),
    "many tokens": (256, 256, 1, 32_000),
}


@pytest.fixture(scope="module")
def random_llamas(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("random")
    (folder / "text.txt").write_text("".join(map(code_document, range(12))))

    def get(name: str) -> Path:
        if not (folder / name).exists():
            hidden, intermediate, layers, vocabulary = SIZES[name]
            config = LlamaConfig(
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                vocab_size=vocabulary,
                num_attention_heads=8,
                num_key_value_heads=8,
                bos_token_id=256,
                eos_token_id=256,
                pad_token_id=257,
            )
            save_tiny(LlamaForCausalLM(config), folder / name)
        return folder / name

    return get


def measured(model: Path, out: Path, setting: str, context: int) -> tuple[int, int]:
    """(peak, estimated peak) in bytes of a run in a process of its own."""
    words = [sys.executable, "-m", "lord_tune", "decompose", str(model), str(out), *(SETTINGS | EMBEDDINGS)[setting]]
    words += ["--calibration", str(model.parent / "text.txt"), "--calibration-tokens", "2048"]
    words += ["--context-length", str(context)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(words, env=environment, check=True, capture_output=True)
    totals = json.loads((out / "decomposition.json").read_text())["totals"]
    return totals["peak_memory_bytes"], totals["estimated_peak_memory_bytes"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("size", "setting", "context"),
    [
        ("small", "uniform", 256),
        ("small", "pivoted", 256),
        pytest.param("small", "nf4", 256, marks=pytest.mark.slow),
        pytest.param("small", "loss_weighted", 256, marks=pytest.mark.slow),
        pytest.param("small", "nf4", 1024, marks=pytest.mark.slow),
        pytest.param("small", "uniform", 1024, marks=pytest.mark.slow),
        pytest.param("small", "loss_weighted", 1024, marks=pytest.mark.slow),
        *(pytest.param("wide", s, c, marks=pytest.mark.slow) for s in SETTINGS for c in (256, 1024)),
    ],
)
def test_the_estimated_peak_is_within_a_quarter_of_the_measured_one(size, setting, context, random_llamas, tmp_path):
    """Python and the libraries are 440 MB of the 600 to 700 of the small model, so the wide ones say more."""
    peak, estimated = measured(random_llamas(size), tmp_path / "out", setting, context)
    assert 0.75 * peak < estimated < 1.25 * peak


def test_rounding_a_large_embedding_with_feedback_takes_what_is_foreseen(random_llamas, tmp_path):
    """When rounding kept its matrices until Python looked for circles of references, 32,000 rows took 219 MiB more: 960
    in place of 741, and 812 foreseen."""
    peak, estimated = measured(random_llamas("many tokens"), tmp_path / "out", "embeddings", 256)
    assert 0.9 * peak < estimated < 1.15 * peak


# ---- time and what is printed --------------------------------------------------------------------------------------


def test_more_processes_take_less_time(models, fixed_rates, tmp_path):
    found = [
        lord_tune.plan(str(models("llama")[1]), rank=8, processes=count, json=str(tmp_path / "plan.json"))["seconds"]
        for count in (1, 2, 8)
    ]
    assert found[0] > found[1] > found[2] > 0


def test_embeddings_in_low_precision_take_time_and_the_pass_to_the_head_more(models, fixed_rates, tmp_path):
    def seconds(**options: Any) -> float:
        found = lord_tune.plan(str(models("llama")[1]), rank=8, json=str(tmp_path / "plan.json"), **options)
        return float(found["seconds"])

    pass_alone = {"backbone": "int4", "rounding": "feedback"}
    assert seconds(embeddings="int8", **pass_alone) > seconds(**pass_alone)


def test_the_estimated_time_scales_with_the_machine(models, monkeypatch, tmp_path):
    seconds = []
    for rate in (1e9, 1e10):
        monkeypatch.setattr(Rates, "measure", lambda *probe, rate=rate: Rates(rate, rate, rate, rate))
        seconds.append(lord_tune.plan(str(models("llama")[1]), rank=8, json=str(tmp_path / "plan.json"))["seconds"])
    assert seconds[0] == pytest.approx(10 * seconds[1])


def printed(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    """(exit code, stdout, stderr)"""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    found = capfd.readouterr()
    return stop.value.code, found.out, found.err


def test_the_plan_names_ranks_bytes_memory_disk_and_time(models, fixed_rates, capfd):
    """The sizes are those that the first test finds written."""
    words = [str(models("llama")[1]), "--rank", "8", "--backbone", "nf4"]
    code, out, _ = printed(words, capfd)
    assert code == 0
    for part in ("self_attn.q_proj", "mlp.down_proj", "64x160", "break-even", "671.5 kB -> 335.5 kB"):
        assert part in out, part
    for part in ("11.17 bits per weight", "21 layers of 3 blocks", "peak memory", "scratch files", "time about"):
        assert part in out, part
    assert "not decomposed: 1 output head" in out


def test_without_a_budget_the_plan_says_what_it_assumes(models, fixed_rates, capfd):
    code, out, _ = printed([str(models("llama")[1])], capfd)
    assert code == 0 and "planned for --kept-fraction 0.9" in out and "from calibration" in out


def test_json_is_the_whole_output(models, fixed_rates, tmp_path, capfd):
    file = tmp_path / "made" / "plan.json"
    code, out, _ = printed([str(models("llama")[1]), "--rank", "8", "--json", str(file)], capfd)
    found = json.loads(file.read_text())
    assert code == 0 and out == ""
    assert {"ranks", "model_bytes", "model_bytes_after", "peak_bytes", "scratch_bytes", "seconds"} <= set(found)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("path", DECOMPOSE, ids=recipe_id)
def test_a_recipe_of_decompose_can_be_planned(path, fixed_rates, tmp_path, capfd):
    """Its `out` is where `decompose` writes: `plan` writes nothing there."""
    values = load_yaml(str(path))
    assert "out" in values
    model = save_tiny(tiny_family(ARCHITECTURES[path.parent.parent.name], layers=2), tmp_path / "model")
    limits = {"rank": 12, "top_rank": 4}  # of models 64 wide
    small = [w for key, most in limits.items() if values.get(key, 0) > most for w in (f"--{key}", str(most))]
    file = tmp_path / "plan.json"
    code, _, error = printed([str(model), "--config", str(path), *small, "--json", str(file)], capfd)
    shutil.rmtree(model)
    assert code == 0, error
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


def _yaml(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("MODEL --rnak 8", "--rank"),
        ("MODEL --resume --rank 8", "--resume"),
        (
            "MODEL --rank 8 --kept-fraction 0.9",
            "got --rank and --kept-fraction.",
        ),
        ("MODEL --rank 8 --backbone nf4 --bits-per-weight 6", "got --rank and --bits-per-weight"),
        ("MODEL --bits-per-weight 3 --backbone int3", "int3 alone takes 3.600 for 'model.layers.0.mlp.down_proj'"),
        ("MODEL --bits-per-weight 2", "the narrowest format, lloyd2, takes 8.955 with rank 8"),
        ("MODEL --bits-per-weight 2.5", "the narrowest format, lloyd2, takes 8.955 with rank 8"),
        ("MODEL --bits-per-weight 40", "expected a number above 0 and at most 32"),
        ("MODEL --bits-per-weight 6 --rank -1", "Got rank -1"),
        ("MODEL --bits-per-weight 9 --rank 65 --factor-format int3", "exceeds the smaller side of every layer"),
        ("MODEL --rank 8 --top-rank 2", "it needs a low-precision --factor-format"),
        ("MODEL --rank 8 --top-rank 8 --factor-format int4", "Got --top-rank 8 with --rank 8"),
        ("MODEL --rank 8 --weighting fisher", "--weighting has no effect"),
        ("MODEL --rank 8 --spqr-bits 4 --backbone int4", "--spqr-bits has no effect"),
        ("MODEL --rank 8 --outliers 0.5 --backbone spqr", "Got 0.5 for --outliers"),
        ("MODEL --kept-fraction 1.5", "expected a number between 0 and 1"),
        ("MODEL --kept-fraction 0.05 --backbone nf4", "of the bytes. Allow more"),
        ("MODEL --rank 60 --form plain", "Choose at most 45, or add a backbone, for example nf4"),
        ("MODEL --rank 0", "needs a backbone"),
        ("MODEL --rank 8 --processes 0", "Got 0 for --processes"),
        ("MODEL --rank 8 --shrinkage 2", "expected a number from 0 to 1, or auto"),
        ("MODEL --rank 8 --shrinkage much", "Got 'much' for --shrinkage"),
        ("MODEL --rank 8 --propagate both", "'dense' or 'sequential'"),
        ("MODEL --rank 8 --iterations 3", "--iterations has no effect"),
        ("MODEL --rank 8 --targets nosuchlayer", "are named like model.layers.0"),
        ("MODEL --rank 8 --json HERE", "is a folder; name a file"),
        ("MODEL --config UNKNOWN", "did you mean 'kept_fraction'?"),
        ("HERE/nowhere --rank 8", "check the path"),
        ("--rank 8", "MODEL is missing"),
    ],
)
def test_a_wrong_call_is_refused_in_one_sentence(words, says, models, tmp_path, fixed_rates, capfd):
    places = {"MODEL": str(models("llama")[1]), "UNKNOWN": _yaml(tmp_path, "kept_fractoin: 0.9\n")}
    code, _, error = printed([places.get(w, w.replace("HERE", str(tmp_path))) for w in words.split()], capfd)
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith("warning: ")]
    assert code == 2 and "Traceback" not in error
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], error


def test_a_quantized_model_is_refused(models, tmp_path, capfd):
    folder = tmp_path / "quantized"
    folder.mkdir()
    content = json.loads((models("llama")[1] / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(content))
    code, _, error = printed([str(folder), "--rank", "8"], capfd)
    assert code == 2 and "is quantized (bitsandbytes); start from the original dense model" in error
