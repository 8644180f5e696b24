"""What seven kinds of users do (scripts/try_journeys.py), on a tiny model and inside this process."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch
from test_chat import TEMPLATE
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from lord_tune.cli import main

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import try_journeys

NEAR = (
    "decompose",
    "--rank",
    "whitened",
    "no_model",
    "nf4",
    "no_file",
    "max_steps",
    "gguf",
    "no_file",
)  # in the errors
MOST_COMMANDS = {"b": 2, "c": 4, "d": 1}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    out = tmp_path_factory.mktemp("journeys")
    try_journeys.make_inputs(out, small=True)
    save_tiny(tiny_llama(intermediate=192), out / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out / "model")
    return try_journeys.filled(out, str(out / "model"), small=True)


@pytest.fixture
def run(capsys):
    def typed(command):
        words = shlex.split(command)
        assert words.pop(0) == "lord-tune", command
        with pytest.raises(SystemExit) as ended:
            main(words)
        captured = capsys.readouterr()
        return try_journeys.Ran(command, int(ended.value.code or 0), 0.0, captured.err)

    return typed


@pytest.mark.parametrize("letter", ["a", "b", "c", "d"])
def test_a_journey_arrives(letter, values, run):
    torch.manual_seed(0)
    ran = try_journeys.go(letter, values, run)
    assert try_journeys.went_well(letter, ran), ran[-1]
    commands = try_journeys.JOURNEYS[letter]
    assert len(ran) == len(commands) <= MOST_COMMANDS.get(letter, 5)


def test_whoever_mistypes_is_told_so(values, run):
    before = sorted(Path(str(values["out"])).rglob("*"))
    ran = try_journeys.go(try_journeys.MISTYPED, values, run)
    assert try_journeys.went_well(try_journeys.MISTYPED, ran), ran
    assert all(near in one.errors for near, one in zip(NEAR, ran, strict=True)), ran
    assert sorted(Path(str(values["out"])).rglob("*")) == before
