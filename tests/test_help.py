"""The help of the command line: headings, common options first, examples that work, on a terminal and in a file."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

import lord_tune
from lord_tune.cli import EXAMPLES, main
from lord_tune.config import RECORDS

GROUPED = [verb for verb, record in RECORDS.items() if record.groups]


def help_of(verb: str, capfd) -> str:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("verb", RECORDS)
def test_every_option_and_two_examples_are_shown(verb, capfd):
    shown = help_of(verb, capfd)
    words = set(shown.replace("...", "").split())  # of an argument that takes several
    for name, field in RECORDS[verb].model_fields.items():
        flag = "--" + (field.alias or name)
        assert {name, flag, flag.replace("_", "-")} & words, name
    assert len(EXAMPLES[verb]) == 2 and all(f"  {line}\n" in shown for line in EXAMPLES[verb])
    assert "\x1b" not in shown and "\u2500" not in shown  # neither colours nor frames outside a terminal


@pytest.mark.parametrize("verb", GROUPED)
def test_options_stand_below_their_headings(verb, capfd):
    shown, record = help_of(verb, capfd), RECORDS[verb]
    places = {heading: shown.index(f"\n{heading}:\n") for heading in record.groups}
    assert list(places.values()) == sorted(places.values()) and next(iter(places)) == "Common"
    grouped = record.grouped()
    assert set(grouped) | {"model", "out"} >= set(record.model_fields)
    for name, heading in grouped.items():
        if name in record.positional:
            continue
        field = record.model_fields.get(name)
        flag = "--" + (field.alias if field and field.alias else name)
        flag = flag if verb == "train" else flag.replace("_", "-")
        below = shown[places[heading] :].split("\n\n")[0]
        assert f"\n  {flag} " in below, (name, heading)


@pytest.mark.parametrize("verb", GROUPED)
def test_headings_name_fields_once(verb):
    record = RECORDS[verb]
    named = [name for names in record.groups.values() for name in names]
    assert len(named) == len(set(named))
    decompose = set(RECORDS["decompose"].model_fields)  # whose headings plan shares
    assert set(named) <= set(record.model_fields) | decompose | {"config", "..."}


def test_the_examples_are_valid(monkeypatch):
    built = []
    for name, record in RECORDS.items():
        build = lambda record=record, **values: built.append(record.build(values))  # noqa: E731
        monkeypatch.setattr(lord_tune, name, build, raising=False)
    lines = [line for lines in EXAMPLES.values() for line in lines if "recipe.yaml" not in line]
    for line in lines:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line)[1:])
        assert stop.value.code == 0, line
    assert len(built) == len(lines) == 25


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_a_terminal_gets_panels():
    import pty

    host, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "dumb"}
    command = [sys.executable, "-m", "lord_tune", "plan", "--help"]
    running = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(host, 65536)
        except OSError:  # the end of a pseudo terminal on Linux
            part = b""
        if not part:
            break
        shown += part
    assert running.wait() == 0
    text = shown.decode()
    assert "\u256d\u2500 Common" in text and "[default: loss_weighted]" in " ".join(text.replace("\u2502", " ").split())
