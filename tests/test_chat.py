"""`lord-tune chat`: what the model is asked, and what it would answer by itself."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import save_tiny, tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import lord_tune
from lord_tune.errors import UsageError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
GREEDY = {"max_new_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A decomposed model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(tiny_llama(), folder / "m")
    lord_tune.decompose(str(folder / "m"), str(folder / "d"), rank=8, method="svd")
    tokenizer = AutoTokenizer.from_pretrained(folder / "d")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "d")
    return folder / "d"


def continued(model, text, count=6):
    """What transformers generates after a text."""
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    made = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_one_prompt_is_put_into_the_template(model, tmp_path, capsys):
    found = lord_tune.chat(str(model), prompt="def f(", system="be brief", json=str(tmp_path / "a.json"), **GREEDY)
    assert found == [{"prompt": "def f(", "answer": continued(model, "<system>be brief<user>def f(<a>")}]
    assert found[0]["answer"] in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text()) == found


def test_every_prompt_of_a_file_is_asked_anew(model, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    found = lord_tune.chat(str(model), file=str(tmp_path / "p.txt"), **GREEDY)
    assert [entry["prompt"] for entry in found] == ["one", "two"]
    assert found[1]["answer"] == continued(model, "<user>two<a>")
    (tmp_path / "p.jsonl").write_text('{"prompt": "two", "completion": "no"}\n')
    assert lord_tune.chat(str(model), file=str(tmp_path / "p.jsonl"), **GREEDY) == found[1:]
    (tmp_path / "p.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(UsageError, match=r"Line 1 of \S+ is no row with a text `prompt`"):
        lord_tune.chat(str(model), file=str(tmp_path / "p.jsonl"), **GREEDY)


def test_typed_turns_remember_those_before(model, monkeypatch):
    typed = iter(["one", "two", "/reset", "three", "/exit", "four"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    found = lord_tune.chat(str(model), **GREEDY)
    assert [entry["prompt"] for entry in found] == ["one", "two", "three"]
    first, second, third = (entry["answer"] for entry in found)
    assert second == continued(model, f"<user>one<assistant>{first}<user>two<a>")
    assert third == continued(model, "<user>three<a>")


def test_the_oldest_turns_leave_where_they_do_not_fit(model, monkeypatch):
    """256 positions."""
    tokenizer, long = AutoTokenizer.from_pretrained(model), "x = 1; "
    while len(tokenizer(long)["input_ids"]) < 120:
        long += long
    assert len(tokenizer(long)["input_ids"]) < 240
    typed = iter([long, long + "y", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert lord_tune.chat(str(model), **GREEDY)[1]["answer"] == continued(model, f"<user>{long}y<a>")
    with pytest.raises(UsageError, match="shorten one of them"):
        lord_tune.chat(str(model), prompt="x " * 300, **GREEDY)


def test_a_typed_message_that_is_too_long_ends_nothing(model, monkeypatch, capsys):
    typed = iter(["x " * 300, "one", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert lord_tune.chat(str(model), **GREEDY)[0]["answer"] == continued(model, "<user>one<a>")
    assert "shorten one of them" in capsys.readouterr().out


def test_without_a_template_text_is_continued(model, tmp_path):
    plain = model.parent / "m"
    lord_tune.chat(str(plain), prompt="def f(", **GREEDY)
    with pytest.raises(UsageError, match="has no chat template"):
        lord_tune.chat(str(plain), prompt="def f(", system="be brief", **GREEDY)


def test_sampling_follows_the_seed(model):
    options = {"prompt": "def f(", "max_new_tokens": 12, "temperature": 2.0, "top_p": 0.99}
    first, again, other = (lord_tune.chat(str(model), seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other


def test_what_cannot_be_asked_is_refused(model, tmp_path):
    save_tiny(tiny_bert(), tmp_path / "bert")
    with pytest.raises(UsageError, match="does not continue text"):
        lord_tune.chat(str(tmp_path / "bert"), prompt="x")
    with pytest.raises(UsageError, match="pass one of them"):
        lord_tune.chat(str(model), prompt="x", file="y")
    with pytest.raises(UsageError, match="`top_p` has no effect"):
        lord_tune.chat(str(model), prompt="x", temperature=0, top_p=0.5)
    with pytest.raises(UsageError, match="does not exist or is empty"):
        lord_tune.chat(str(model), file=str(tmp_path / "none.txt"))
