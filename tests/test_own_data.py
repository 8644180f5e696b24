"""Own data as it comes: every form and kind of file in calibration, evaluation and training, and what is said of it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny import EOS, code_document, save_tiny, tiny_llama, tiny_tokenizer

import lord_tune
from lord_tune.data.files import load_rows, local_paths
from lord_tune.data.texts import documents, texts_of
from lord_tune.errors import UsageError
from lord_tune.training.data import prepare_rows, rows_sha256

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}" + EOS + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = [code_document(number) for number in range(6)]
ASKED = [f"Write function {number}." for number in range(6)]

Rows = list[dict[str, Any]]
FORMS: dict[str, Rows] = {
    "text": [{"text": text} for text in TEXTS],
    "messages": [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]}
        for asked, text in zip(ASKED, TEXTS, strict=True)
    ],
    "conversations": [
        {"conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": text}]}
        for asked, text in zip(ASKED, TEXTS, strict=True)
    ],
    "completion": [{"prompt": a, "completion": text} for a, text in zip(ASKED, TEXTS, strict=True)],
    "response": [{"prompt": a, "response": text} for a, text in zip(ASKED, TEXTS, strict=True)],
    "alpaca": [{"instruction": a, "input": "", "output": text} for a, text in zip(ASKED, TEXTS, strict=True)],
    "pairs": [{"prompt": a, "chosen": text, "rejected": "no"} for a, text in zip(ASKED, TEXTS, strict=True)],
}
CHATS = [f"<user>{asked}<assistant>{text}{EOS}" for asked, text in zip(ASKED, TEXTS, strict=True)]
EXPECTED = {"text": TEXTS, "pairs": [a + text for a, text in zip(ASKED, TEXTS, strict=True)]}


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_table(rows: Rows, delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def by_datasets(path: Path, kind: str) -> None:
    made = datasets.Dataset.from_list(FORMS["text"])
    if kind == "arrow":
        made.save_to_disk(str(path.parent / "saved"))
        shutil.copy(next((path.parent / "saved").glob("*.arrow")), path)
        shutil.rmtree(path.parent / "saved")
    else:
        made.to_parquet(str(path))


def write(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


ROWS, TABLE = as_jsonl(FORMS["text"]), as_table(FORMS["text"], ",")
# name that is given -> what writes it; relative to a folder
FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "JSONL": ("a.jsonl", lambda f: write(f, "a.jsonl", ROWS)),
    "JSON": ("a.json", lambda f: write(f, "a.json", json.dumps(FORMS["text"]).encode())),
    "CSV": ("a.csv", lambda f: write(f, "a.csv", TABLE)),
    "TSV": ("a.tsv", lambda f: write(f, "a.tsv", as_table(FORMS["text"], "\t"))),
    "Parquet": ("a.parquet", lambda f: by_datasets(f / "a.parquet", "parquet")),
    "Arrow": ("a.arrow", lambda f: by_datasets(f / "a.arrow", "arrow")),
    "gzip JSONL": ("a.jsonl.gz", lambda f: write(f, "a.jsonl.gz", gzip.compress(ROWS))),
    "gzip CSV": ("a.csv.gz", lambda f: write(f, "a.csv.gz", gzip.compress(TABLE))),
    "text": ("a.txt", lambda f: write(f, "a.txt", "".join(TEXTS).encode())),
    "Markdown": ("a.md", lambda f: write(f, "a.md", "".join(TEXTS).encode())),
    "code": ("a.py", lambda f: write(f, "a.py", "".join(TEXTS).encode())),
    "another ending": ("a.rb", lambda f: write(f, "a.rb", "".join(TEXTS).encode())),
    "gzip text": ("a.txt.gz", lambda f: write(f, "a.txt.gz", gzip.compress("".join(TEXTS).encode()))),
    "mark of byte order": ("a.csv", lambda f: write(f, "a.csv", b"\xef\xbb\xbf" + TABLE)),
    "folder of code": (
        "code",
        lambda f: [write(f, f"code/deep/{number}.py", text.encode()) for number, text in enumerate(TEXTS)],
    ),
    "folder of CSV": (
        "rows",
        lambda f: [write(f, f"rows/{n}.csv", as_table(FORMS["text"][n : n + 1], ",")) for n in range(6)],
    ),
    "pattern of CSV": (
        "[abc]*.csv",
        lambda f: [write(f, f"a{n}.csv", as_table(FORMS["text"][n : n + 1], ",")) for n in range(6)],
    ),
    "pattern of JSONL": (
        "**/*.jsonl",
        lambda f: [write(f, f"{n} [x]/a.jsonl", as_jsonl(FORMS["text"][n : n + 1])) for n in range(6)],
    ),
    "pattern of text": (
        "?.txt",
        lambda f: [write(f, f"{number}.txt", text.encode()) for number, text in enumerate(TEXTS)],
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, and a chat template."""
    folder = save_tiny(tiny_llama(layers=1), tmp_path_factory.mktemp("models") / "chatty")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def factored(model: Path) -> Path:
    out = model.parent / "factored"
    lord_tune.decompose(str(model), str(out), method="svd", rank=4)
    return out


@pytest.fixture
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def in_all_verbs(source: str, model: Path, factored: Path, out: Path, **train: Any) -> list[dict[str, Any]]:
    """What decompose, evaluate and train report of this source."""
    text = {"context_length": 32, "calibration_tokens": 256}
    report = lord_tune.decompose(str(model), str(out / "made"), calibration=[source], rank=4, **text)
    measured = lord_tune.evaluate(str(factored), [source], context_length=32, max_tokens=128)
    steps = {"max_steps": 1, "max_length": 64, "per_device_train_batch_size": 1, "save_strategy": "no"}
    trained = lord_tune.train(
        model_name_or_path=str(factored), dataset_name=source, output_dir=str(out / "trained"), **steps, **train
    )
    return [report, measured, trained]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore::lord_tune.errors.LordWarning")
def test_every_kind_of_file_serves_all_three_verbs(kind, model, factored, tmp_path, capfd):
    name, make = FILES[kind]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    source = str(tmp_path / "data" / name)
    report, measured, trained = in_all_verbs(source, model, factored, tmp_path)
    assert report["calibration"]["source"] == [source] and report["calibration"]["tokens"] == 256
    assert list(measured["texts"]) == [source] and trained["steps"] == 1
    told = capfd.readouterr()
    rows = len(load_rows(source))
    first = documents([source])[0]
    line = f"{source}: {rows} row{'s' * (rows != 1)}, recognised as text; the first: {first[:72] + '...'!r}"
    assert told.err.splitlines().count(line) == 2  # calibration, evaluation
    assert f"data: {source}: {rows} row" in told.out and "⟦def " in told.out


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore::lord_tune.errors.LordWarning")
def test_every_kind_of_file_holds_the_same_text(kind, tmp_path, tokenizer):
    """A table is rows, never prose: neither its header nor its quotes are in the text."""
    name, make = FILES[kind]
    make(tmp_path)
    source = str(tmp_path / name)
    assert "".join(documents([source], tokenizer)) == "".join(TEXTS)
    rows, form = prepare_rows(source, "train", None, tokenizer)
    assert "".join(rows["text"]) == "".join(TEXTS) and str(form) == "text"
    assert rows_sha256(source) is not None


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::lord_tune.errors.LordWarning")
def test_every_form_of_rows_serves_all_three_verbs(form, model, factored, tmp_path, capfd):
    write(tmp_path, "a.jsonl", as_jsonl(FORMS[form]))
    objective = {"objective": "dpo"} if form == "pairs" else {}
    report, measured, trained = in_all_verbs(str(tmp_path / "a.jsonl"), model, factored, tmp_path, **objective)
    assert report["calibration"]["tokens"] == 256 and trained["steps"] == 1
    assert measured["texts"][str(tmp_path / "a.jsonl")]["tokens"] > 0
    told = capfd.readouterr()
    by_template = "by the model's chat template" in told.out
    assert by_template == (form in ("completion", "response", "alpaca")) == ("by the model's chat" in told.err)


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_rendered_by_the_template_where_there_is_one(form, tmp_path, tokenizer):
    write(tmp_path, "a.jsonl", as_jsonl(FORMS[form]))
    source = str(tmp_path / "a.jsonl")
    assert documents([source], tokenizer) == EXPECTED.get(form, CHATS)
    if form == "pairs":
        with pytest.raises(UsageError, match="pairs of answers, prompt . chosen . rejected; set objective: dpo"):
            prepare_rows(source, "train", None, tokenizer)
        return
    rows, _ = prepare_rows(source, "train", None, tokenizer)
    turns = [row.get("prompt", []) + (row.get("messages") or row.get("completion") or []) for row in rows]
    if form != "text":
        assert [tokenizer.apply_chat_template(said, tokenize=False) for said in turns] == CHATS


@pytest.mark.parametrize("form", ["completion", "response", "alpaca"])
def test_plain_prompts_stay_plain_and_it_is_said(form, tmp_path, tokenizer):
    write(tmp_path, "a.jsonl", as_jsonl(FORMS[form]))
    source, told = str(tmp_path / "a.jsonl"), []
    plain = texts_of([source], tokenizer, True, told.append)[0]
    assert plain == documents([source], tiny_tokenizer())  # a model without a template
    assert not any(text.startswith("<user>") for text in plain)
    texts_of([source], tiny_tokenizer(), False, told.append)
    assert "text among them as it is; the first: " in told[0]
    assert "text among them as it is (the model has no chat template); the first: " in told[1]
    rows, _ = prepare_rows(source, "train", None, tokenizer, plain=True)
    assert [row["prompt"] + row["completion"] for row in rows] == plain


def test_an_alpaca_row_with_input_asks_for_both(tmp_path, tokenizer):
    write(tmp_path, "a.csv", as_table([{"instruction": "Add.", "input": "1, 2", "output": "3"}], ","))
    assert documents([str(tmp_path / "a.csv")], tokenizer) == [f"<user>Add.\n\n1, 2<assistant>3{EOS}"]


# name, content, what the sentence says
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "unknown columns": ("a.csv", b"code,id\nx,1\n", r"columns \['code', 'id'\]; expected text, or messages, or conv"),
    "binary": ("a.bin", bytes(range(256)), "is not UTF-8 text"),
    "binary with NUL": ("a.bin", b"abc\0def", "holds NUL characters"),
    "empty CSV": ("a.csv", b"", "is empty"),
    "header alone": ("a.csv", b"text\n", "is empty"),
    "empty text": ("a.txt", b"", "is empty"),
    "empty JSON": ("a.json", b"[]", "is empty"),
    "two encodings": ("a.csv", "text\ncafé\n".encode() + "café\n".encode("latin-1"), "is not UTF-8 text"),
    "UTF-16": ("a.txt", "plain text".encode("utf-16"), "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_sentence(case, tmp_path, tokenizer):
    name, content, says = REFUSED[case]
    write(tmp_path, name, content)
    for read in (
        lambda: documents([str(tmp_path / name)], tokenizer),
        lambda: prepare_rows(str(tmp_path / name), "train", None, tokenizer),
    ):
        with pytest.raises(UsageError, match=says) as refused:
            read()
        assert len(str(refused.value).splitlines()) == 1


def test_patterns_that_match_nothing_or_no_rows_of_one_kind_are_refused(tmp_path, tokenizer):
    write(tmp_path, "a.csv", TABLE)
    write(tmp_path, "b.jsonl", ROWS)
    write(tmp_path, "c.txt", b"some text")
    write(tmp_path, "d/1.csv", b"text\nx\n")
    write(tmp_path, "d/2.csv", b"")
    write(tmp_path, "e/1.jsonl", ROWS)
    write(tmp_path, "e/2.jsonl", b"{broken\n")
    for pattern, says in {
        "*.parquet": r"No file matches .*\*\.parquet; check the pattern",
        "[ab].*": "files of the kinds csv and json; give those of one kind",
        "*": "holds both rows .* and text",
        "d/*.csv": "2.csv' is empty",
        "e/*.jsonl": "2.jsonl' is damaged: line 1 is not JSON",
    }.items():
        with pytest.raises(UsageError, match=says):
            documents([str(tmp_path / pattern)], tokenizer)
    with pytest.raises(UsageError, match="dataset_config x has no effect"):
        load_rows(str(tmp_path / "[a].csv"), config="x")


def test_a_pattern_is_the_files_it_matches_now(tmp_path):
    write(tmp_path, "a.csv", TABLE)
    before = rows_sha256(str(tmp_path / "*.csv"))
    write(tmp_path, "b.csv", TABLE)
    assert before != rows_sha256(str(tmp_path / "*.csv")) is not None
    assert local_paths(str(tmp_path / "*.csv")) == [tmp_path / "a.csv", tmp_path / "b.csv"]
    assert len(load_rows(str(tmp_path / "*.csv"))) == 12


def test_a_file_of_exactly_this_name_comes_before_a_pattern(tmp_path, tokenizer):
    write(tmp_path, "a[1].txt", b"brackets")
    write(tmp_path, "a1.txt", b"one")
    assert documents([str(tmp_path / "a[1].txt")], tokenizer) == ["brackets"]


def test_patterns_have_weights(model, tmp_path):
    for number, text in enumerate(TEXTS):
        write(tmp_path, f"{number}.txt", text.encode())
    write(tmp_path, "a.csv", TABLE)
    given = [f"{tmp_path}/*.txt:3", f"{tmp_path}/a.csv:1"]
    text = {"context_length": 32, "calibration_tokens": 256}
    report = lord_tune.decompose(str(model), str(tmp_path / "out"), calibration=given, rank=4, **text)
    shares = {Path(name).name: share["tokens"] for name, share in report["calibration"]["mixture"].items()}
    assert shares == {"*.txt": 192, "a.csv": 64}
