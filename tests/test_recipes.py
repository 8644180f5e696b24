"""Every recipe is parsed, and run small on a random model of its architecture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny import tiny_family, tiny_tokenizer, write_code_rows

import lord_tune
from lord_tune.config import DecomposeConfig, TrainConfig
from lord_tune.training import trainer_arguments
from lord_tune.yaml_files import load_yaml

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
ACCELERATE = [path for path in RECIPES if path.parent.name == "accelerate_configs"]
DECOMPOSE = [path for path in RECIPES if path.parent.name == "decompose"]
TRAIN = [path for path in RECIPES if path not in ACCELERATE and path not in DECOMPOSE]
SMALL_CALIBRATION = {"calibration_tokens": 512, "context_length": 64}
# folder of recipes -> family of tiny.py
ARCHITECTURES = {
    "smollm2_135m": "llama",
    "qwen2.5_coder_0.5b": "qwen2",
    "qwen2.5_7b": "qwen2",
    "llama2_7b": "llama",
    "llama3_8b": "llama",
    "starcoder2_7b": "starcoder2",
    "starcoderbase_7b": "bigcode",
}
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def recipe_id(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


def trained_before(path: Path) -> Path | None:
    """The recipe for training whose export, by the command in the header, a recipe for training starts from."""
    exported = re.search(r"lord-tune export (\S+) (\S+) --format factored", path.read_text())
    if exported is None:
        return None
    assert exported[2] == yaml.safe_load(path.read_text())["model_name_or_path"]
    (found,) = (other for other in TRAIN if yaml.safe_load(other.read_text())["output_dir"] == exported[1])
    return found


def test_no_recipe_is_left_out():
    assert ACCELERATE and DECOMPOSE and TRAIN
    assert {path.parent.parent.name for path in [*DECOMPOSE, *TRAIN]} == set(ARCHITECTURES)
    used = {yaml.safe_load(path.read_text())["model_name_or_path"] for path in TRAIN if trained_before(path) is None}
    assert used <= {yaml.safe_load(path.read_text())["out"] for path in DECOMPOSE}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.name)
def test_accelerate_configs_parse(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1


@pytest.mark.parametrize("path", [*DECOMPOSE, *TRAIN], ids=recipe_id)
def test_header_gives_command_machine_time_and_result(path):
    """And the command names files that exist."""
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("command:", "machine:", "time:", "measured:"):
        text = re.search(rf"{word}\s*(.+)", header)
        assert text and not re.search(r"MACHINE|TIME|MEASURED|TODO", text.group(1)), (path.name, word)
    for name in re.findall(r"(?:recipes|scripts)/[\w./]+", header):
        assert (ROOT / name).exists(), name
    assert str(path.relative_to(ROOT)) in header


def test_the_list_of_recipes_is_complete():
    """recipes/README.md links each recipe once, and gives once the command that the recipe's header gives."""
    text = (ROOT / "recipes/README.md").read_text()
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    linked = [ROOT / "recipes" / link for link in re.findall(r"\]\(([\w./]+\.yaml)\)", rows)]
    assert sorted(linked) == RECIPES
    listed = text.split("## The recipes")[1].split("## Decomposition in detail")[0].splitlines()
    for path in [*DECOMPOSE, *TRAIN]:
        name = str(path.relative_to(ROOT))
        (line,) = (row for row in path.read_text().splitlines() if row.startswith("#") and name in row)
        command = line.removeprefix("# command:").strip("# ").split(" && ")[-1]
        assert listed.count(command) == 1, command
    assert sum("--config recipes/" in line for line in listed) == len(DECOMPOSE) + len(TRAIN)


@pytest.fixture(scope="module")
def texts(tmp_path_factory, rows_file) -> dict[str, Path]:
    """Kind of recipe -> rows in the columns that its data set has."""
    folder = tmp_path_factory.mktemp("rows")
    turns = [{"role": "user", "content": "Add 2"}, {"role": "assistant", "content": "def add(x): return x + 2"}]
    kinds = {"chat": {"messages": turns}, "task": {"prompt": "2 + 2 is 4. True or False?", "completion": " True"}}
    for name, row in kinds.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 40)
    return {name: folder / f"{name}.jsonl" for name in kinds} | {"code": rows_file}


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory, rows_file):
    """Recipe -> (its report, its checkpoint), of a random model of the same architecture with 2 layers; made once."""
    folder = tmp_path_factory.mktemp("recipes")
    made: dict[Path, tuple[dict[str, Any], Path]] = {}

    def get(path: Path) -> tuple[dict[str, Any], Path]:
        if path not in made:
            family = ARCHITECTURES[path.parent.parent.name]
            model, tokenizer = tiny_family(family, layers=2), tiny_tokenizer()
            tokenizer.chat_template = CHATML
            base, out = folder / f"{len(made)}-dense", folder / f"{len(made)}-out"
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
            values = load_yaml(str(path))
            config = DecomposeConfig.build(values)
            limits = {"rank": 12, "top_rank": 4, "iterations": 1, "trials": 2, "probes": 2, "validation_tokens": 64}
            small = {key: min(values[key], most) for key, most in limits.items() if values.get(key)}
            if config.calibration:
                weights = enumerate(config.weights().values())
                mixed = [f"{write_code_rows(folder / f'{number}.jsonl')}:{weight}" for number, weight in weights]
                small |= SMALL_CALIBRATION | {"calibration": mixed or [str(rows_file)]}
            report = lord_tune.decompose(**(values | small | {"model": str(base), "out": str(out)}))
            made[path] = report, out
        return made[path]

    return get


@pytest.mark.one_in(2)
@pytest.mark.parametrize("path", DECOMPOSE, ids=recipe_id)
def test_decompose_recipes_run_small(path, decomposed):
    report, out = decomposed(path)
    fits = "max_bytes" in load_yaml(str(path))  # as it is, as small as it is
    assert (report["totals"]["factored_layers"] > 0 or fits) and (out / "config.json").is_file()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("path", TRAIN, ids=recipe_id)
def test_train_recipes_run_small_on_their_decompose_recipe(path, decomposed, texts, tmp_path):
    """Or on the export of the recipe for training before it."""
    first = trained_before(path)
    if first is not None:
        run_small(first, decomposed, texts, tmp_path / "first")
        lord_tune.export(str(tmp_path / "first" / "run"), str(tmp_path / "base"), format="factored")
    run_small(path, decomposed, texts, tmp_path, None if first is None else tmp_path / "base")


def run_small(path: Path, decomposed: Any, texts: dict[str, Path], folder: Path, start: Path | None = None) -> None:
    values = load_yaml(str(path))
    TrainConfig.build(values)
    if start is None:
        wanted = values["model_name_or_path"]
        start = decomposed(next(p for p in DECOMPOSE if yaml.safe_load(p.read_text())["out"] == wanted))[1]
    kind = {"sft_code": "code", "wikitext2": "code", "sft_instruct": "chat"}.get(path.parent.name, "task")
    overrides = {
        "model_name_or_path": str(start),
        "dataset_name": str(texts[kind]),
        "dataset_config": None,
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "max_length": 128,
        "gradient_accumulation_steps": 1,
    }
    small = {"eval_dataset_name": str(texts[kind]), "teacher_logits": str(folder / "logits")}
    small |= {"basis_new": 4, "basis_every": 1}
    overrides |= {name: value for name, value in small.items() if name in values}
    metrics = lord_tune.train(**(values | overrides))
    assert metrics["steps"] == 2 and (folder / "run" / "adapter_model.safetensors").is_file()


def test_rows_of_tasks_are_prompts_and_completions(tmp_path):
    """As GLUE and WinoGrande have them; the files that recipes read are those that the script writes."""
    entailed = {"sentence1": "Mogadishu is in Somalia.", "sentence2": "It is in Africa.", "label": 0}
    sums = {"question": "What is 2 + 3?", "answer": "It is 2 + 3 = <<2+3=5>>5.\n#### 5"}
    gap = {"sentence": "The trophy did not fit, for _ was big.", "option1": "it", "option2": "I", "answer": "1"}
    for name, row in (("rte_valid", entailed), ("winogrande_valid", gap), ("winogrande_train", gap | {"answer": ""}),
                      ("gsm8k_test", sums)):  # fmt: skip
        (tmp_path / f"{name}.in").write_text(json.dumps(row) + "\n")
    pairs = [f"{path.stem}={path}" for path in tmp_path.glob("*.in")]
    words = [sys.executable, str(ROOT / "scripts/make_task_data.py"), str(tmp_path / "data"), "--local", *pairs]
    subprocess.run(words, check=True, capture_output=True)
    found = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.glob("data/*.jsonl")}
    assert found["winogrande_train"] == []
    assert found["rte_valid"][0]["completion"] == " True" and "Africa" in found["rte_valid"][0]["prompt"]
    assert found["winogrande_valid"] == [{"prompt": "The trophy did not fit, for it", "completion": " was big."}]
    assert found["gsm8k_test"] == [
        {"prompt": "Question: What is 2 + 3?\nAnswer:", "completion": " It is 2 + 3 = 5.\n#### 5"}
    ]
    for wrong, says in (("rte_valid=missing.jsonl", "missing.jsonl does not exist"), ("rte=x", "rte is not one of")):
        run = subprocess.run([*words[:3], "--local", wrong], capture_output=True, text=True)
        assert run.returncode == 2 and says in run.stderr.splitlines()[-1]
    script = (ROOT / "scripts/make_task_data.py").read_text()
    recipes = [*(ROOT / "recipes/llama2_7b").rglob("*.yaml"), *(ROOT / "recipes").glob("*/gsm8k/*.yaml")]
    for path in recipes:
        for name in re.findall(r"data/(\w+)\.jsonl", path.read_text()):
            assert f'"{name}"' in script, (path, name)


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


@pytest.mark.slow
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
