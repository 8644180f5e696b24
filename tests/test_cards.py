"""Model cards: metadata that the Hub's own library reads, facts from the records, commands that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from tiny import save_tiny, tiny_llama

import lord_tune
from lord_tune.cards.base import stated_by
from lord_tune.cards.scores import update
from lord_tune.cli import main
from lord_tune.config import RECORDS

SMALL = {"calibration_tokens": 512, "context_length": 64}


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory, rows_file):
    """One of each: a base with a card, a decomposition, an adapter, exports."""
    root = tmp_path_factory.mktemp("cards")
    base = save_tiny(tiny_llama(intermediate=192), root / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# The base\n")
    (base / "LICENSE").write_text("the text of the licence")
    lord_tune.decompose(
        str(base),
        str(root / "nf4"),
        backbone="nf4",
        rank=4,
        factor_format="bf16",
        calibration=[str(rows_file)],
        **SMALL,
    )
    lord_tune.decompose(str(base), str(root / "lord"), method="svd", rank=8)
    lord_tune.train(
        model_name_or_path=str(root / "nf4"),
        dataset_name=str(rows_file),
        output_dir=str(root / "sft"),
        max_steps=2,
        max_length=64,
        save_strategy="no",
        report_to="none",
    )
    lord_tune.export(str(root / "sft"), str(root / "dense"), "dense")
    lord_tune.export(str(root / "sft"), str(root / "peft"), "peft")
    lord_tune.export(str(root / "lord"), str(root / "vllm"), "vllm")
    return root


NAMES = ("nf4", "lord", "sft", "dense", "peft", "vllm")


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_is_valid(artefacts, name):
    data = metadata_load(artefacts / name / "README.md")
    assert data == yaml.safe_load((artefacts / name / "README.md").read_text().split("---")[1])
    again = ModelCardData(**data).to_dict()  # refuses what it cannot take
    assert again == data
    assert {"lord_tune", "low-rank"} <= set(data["tags"]) and data["library_name"] in ("transformers", "peft")
    assert data["license"] == "mit" and data["language"] == "en"  # as the base's card states, through all artefacts
    assert "base_model" not in data  # a local folder is nothing that the Hub knows
    assert data["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_valid(artefacts, name, monkeypatch):
    """As the command line parses it; places that a reader fills in stand for paths."""
    text = (artefacts / name / "README.md").read_text()
    lines = [line.strip() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("lord-tune")]
    built = []
    for verb, record in RECORDS.items():
        build = lambda record=record, **values: built.append(record.build(values))  # noqa: E731
        monkeypatch.setattr(lord_tune, verb, build, raising=False)
    for words in commands:
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        assert stop.value.code == 0, words
    assert len(built) == len(commands) >= (1 if name in ("dense", "peft", "vllm") else 2)


def test_the_card_of_a_decomposition_has_its_facts(artefacts):
    text = (artefacts / "nf4" / "README.md").read_text()
    record = json.loads((artefacts / "nf4" / "decomposition.json").read_text())
    assert f"sha256 `{record['base']['sha256']}`" in text and "Licence: mit" in text and "`LICENSE`" in text
    totals = record["totals"]
    assert f"| stored numbers | {totals['parameters_before']:,.0f} | {totals['parameters']:,.0f} |" in text
    own = [e for name, e in record["layers"].items() if name.endswith("mlp.down_proj")]
    mean = sum(entry["error_heldout"] for entry in own) / len(own)
    assert re.search(rf"\| `mlp.down_proj` \| 3 of 3 \| 4 \| nf4 \|.*\| {mean:.4f} \|", text)
    assert "--format peft" in text and "--format vllm" not in text and "--format gguf" not in text
    assert "--format vllm" in (artefacts / "lord" / "README.md").read_text()


@pytest.mark.parametrize(
    "options, mode",
    [({"rank": 4}, None), ({"rank": 4, "factor_format": "lloyd4"}, "lora"), ({"rank": 0}, "none")]
    + [({"rank": 4, "factor_format": "lloyd4", "top_rank": 2}, "split")],
)
def test_the_card_names_the_mode_that_trains_it(llama_dir, rows_file, tmp_path, options, mode):
    out = tmp_path / "out"
    lord_tune.decompose(str(llama_dir), str(out), method="svd", backbone="nf4", **options)
    text = (out / "README.md").read_text().split("## How to train on")[1].split("##")[0]
    if mode == "none":
        assert "There is no L R to train" in text and "lord-tune train" not in text
        return
    (command,) = [shlex.split(line) for line in text.splitlines() if line.startswith("lord-tune train")]
    assert (command[command.index("--mode") + 1] if "--mode" in command else None) == mode
    model, _ = lord_tune.load(str(out))
    if mode != "lora":
        with pytest.raises(lord_tune.LordError) if mode == "split" else nullcontext():
            lord_tune.expose_factors(model)
    else:
        assert lord_tune.add_lora(model) is not None


def test_a_licence_is_never_guessed(llama_dir, tmp_path):
    lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), method="svd", rank=8)
    assert "license" not in metadata_load(tmp_path / "out" / "README.md")
    assert "Licence: not stated by the base's card." in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert stated_by(str(tmp_path)) == {} and stated_by("nobody/nothing") == {}


def test_the_card_of_an_adapter_knows_its_checkpoint(artefacts):
    text = (artefacts / "sft" / "README.md").read_text()
    assert "| steps | 2 |" in text and "Licence: mit" in text and "mode `factors`" in text
    assert 'lord_tune.load("THIS_FOLDER")' in text


def test_the_card_of_an_export_has_its_check(artefacts):
    result = json.loads((artefacts / "peft" / "export.json").read_text())
    text = (artefacts / "peft" / "README.md").read_text()
    assert f"{result['comparison']['kl']:.3g}" in text and "PeftModel.from_pretrained" in text
    assert result["command"] in text


def test_what_is_measured_comes_into_the_card(artefacts, rows_file, tmp_path):
    folder = tmp_path / "nf4"
    shutil.copytree(artefacts / "nf4", folder)
    given = {"context_length": 64, "max_tokens": 128}
    lord_tune.evaluate(str(folder), text=[str(rows_file)], json=str(tmp_path / "elsewhere.json"), **given)
    assert "Not measured yet" in (folder / "README.md").read_text()
    for _ in range(2):  # the second takes the place of the first
        found = lord_tune.evaluate(str(folder), text=[str(rows_file)], json=str(folder / "evaluate.json"), **given)
        card = card_of(folder)
        (result,) = card.data.eval_results
        assert result.metric_type == "perplexity" and result.metric_value == pytest.approx(found["perplexity"])
        assert result.dataset_name == rows_file.name and "Not measured yet" not in card.text
        assert card.text.count("## Quality") == 1 and "## How to load it" in card.text
    assert metadata_load(folder / "README.md")["license"] == "mit"


def test_tasks_and_the_original_come_into_the_card(artefacts, tmp_path):
    folder = tmp_path / "nf4"
    shutil.copytree(artefacts / "nf4", folder)
    original = {"kl": 0.021, "kl_standard_error": 0.002, "perplexity": 9.2}
    texts = {"a/prose.txt": {"perplexity": 9.7, "perplexity_standard_error": 0.25, "original": original}}
    tasks = {
        "piqa": {"acc": 0.61, "acc_stderr": 0.02, "items": 100},
        "he": {"pass@1": 0.3, "pass@1_interval": [0.2, 0.4]},
    }
    record = {"model": str(folder), "model_bytes": 1, "texts": texts, "tasks": tasks}
    (folder / "e.json").write_text(json.dumps(record))
    update(folder)
    card = card_of(folder)
    assert [(r.dataset_name, r.metric_type) for r in card.data.eval_results] == [
        ("prose.txt", "perplexity"),
        ("piqa", "acc"),
        ("he", "pass@1"),
    ]
    for row in (
        "perplexity, prose.txt | 9.7 ± 0.25",
        "KL to the original, prose.txt | 0.021 ± 0.002",
        "0.3 (0.2 to 0.4)",
    ):
        assert row in card.text


def test_a_card_of_somebody_else_stays_as_it_is(artefacts, tmp_path):
    folder = tmp_path / "nf4"
    shutil.copytree(artefacts / "nf4", folder)
    (folder / "README.md").write_text("# My own words\n")
    (folder / "e.json").write_text(json.dumps({"perplexity": 2.0, "texts": {"a": {"perplexity": 2.0}}}))
    update(folder)
    assert (folder / "README.md").read_text() == "# My own words\n"
