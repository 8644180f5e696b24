"""Odd and damaged rows, files and paths: each is taken as it is meant, or left out and told of, or refused in one
sentence with exit code 2. Calibration, evaluation and training (DPO: its own rows) do the same."""

from __future__ import annotations

import gzip
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny import code_document, tiny_tokenizer

from lord_tune.calibration.corpus import file_windows, token_windows
from lord_tune.cli import main
from lord_tune.data.texts import documents
from lord_tune.errors import LordWarning, UsageError
from lord_tune.training.data import prepare_rows
from lord_tune.training.preference import prepare_pairs

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'narrator' %}{{ raise_exception('no narrators') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
WHOLE = code_document(1)  # long enough for a window
GOOD = {"text": WHOLE}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]}
CHAT_TEXT = "system: Be brief.\nuser: hi\n"


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def said(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def folder(**files: bytes) -> dict[str, bytes]:
    return {name.replace("__", "."): content for name, content in files.items()}


def saved(path: Path) -> None:
    datasets.Dataset.from_list([GOOD]).save_to_disk(str(path))


def parquet(path: Path) -> None:
    datasets.Dataset.from_dict({"text": [None, WHOLE]}).to_parquet(str(path))


Content = bytes | dict[str, bytes] | Callable[[Path], None] | None
LATIN = "café ".encode("latin-1") * 99
# name of the file or folder, its content, the texts that are taken (or what is said when it is refused), what a
# warning says of rows or files that are left out
CASES: dict[str, tuple[str, Content, list[str] | str, str]] = {
    "null": ("a.jsonl", jsonl(GOOD, {"text": None}), [WHOLE], "1 of 2 rows of"),
    "null, named": ("a.jsonl", jsonl(GOOD, {"text": None}), [WHOLE], "row 2: 'text' is null, expected text"),
    "number": ("a.jsonl", jsonl(GOOD, {"text": 7}), [WHOLE], "row 2: 'text' is a number"),
    "numbers alone": ("a.jsonl", jsonl({"text": 1}, {"text": 2.5}), "None of the 2 rows of", ""),
    "text that is a number": ("a.jsonl", jsonl({"text": "7" * 90}, {"text": 7}), ["7" * 90], "row 2: 'text'"),
    "list": ("a.jsonl", jsonl(GOOD, {"text": ["a"]}), [WHOLE], "row 2: 'text' is a list"),
    "empty text": ("a.jsonl", jsonl({"text": ""}, GOOD), [WHOLE], "row 1: 'text' is empty"),
    "blank text": ("a.jsonl", jsonl({"text": " \n"}, GOOD), [WHOLE], "row 1: 'text' is blank"),
    "key missing": ("a.jsonl", jsonl(GOOD, {"id": 1}), [WHOLE], "row 2: 'text' is null"),
    "null in Parquet": ("a.parquet", parquet, [WHOLE], "row 1: 'text' is null"),
    "empty answer": (
        "a.jsonl",
        jsonl({"prompt": "p", "completion": ""}, {"prompt": "", "completion": WHOLE}),
        [WHOLE],
        "row 1: 'completion' is empty",
    ),
    "number as input": (
        "a.jsonl",
        jsonl({"instruction": "i", "input": 1, "output": WHOLE}, {"instruction": "i", "input": None, "output": WHOLE}),
        [f"### Instruction:\ni\n\n### Response:\n{WHOLE}"],
        "row 1: 'input' is a number",
    ),
    "prompt text, answer list": (
        "a.jsonl",
        jsonl({"prompt": "p", "completion": [user("x")]}, {"prompt": "p", "completion": WHOLE}),
        ["p" + WHOLE],
        "row 1: 'prompt' is text and 'completion' is a list",
    ),
    "chats among texts": (
        "a.jsonl",
        jsonl({"prompt": "p", "completion": WHOLE}, {"prompt": [user("a")], "completion": [user("b")]}),
        ["p" + WHOLE],
        "row 2: 'completion' holds messages, and that of earlier rows text",
    ),
    "empty conversation": ("a.jsonl", jsonl(CHAT, said()), [CHAT_TEXT], "row 2: 'messages' is empty"),
    "conversation as text": ("a.jsonl", jsonl(CHAT, {"messages": "hi"}), [CHAT_TEXT], "row 2: 'messages' is text"),
    "turn as text": ("a.jsonl", jsonl(CHAT, said("hi")), [CHAT_TEXT], "row 2: message 1 of 'messages' is text"),
    "turn without content": (
        "a.jsonl",
        jsonl(CHAT, said({"role": "user"})),
        [CHAT_TEXT],
        "message 1 of 'messages' has no",
    ),
    "turn without role": ("a.jsonl", jsonl(CHAT, said({"content": "x"})), [CHAT_TEXT], "of 'messages' has no role"),
    "content a number": ("a.jsonl", jsonl(CHAT, said(user(5))), [CHAT_TEXT], "has a number as its content"),
    "nobody says anything": ("a.jsonl", jsonl(CHAT, said(user(""))), [CHAT_TEXT], "no message of 'messages' says"),
    "image": (
        "a.jsonl",
        jsonl(CHAT, said(user([{"type": "image"}, {"type": "text", "text": "what?"}]))),
        [CHAT_TEXT],
        "row 2: message 1 of 'messages' holds a part of type image, but only text is read",
    ),
    "images alone": (
        "a.jsonl",
        jsonl(said(user([{"type": "image_url"}]))),
        "part of type image_url, but only text",
        "",
    ),
    "column of images": ("a.jsonl", jsonl(GOOD | {"images": ["a.png"]}), "has a column images", ""),
    "parts that the template prints": (
        "a.jsonl",
        jsonl(said(user([{"type": "text", "text": "x"}]))),
        "prints lists of parts as they are",
        "",
    ),
    "role that the template refuses": (
        "a.jsonl",
        jsonl(CHAT, said({"role": "narrator", "content": "x"})),
        [CHAT_TEXT],
        "row 2: the chat template does not take it: no narrators",
    ),
    "tools that are not JSON": ("a.jsonl", jsonl(CHAT | {"tools": "[x"}), "'tools' is text but not JSON", ""),
    "tools a mapping": ("a.jsonl", jsonl(CHAT | {"tools": {"a": 1}}), "'tools' is a mapping, expected a list", ""),
    "no options of the template": (
        "a.jsonl",
        jsonl(CHAT | {"chat_template_kwargs": {"a": 1}}, CHAT | {"chat_template_kwargs": None}),
        [CHAT_TEXT] * 2,
        "",
    ),
    "ShareGPT": ("a.jsonl", jsonl({"conversations": [{"from": "human", "value": "hi"}]}), ["human: hi\n"], ""),
    "Latin-1 text": ("a.txt", LATIN, "is not UTF-8 text", ""),
    "Latin-1 rows": ("a.jsonl", b'{"text": "' + LATIN + b'"}\n', "is not UTF-8 text", ""),
    "Latin-1 CSV": ("a.csv", b"text\n" + LATIN, "is not UTF-8 text", ""),
    "UTF-16 rows": ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "is not UTF-8 text", ""),
    "byte order mark, text": ("a.txt", b"\xef\xbb\xbf" + WHOLE.encode(), [WHOLE], ""),
    "byte order mark, rows": ("a.jsonl", b"\xef\xbb\xbf" + jsonl(GOOD), [WHOLE], ""),
    "byte order mark, CSV": ("a.csv", b"\xef\xbb\xbftext\r\n" + b"x" * 90 + b"\r\n", ["x" * 90], ""),
    "CRLF text": ("a.txt", WHOLE.replace("\n", "\r\n").encode(), [WHOLE], ""),
    "CRLF rows": ("a.jsonl", jsonl(GOOD, GOOD).replace(b"\n", b"\r\n"), [WHOLE] * 2, ""),
    "gzip text": ("a.txt.gz", gzip.compress(WHOLE.encode()), [WHOLE], ""),
    "gzip rows": ("a.jsonl.gz", gzip.compress(jsonl(GOOD)), [WHOLE], ""),
    "gzip CSV": ("a.csv.gz", gzip.compress(b"text,n\n" + b"y" * 90 + b",1\n"), ["y" * 90], ""),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(jsonl(*[GOOD] * 99))[:-20], "could not be unpacked", ""),
    "gzip that is none": ("a.txt.gz", WHOLE.encode(), "could not be unpacked", ""),
    "CSV keeps text": ("a.csv", b'text,n\n0012,1\nNA,2\n"a\nb",3\n', ["0012", "NA", "a\nb"], ""),
    "CSV empty field": ("a.csv", b"text,n\nabc,1\n,2\n", ["abc"], "row 2: 'text' is empty"),
    "CSV with a field too many": ("a.csv", b"text,n\na,1\nb,2,3\n", "line 3", ""),
    "CSV with two columns of a name": ("a.csv", b"text,text\na,b\n", "two columns named 'text'", ""),
    "TSV": ("a.tsv", b"prompt\tcompletion\np, \tc\n", ["p, c"], ""),
    "folder of text": ("f", folder(a__txt=b"one " * 30, b__py=b"two " * 30), ["one " * 30, "two " * 30], ""),
    "folder of code, with a picture": (
        "f",
        folder(a__py=b"a = 1\n" * 20, b__png=b"\x89PNG\0"),
        ["a = 1\n" * 20],
        "1 of 2 files",
    ),
    "folder of code, with settings": (
        "f",
        folder(a__py=b"a = 1\n" * 20, b__json=b"{}"),
        ["a = 1\n" * 20],
        "1 JSON files",
    ),
    "folder of rows": (
        "f",
        folder(train__jsonl=jsonl(GOOD), test__jsonl=jsonl({"text": "no"}), README__md=b"x"),
        [WHOLE],
        "",
    ),
    "folder of CSV": ("f", folder(train__csv=b"text\n0012\n", test__csv=b"text\nno\n"), ["0012"], ""),
    "folder of a dataset": ("f", saved, [WHOLE], ""),
    "folder of rows and text": (
        "f",
        folder(a__jsonl=jsonl(GOOD), b__txt=b"x"),
        "holds both rows (a.jsonl) and text",
        "",
    ),
    "folder of two kinds of rows": (
        "f",
        folder(a__jsonl=jsonl(GOOD), b__csv=b"text\nx\n"),
        "the kinds csv and json",
        "",
    ),
    "empty folder": ("f", {}, "is a folder without text", ""),
    "line that is no JSON": ("a.jsonl", jsonl(GOOD) + b'{"text": "b', "damaged: line 2 is not JSON", ""),
    "line that is a list": ("a.jsonl", b'["a"]\n["b"]\n', "line 1 is not an object", ""),
    "key twice": ("a.jsonl", b'{"text":"a","text":"b"}\n', "line 1 names 'text' twice", ""),
    "half a surrogate pair": ("a.jsonl", b'{"text":"\\ud800"}\n', "line 1 holds half of a surrogate pair", ""),
    "blank lines": ("a.jsonl", jsonl(GOOD) + b"\n\n" + jsonl(GOOD), [WHOLE] * 2, ""),
    "NUL characters": ("a.txt", b"ab\0" * 40, "NUL characters", ""),
    "a very long line": ("a.jsonl", jsonl({"text": "long line " * 250_000}), ["long line " * 250_000], ""),
    "no file": ("missing/a.parquet", None, "does not exist", ""),
    "no folder": ("missing/folder", None, "does not exist", ""),
}


def write(path: Path, content: Content) -> str:
    if callable(content):
        content(path)
    elif isinstance(content, dict):
        path.mkdir()
        for name, inside in content.items():
            (path / name).write_bytes(inside)
    elif content is not None:
        path.write_bytes(content)
    return str(path)


def chatty() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def told(work: Callable[[], Any]) -> tuple[Any, str, list[str]]:
    """(result, the error's message, the warnings) of some work."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, error = work(), ""
        except UsageError as refused:
            result, error = None, str(refused)
            assert refused.exit_code == 2
    return result, error, [str(entry.message) for entry in caught if issubclass(entry.category, LordWarning)]


def joined(row: dict[str, Any], tokenizer: Any) -> str:
    turns = row.get("prompt", []) + row["messages"] if "messages" in row else None
    if turns is not None:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    return row.get("text") or row["prompt"] + row["completion"]


@pytest.mark.parametrize("case", CASES)
def test_odd_rows_are_taken_told_of_or_refused_everywhere_alike(case, tmp_path, llama_dir, capfd, monkeypatch):
    name, content, expected, warned = CASES[case]
    source, tokenizer = write(tmp_path / name, content), chatty()
    plain = case in ("empty answer", "number as input", "prompt text, answer list", "chats among texts", "TSV")
    calibrated, error, told_of = told(lambda: documents([source], tokenizer, plain))
    trained, error_of_training, told_in_training = told(
        lambda: prepare_rows(source, "train", None, tokenizer, plain=plain)[0]
    )
    assert error == error_of_training and told_of == told_in_training
    if isinstance(expected, str):
        assert expected in error and len(error.splitlines()) == 1, error
    else:
        assert not error and calibrated == expected
        assert [joined(row, tokenizer) for row in trained] == expected
        windows, _, told_in_evaluation = told(lambda: file_windows(source, tokenizer, 32, 64, plain))
        assert told_in_evaluation == told_of and windows.numel() > 0
        assert len(told_of) == (1 if warned else 0) and warned in "".join(told_of)
    if "chat" in error or (isinstance(expected, list) and any(":" in text[:9] for text in expected)):
        return  # the model of the command below has no chat template
    monkeypatch.setattr("lord_tune.evaluation.run.speed", lambda model, window: 1.0)  # it takes most of the time
    model = str(llama_dir)
    words = ["evaluate", model, "--text", source, "--context-length", "32", "--max-tokens", "64"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    stderr = capfd.readouterr().err
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in stderr and "--debug" not in stderr
    assert stop.value.code == (2 if isinstance(expected, str) else 0) and len(errors) == isinstance(expected, str)


A, B = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
PAIRS: dict[str, tuple[list[dict[str, Any]], int | str, str]] = {
    "null": ([PAIR, PAIR | {"rejected": None}], 1, "row 2: 'rejected' is null"),
    "empty": ([PAIR, PAIR | {"chosen": ""}], 1, "row 2: 'chosen' is empty"),
    "the same": ([PAIR, PAIR | {"rejected": "good"}], 1, "row 2: 'chosen' and 'rejected' are the same"),
    "kinds": ([PAIR | {"chosen": A, "rejected": B}], "row 1: 'prompt' is text and 'chosen' is a list", ""),
    "prompt inside": ([{"chosen": [user("q"), *A], "rejected": [user("q"), *B]}], 1, ""),
    "no prompt": ([{"chosen": A, "rejected": B}], "begin differently", ""),
    "image": ([{"prompt": [user([{"type": "image"}])], "chosen": A, "rejected": B}], "part of type image", ""),
    "columns": ([{"text": "x"}], "expects prompt, chosen and rejected", ""),
}


@pytest.mark.parametrize("case", PAIRS)
def test_odd_pairs_are_taken_told_of_or_refused(case, tmp_path):
    rows, expected, warned = PAIRS[case]
    source = write(tmp_path / "a.jsonl", jsonl(*rows))
    found, error, told_of = told(lambda: prepare_pairs(source, "train", None, chatty()))
    if isinstance(expected, str):
        assert expected in error and len(error.splitlines()) == 1, error
    else:
        assert not error and len(found) == expected and warned in "".join(told_of) and bool(told_of) == bool(warned)


def test_rows_that_sft_cannot_use_are_refused_or_left_out(tmp_path):
    tokenizer = chatty()
    pairs, chats = (
        write(tmp_path / "a.jsonl", jsonl(PAIR)),
        write(tmp_path / "b.jsonl", jsonl(CHAT, said(user("q"), *A))),
    )
    with pytest.raises(UsageError, match="set objective: dpo"):
        prepare_rows(pairs, "train", None, tokenizer)
    with pytest.warns(LordWarning, match="row 1: no message of 'messages' is an assistant's"):
        rows, _ = prepare_rows(chats, "train", None, tokenizer, assistant_only=True)
    assert len(rows) == 1
    with pytest.raises(UsageError, match="assistant_only_loss needs chats"):
        prepare_rows(write(tmp_path / "c.jsonl", jsonl(GOOD)), "train", None, tokenizer, assistant_only=True)
    code = write(tmp_path / "d.jsonl", jsonl({"code": "x", "text": "y"}))
    assert prepare_rows(code, "train", None, tokenizer, text="code")[0][:] == {"code": ["x"]}


def test_two_hundred_thousand_short_documents_take_ten_times_as_long_as_twenty_thousand(tmp_path):
    """Linear in the documents; a quadratic part would make it a hundred times, so 30 leaves room for a busy machine."""

    class Letters:
        eos_token_id = 0

        def __call__(self, text: str, verbose: bool = False) -> dict[str, list[int]]:
            return {"input_ids": list(map(ord, text))}

    def seconds(count: int) -> float:
        source = write(tmp_path / f"{count}.jsonl", b'{"text": "a short document"}\n' * count)
        start = time.process_time()
        texts = documents([source])
        token_windows(texts, Letters(), 16 * count, count, 128, 0)
        assert len(texts) == count
        return time.process_time() - start

    seconds(1000)  # imports
    assert seconds(200_000) < 30 * seconds(20_000)
