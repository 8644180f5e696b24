"""Every recipe is parsed, and run small on a random model of its architecture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import lord_tune
from lord_tune.config import DecomposeConfig, TrainConfig
from lord_tune.training import load_yaml, trainer_arguments

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
ACCELERATE = [path for path in RECIPES if path.parent.name == "accelerate_configs"]
DECOMPOSE = [path for path in RECIPES if path.parent.name == "decompose"]
TRAIN = [path for path in RECIPES if path.parent.name.startswith("sft")]
SMALL_CALIBRATION = {"calibration_tokens": 512, "context_length": 64}


def test_no_recipe_is_left_out():
    assert ACCELERATE and DECOMPOSE and TRAIN
    assert sorted([*ACCELERATE, *DECOMPOSE, *TRAIN]) == RECIPES


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.name)
def test_accelerate_configs_parse(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1


@pytest.mark.parametrize("path", [*DECOMPOSE, *TRAIN], ids=lambda p: p.stem)
def test_header_gives_command_machine_time_and_result(path):
    """And the command names files that exist."""
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("command:", "machine:", "time:", "measured:"):
        text = re.search(rf"{word}\s*(.+)", header)
        assert text and not re.search(r"MACHINE|TIME|MEASURED|TODO", text.group(1)), (path.name, word)
    for name in re.findall(r"(?:recipes|scripts)/[\w./]+", header):
        assert (ROOT / name).exists(), name
    assert str(path.relative_to(ROOT)) in header


@pytest.mark.parametrize("path", DECOMPOSE, ids=lambda p: p.stem)
def test_decompose_recipes_run_small(path, llama_dir, rows_file, tmp_path):
    values = load_yaml(str(path))
    config = DecomposeConfig.build(values)
    small = SMALL_CALIBRATION if config.calibration else {}
    overrides = {"model": str(llama_dir), "out": str(tmp_path / "out"), **small}
    if config.calibration:
        overrides["calibration"] = [str(rows_file)]
    report = lord_tune.decompose(**(values | overrides))
    assert report["totals"]["factored_layers"] > 0


@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
def test_train_recipes_run_small_on_their_decompose_recipe(path, llama_dir, rows_file, tmp_path):
    values = load_yaml(str(path))
    TrainConfig.build(values)
    base = next(p for p in DECOMPOSE if yaml.safe_load(p.read_text())["out"] == values["model_name_or_path"])
    factored = load_yaml(str(base)) | SMALL_CALIBRATION | {"calibration": [str(rows_file)]}
    lord_tune.decompose(**(factored | {"model": str(llama_dir), "out": str(tmp_path / "base")}))
    overrides = {
        "model_name_or_path": str(tmp_path / "base"),
        "dataset_name": str(rows_file),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "max_length": 64,
    }
    metrics = lord_tune.train(**(values | overrides))
    assert metrics["steps"] == 2 and (tmp_path / "run" / "adapter_model.safetensors").is_file()


def launch(words: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )


@pytest.fixture(scope="module")
def small_run(llama_dir, rows_file, tmp_path_factory) -> list[str]:
    """The command-line overrides that make a training recipe small."""
    base = tmp_path_factory.mktemp("launch") / "base"
    lord_tune.decompose(
        str(llama_dir), str(base), rank=8, backbone="nf4", calibration=[str(rows_file)], **SMALL_CALIBRATION
    )
    return [
        "--model_name_or_path",
        str(base),
        "--dataset_name",
        str(rows_file),
        "--max_length",
        "64",
        "--max_steps",
        "2",
    ]


RECIPE = "recipes/smollm2_135m/sft_code/nf4_whitened_factors.yaml"


def test_accelerate_launch_runs_a_recipe(small_run, tmp_path):
    words = ["--config_file", "recipes/accelerate_configs/cpu.yaml", "scripts/train.py", "--config", RECIPE]
    run = launch([*words, *small_run, "--output_dir", str(tmp_path / "run")])
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_two_processes_split_the_work(small_run, tmp_path):
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0", "scripts/train.py", "--config", RECIPE]
    extra = [
        "--output_dir",
        str(tmp_path / "run"),
        "--packing",
        "false",
        "--num_train_epochs",
        "1",
        "--max_steps",
        "-1",
    ]
    run = launch([*words, *small_run[:-2], *extra], {"ACCELERATE_USE_CPU": "true"})
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    rows = sum(1 for _ in Path(small_run[3]).open())
    assert results["steps"] == rows // 2  # batch 1 on each of two processes
    assert run.stdout.count("first training sequence") == 1


def test_unknown_keys_are_refused_with_the_nearest_name():
    from lord_tune.errors import UsageError

    with pytest.raises(UsageError, match="learning_rate"):
        trainer_arguments({"learnin_rate": 1e-4, "output_dir": "x"}, "factors", True, [])
    assert trainer_arguments({"learning_rate": "1e-3", "output_dir": "x"}, "factors", True, []).learning_rate == 1e-3
    assert trainer_arguments({"output_dir": "x"}, "factors", True, []).learning_rate == 1e-4
    assert trainer_arguments({"output_dir": "x"}, "lora", True, []).learning_rate == 2e-4
