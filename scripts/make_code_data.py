"""Write code_train.jsonl and code_heldout.jsonl into a folder: python scripts/make_code_data.py data

The text is the standard library of the Python that runs this (columns path, text), split by file.
"""

import sys
from pathlib import Path

from lord_tune.demo import standard_library_files, write_rows

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in zip(("code_train", "code_heldout"), standard_library_files(), strict=True):
        write_rows(files, folder / f"{name}.jsonl")
        print(f"wrote {folder / name}.jsonl: {len(files)} files")
