"""The tokens of a row are those of trl's own trainers: in training, in calibration and in evaluation, and for DPO.

trl gets the file as `datasets` reads it. The tokenizer puts a token before every text, as Llama's does, and its chat
template prints tools, options and calls of tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny import EOS, tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lord_tune.calibration.corpus import file_windows
from lord_tune.data.texts import documents, token_ids
from lord_tune.training.data import prepare_rows
from lord_tune.training.preference import prepare_pairs

TEMPLATE = (
    "{{ eos_token }}{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% if mood %}mood {{ mood }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}"
    "{% elif m.content %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Oslo?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER, WORSE = {"role": "assistant", "content": "3 C"}, {"role": "assistant", "content": "hot"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Oslo"}, {"type": "text", "text": "?"}]}


def tool(*names: str) -> list[dict[str, Any]]:
    properties = {name: {"type": "string"} for name in names}
    return [{"type": "function", "function": {"name": "weather", "parameters": {"properties": properties}}}]


MOODS = [{"chat_template_kwargs": {"mood": "grim"}}, {"chat_template_kwargs": {"other": 1}}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": [SYSTEM, USER, ANSWER]}, {"messages": [USER, ANSWER]}],
    "parts": [{"messages": [PARTS, ANSWER]}, {"messages": [USER, ANSWER]}],
    "tools": [
        {"messages": [SYSTEM, USER, CALLS, {"role": "tool", "content": "3"}, ANSWER], "tools": tool("city")},
        {"messages": [USER, ANSWER], "tools": tool("date", "unit")},
        {"messages": [USER, ANSWER], "tools": None},
    ],
    "tools as JSON": [{"messages": [USER, ANSWER], "tools": json.dumps(tool("city"))}],
    "options": [{"messages": [SYSTEM, USER, ANSWER], "tools": tool("city"), **mood} for mood in MOODS],
    "prompt": [{"prompt": [SYSTEM, USER], "completion": [ANSWER], "tools": tool(n), **MOODS[0]} for n in ("a", "b")],
    "ShareGPT": [{"conversations": [{"from": "user", "value": "5"}, {"from": "assistant", "value": "3"}]}],
    "text": [{"text": "plain"}, {"text": "ended" + EOS}],
    "strings": [{"prompt": "two and two", "completion": " is 4"}, {"prompt": "", "completion": "7"}],
}
PAIRS: dict[str, list[dict[str, Any]]] = {
    "strings": [{"prompt": "p ", "chosen": "good", "rejected": "bad"}],
    "messages": [
        {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [WORSE], "tools": tool(name), **MOODS[0]}
        for name in ("city", "date")
    ],
    "prompt inside": [{"chosen": [USER, ANSWER], "rejected": [USER, WORSE], "tools": tool("city")}],
}


def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    made._tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, made.eos_token_id)])
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_trl_reads(file: str) -> datasets.Dataset:
    return datasets.load_dataset("json", data_files=file, split="train")


def options(tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False, "max_length": None}


@pytest.mark.parametrize("case", ROWS)
def test_rows_have_the_tokens_of_trl_in_training_calibration_and_evaluation(case, tmp_path):
    file, made, model = write(tmp_path / "a.jsonl", ROWS[case]), tokenizer(), tiny_llama(layers=1)

    def tokenized(rows: datasets.Dataset) -> datasets.Dataset:
        return SFTTrainer(
            model, SFTConfig(**options(tmp_path)), train_dataset=rows, processing_class=made
        ).train_dataset

    wanted = tokenized(as_trl_reads(file))
    plain = case == "strings"  # as trl reads them; by the template: test_own_data.py
    ours = tokenized(prepare_rows(file, "train", None, made, plain=plain)[0])
    assert ours["input_ids"][:] == wanted["input_ids"][:] and ours["labels"][:] == wanted["labels"][:]
    assert [token_ids(text, made) for text in documents([file], made, plain)] == wanted["input_ids"][:]
    evaluated = file_windows(file, made, 10_000, plain=plain)[0].tolist()
    assert evaluated == [token for row in wanted["input_ids"] for token in row]
    if "tools" in ROWS[case][0]:
        assert "TOOLS" in made.decode(wanted[0]["input_ids"])


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_have_the_tokens_of_trl_in_dpo_and_those_of_the_chosen_answer_in_calibration(case, tmp_path):
    file, made, model = write(tmp_path / "a.jsonl", PAIRS[case]), tokenizer(), tiny_llama(layers=1)

    def tokenized(rows: datasets.Dataset) -> list[list[list[int]]]:
        given = DPOConfig(**options(tmp_path))
        trainer = DPOTrainer(model, tiny_llama(layers=1), given, train_dataset=rows, processing_class=made)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [[row[name] for name in names] for row in trainer.train_dataset]

    wanted = tokenized(as_trl_reads(file))
    assert tokenized(prepare_pairs(file, "train", None, made)) == wanted
    calibrated = [token_ids(text, made) for text in documents([file], made)]
    assert calibrated == [prompt + chosen for prompt, chosen, _ in wanted]
    if "tools" in PAIRS[case][0]:
        assert "TOOLS" in made.decode(wanted[0][0])


def test_options_of_the_template_that_are_null_are_none(tmp_path):
    """trl's own trainer fails on such a row."""
    rows = [ROWS["options"][0], {"messages": [USER, ANSWER], "tools": None, "chat_template_kwargs": None}]
    made = tokenizer()
    prepared, _ = prepare_rows(write(tmp_path / "a.jsonl", rows), "train", None, made)
    assert prepared["chat_template_kwargs"][:] == [{"mood": "grim"}, {}]
    SFTTrainer(tiny_llama(layers=1), SFTConfig(**options(tmp_path)), train_dataset=prepared, processing_class=made)
