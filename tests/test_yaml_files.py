"""YAML as people write it, and ~ in every path of it, of the command line and of Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_code_rows

import lord_tune
from lord_tune.cli import main
from lord_tune.config import RECORDS, DecomposeConfig, TrainConfig
from lord_tune.errors import UsageError
from lord_tune.training import trainer_arguments
from lord_tune.yaml_files import expand_home, load_yaml

NEEDED = {"model_name_or_path": "m", "output_dir": "o", "dataset_name": "d"}


def read(tmp_path: Path, text: str):
    (tmp_path / "a.yaml").write_text(text)
    return load_yaml(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "line, value",
    [
        ("save_strategy: no", "no"),
        ("report_to: [no, off]", ["no", "off"]),
        ("bf16: on", "on"),
        ("bf16: true", True),
        ("bf16: 'true'", "true"),
        ("learning_rate: 1e-5", 1e-5),
        ("learning_rate: 1E+2", 100.0),
        ("lr_scheduler_kwargs: {min_lr: 1e-5, x: -.5}", {"min_lr": 1e-5, "x": -0.5}),
        ("fsdp_config: {offload: no, sharded: Yes, name: 'no', deep: {on: [off]}}",
         {"offload": False, "sharded": True, "name": "no", "deep": {"on": [False]}}),
        ("seed: 010", 10),
        ("seed: 1_000", 1000),
        ("seed: 0x10", 16),
        ("run_name: 1:30", "1:30"),
        ("run_name: 2024-01-01", "2024-01-01"),
        ("run_name: 1.2.3", "1.2.3"),
        ("run_name: e5", "e5"),
        ("run_name: null", None),
        ("max_grad_norm: .inf", float("inf")),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"b": 1, "d": 2}),
    ],
)  # fmt: skip
def test_values_of_yaml(line, value, tmp_path):
    found = list(read(tmp_path, line).values())[-1]
    assert found == value and type(found) is type(value)


def test_words_reach_the_options_as_what_they_take(tmp_path):
    values = read(
        tmp_path, "save_strategy: no\neval_strategy: no\npacking: on\ngradient_checkpointing: off\nfp16: no\n"
    )
    found = trainer_arguments(values | {"output_dir": "o"}, "factors", True, [])
    assert found.save_strategy == "no" and found.eval_strategy == "no"
    assert found.packing is True and found.gradient_checkpointing is False and found.fp16 is False
    own = read(tmp_path, "model: m\nout: o\nmethod: svd\nrank: 8\nresume: off\noverwrite: yes\n")
    built = DecomposeConfig.build(own)
    assert built.resume is False and built.overwrite is True
    assert TrainConfig.build(NEEDED | read(tmp_path, "dequantize_once: on")).dequantize_once is True


def test_a_file_that_is_no_yaml_or_starts_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfrank: 8\r\n")
    assert load_yaml(str(tmp_path / "a.yaml")) == {"rank": 8}
    for text, says in (("a: [", "not valid YAML"), ("- a", "holds no keys"), ("a: !!python/name:os.x 1", "not valid")):
        with pytest.raises(UsageError, match=says):
            read(tmp_path, text)


def test_every_path_below_the_home_folder_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for verb, record in RECORDS.items():
        for name, field in record.model_fields.items():
            if field.annotation not in (str, str | None, list[str]):
                continue
            given = ["~/x"] if field.annotation == list[str] else "~/x"
            wanted = [f"{tmp_path}/x"] if isinstance(given, list) else f"{tmp_path}/x"
            assert expand_home({name: given}) == {name: wanted}, (verb, name)
    built = TrainConfig.build(NEEDED | {"output_dir": "~/o", "logging_dir": "~/l", "fsdp_config": {"file": "~/f"}})
    values = built.trainer_values()
    assert (values["output_dir"], values["logging_dir"]) == (f"{tmp_path}/o", f"{tmp_path}/l")
    assert values["fsdp_config"] == {"file": f"{tmp_path}/f"}
    assert expand_home("a ~/b") == "a ~/b" and expand_home("~=") == "~="
    with pytest.raises(UsageError, match="home folder in ~nobody_here/x is not known"):
        expand_home("~nobody_here/x")


def test_a_whole_run_below_the_home_folder(tmp_path, llama_dir, monkeypatch):
    """A folder named ~ appeared, and the training failed after its last step."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir(), elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    (home / "model").symlink_to(llama_dir)
    write_code_rows(home / "rows.jsonl")
    (home / "d.yaml").write_text("model: ~/model\nout: ~/lord\nmethod: svd\nrank: 4\n")
    (home / "t.yaml").write_text(
        "model_name_or_path: ~/lord\ndataset_name: ~/rows.jsonl\noutput_dir: ~/run\nmax_steps: 1\nmax_length: 32\n"
        "save_strategy: no\nreport_to: none\nlr_scheduler_kwargs: {num_cycles: 5e-1}\n"
    )
    for words in (["decompose", "--config", "~/d.yaml"], ["train", "--config", "~/t.yaml"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    lord_tune.inspect("~/run", json="~/layers.json")
    assert (home / "run" / "README.md").is_file() and (home / "run" / "adapter_config.json").is_file()
    assert (home / "layers.json").is_file() and list(elsewhere.iterdir()) == []
