"""Write code_train, code_heldout, prose_train and prose_heldout (.jsonl) into a folder:

    python scripts/make_code_data.py data

The code is the standard library of the Python that runs this, split by file (columns path, text). The prose is that
Python's language reference, split by topic (columns topic, text): about 72,000 and 14,000 tokens of SmolLM2.
"""

import hashlib
import json
import sys
from pathlib import Path

from lord_tune.demo import standard_library_files, write_rows

_HELD_OUT_SHARE = 5  # one topic in five is held out
_MIN_TOPIC = 1000  # characters


def language_reference() -> tuple[dict[str, str], dict[str, str]]:
    """(training, held-out) topic -> its text, split by a hash of the topic. Topics quote each other at length, so a
    paragraph is left to the longest one that has it."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit("error: this Python comes without pydoc_data; run another Python") from error
    seen: set[str] = set()
    split: tuple[dict[str, str], dict[str, str]] = {}, {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        new = {" ".join(paragraph.split()): paragraph for paragraph in topics[name].split("\n\n")}
        text = "\n\n".join(paragraph for key, paragraph in new.items() if key not in seen).strip() + "\n"
        seen |= new.keys()
        if len(text) >= _MIN_TOPIC:
            held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT_SHARE == 0
            split[held][name] = text
    return split


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in zip(("code_train", "code_heldout"), standard_library_files(), strict=True):
        write_rows(files, folder / f"{name}.jsonl")
        print(f"wrote {folder / name}.jsonl: {len(files)} files")
    for name, topics in zip(("prose_train", "prose_heldout"), language_reference(), strict=True):
        rows = [json.dumps({"topic": topic, "text": text}) + "\n" for topic, text in sorted(topics.items())]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"wrote {folder / name}.jsonl: {len(rows)} topics")
