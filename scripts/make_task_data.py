"""Write the texts that the recipes of tasks read: python scripts/make_task_data.py data [--local NAME=FILE ...]

    c4.jsonl                            3,000 documents of C4 (text), to calibrate on
    rte_train.jsonl, rte_valid.jsonl    RTE (GLUE) as prompt + completion
    winogrande_train.jsonl, winogrande_valid.jsonl   WinoGrande XL as prompt + completion
    wikitext2_train.jsonl, wikitext2_valid.jsonl     WikiText-2 raw, an article a row (text)
    gsm8k_train.jsonl, gsm8k_test.jsonl GSM8K as prompt + completion, without the marks of its calculator

The rows come from the Hugging Face Hub. Where it cannot be reached, --local NAME=FILE takes rows of the same columns
from a .jsonl file instead (rte_valid=my/rte.jsonl); with --local, only the named files are written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def articles(rows: Iterable[Row]) -> Iterator[Row]:
    """WikiText's lines joined to articles, each of which begins with its title, `= Title =`."""
    lines: list[str] = []
    for row in rows:
        if re.match(r"^ = [^=].*[^=] = \n?$", row["text"]) and lines:
            yield {"text": "".join(lines)}
            lines = []
        lines.append(row["text"])
    yield {"text": "".join(lines)}


def of_text(row: Row) -> Row | None:
    return {"text": row["text"]} if row["text"].strip() else None


def of_rte(row: Row) -> Row | None:
    """Columns of GLUE (sentence1, sentence2) or of SuperGLUE (premise, hypothesis); label 0 is entailment."""
    premise, hypothesis = (row.get(a, row.get(b)) for a, b in (("sentence1", "premise"), ("sentence2", "hypothesis")))
    question = f"{premise}\nQuestion: {hypothesis} True or False?\nAnswer:"
    return {"prompt": question, "completion": " True" if int(row["label"]) == 0 else " False"}


def of_winogrande(row: Row) -> Row | None:
    """The sentence up to its gap, filled in, and what follows it."""
    before, gap, after = row["sentence"].partition("_")
    if not gap or row["answer"] not in ("1", "2"):
        return None
    return {"prompt": before + row[f"option{row['answer']}"], "completion": after}


def of_gsm8k(row: Row) -> Row | None:
    """The answer ends with its number, after ####."""
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {answer}"}


FILES: dict[str, tuple[str, str | None, str, Callable[[Row], Row | None], int | None]] = {
    "c4": ("allenai/c4", "en", "train", of_text, 3000),
    "rte_train": ("nyu-mll/glue", "rte", "train", of_rte, None),
    "rte_valid": ("nyu-mll/glue", "rte", "validation", of_rte, None),
    "winogrande_train": ("allenai/winogrande", "winogrande_xl", "train", of_winogrande, None),
    "winogrande_valid": ("allenai/winogrande", "winogrande_xl", "validation", of_winogrande, None),
    "gsm8k_train": ("openai/gsm8k", "main", "train", of_gsm8k, None),
    "gsm8k_test": ("openai/gsm8k", "main", "test", of_gsm8k, None),
    "wikitext2_train": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", of_text, None),
    "wikitext2_valid": ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", of_text, None),
}


def source_rows(name: str, local: str | None) -> Iterable[Row]:
    if local is not None:
        return (json.loads(line) for line in Path(local).read_text(encoding="utf-8").splitlines() if line.strip())
    from datasets import load_dataset

    source, config, split, _, _ = FILES[name]
    try:
        return load_dataset(source, config, split=split, streaming=name == "c4")
    except Exception as error:  # of half a dozen libraries, for one cause
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"error: {source} could not be read from the Hub ({reason}); use --local {name}=FILE"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local", nargs="+", default=[], metavar="NAME=FILE", help="rows from a file")
    arguments = parser.parse_args()
    local = dict(pair.split("=", 1) for pair in arguments.local if "=" in pair)
    for name in local:
        if name not in FILES:
            parser.error(f"{name} is not one of {', '.join(FILES)}")
    if len(local) < len(arguments.local):
        parser.error("--local wants NAME=FILE, each name once")
    for file in local.values():
        if not Path(file).is_file():
            parser.error(f"the file {file} does not exist; check the path")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in local or FILES:
        _, _, _, convert, limit = FILES[name]
        given = islice(source_rows(name, local.get(name)), limit)
        given = articles(given) if name.startswith("wikitext2") else given
        rows = [row for row in map(convert, given) if row is not None]
        temporary, target = (arguments.folder / f"{dot}{name}.jsonl" for dot in (".", ""))
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, target)
        print(f"wrote {target}: {len(rows)} rows")


if __name__ == "__main__":
    main()
