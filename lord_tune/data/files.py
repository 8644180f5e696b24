"""From a name to a dataset: rows of data files, text and code, folders and patterns of either, Hub datasets.

`datasets` reads the formats. What it does not do as a reader expects is done here: CSV columns stay the text that the
file holds (pandas would make numbers of them and nothing of "NA"), a text file is one row, and a file that cannot be
read is told of in one sentence, with its line where it has lines.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import json
import logging
import lzma
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import LordError, LordWarning, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

ROW_FILES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_UNPACK: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TEXT_FILES = {".txt", ".text", ".md", ".rst", ".tex", ".log", ".html", ".xml", ".py", ".c", ".zip", ".tar"}
_BESIDE = re.compile(r"(readme|license|licence)(\..*)?", re.IGNORECASE)  # belong to a folder and are not its content


def load_rows(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """The rows of a data file, of text (one row per file, in the column `text`), of a folder, of all files of a pattern
    (data/*.csv), or of a Hub dataset.

    `split`, `config`: of a Hub dataset or a folder of data files; other files have the split train alone. Raises
    UsageError, in one sentence, for what does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    check_there(source)
    if not path.exists() and is_hub_id(source):
        return _load(source, source, config, split=split)
    if not path.exists() and glob.has_magic(source):
        return _matches(source, split, config)
    if path.is_file() and config is not None:
        raise UsageError(f"dataset_config {config} has no effect on the file {source}; remove it.")
    if path.is_dir():
        return _folder(path, source, split, config)
    return _data_file(path, source, split) if row_kind(path) else _texts([path], source, split)


def check_there(source: str) -> None:
    """UsageError for a file that does not exist; patterns and names of the Hub are not looked up."""
    path = Path(source).expanduser()
    if path.exists() or is_hub_id(source) or glob.has_magic(source):
        return
    what = "data" if row_kind(path) else "text"
    raise UsageError(f"The {what} file {source} does not exist; check the path.")


def local_paths(source: str) -> list[Path]:
    """The file or folder of this name, or the files that the pattern matches; nothing for a Hub dataset."""
    path = Path(source).expanduser()
    if path.exists() or not glob.has_magic(source):
        return [path] if path.exists() else []
    found = (Path(match) for match in sorted(glob.glob(str(path), recursive=True)))
    return [match for match in found if match.is_file()]


def row_kind(path: Path) -> str | None:
    """The loader of `datasets` for a file of rows, compressed or not; None for text."""
    bare = path.with_suffix("") if path.suffix.lower() in _UNPACK else path
    return ROW_FILES.get(bare.suffix.lower())


def is_hub_id(source: str) -> bool:
    """Whether a name is meant for the Hub: nothing local has it, and it is a bare word, or org/name without the suffix
    of a file; a dataset's name may hold dots."""
    path = Path(source).expanduser()
    if path.exists() or row_kind(path) or glob.has_magic(source):
        return False
    suffix = path.suffix.lower()
    named = re.fullmatch(r"[\w\-][\w.\-]*/[\w.\-]+", source) and suffix not in _TEXT_FILES and suffix not in _UNPACK
    return bool(named) or re.fullmatch(r"[\w\-]+", source) is not None


def _data_file(path: Path, source: str, split: str) -> Dataset:
    options: dict[str, Any] = {}
    if path.stat().st_size == 0:
        raise UsageError(f"The dataset '{source}' is empty; give rows.")
    if row_kind(path) == "csv":
        options = _csv_options(path, source)
    try:
        return _load(source, str(row_kind(path)), None, data_files=str(path.resolve()), split=split, **options)
    except LordError as error:
        if "Unknown split" not in str(error):
            defect = _defect(path)
            if defect is not None:
                raise UsageError(f"The dataset '{source}' {defect}.") from error
        raise


def _csv_options(path: Path, source: str) -> dict[str, Any]:
    """All columns as the text that the file holds."""
    import datasets

    tab = path.name.lower().split(".")[-2 if path.suffix.lower() in _UNPACK else -1] == "tsv"
    separator = "\t" if tab else ","
    with _readable(path, source), _open(path) as stream:
        try:
            names = next(csv.reader(stream, delimiter=separator), [])
        except csv.Error as error:
            raise UsageError(f"The dataset '{source}' has no first line with names of columns: {error}.") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"The dataset '{source}' has two columns named '{twice}'; rename one of them.")
    columns = datasets.Features({name: datasets.Value("string") for name in names})
    return {"sep": separator, "na_filter": False, "features": columns}


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    """`datasets` logs an error beside the one it raises; ours is one sentence."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _load(source: str, kind: str, config: str | None, **options: Any) -> Dataset:
    """datasets.load_dataset; whatever it raises becomes a UsageError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        with _without_log("datasets"):
            return datasets.load_dataset(kind, config, **options)
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise UsageError(f"The dataset '{source}' is empty; give rows.") from error
        # the libraries below raise dozens of types for one cause: the file or id is unusable
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UsageError(f"The dataset '{source}' could not be read: {reason[:300]}") from error


def _defect(path: Path) -> str | None:
    """What is wrong with a file of rows that could not be read, as the end of a sentence; None if unknown."""
    if row_kind(path) not in ("json", "csv"):
        return None
    try:
        with _open(path) as stream:
            if ".json" in path.suffixes or row_kind(path) == "csv":
                return None if stream.read().strip() not in ("", "[]", "{}") else "is empty; give rows"
            for number, line in enumerate(stream, 1):
                wrong = _line_defect(line) if line.strip() else None
                if wrong is not None:
                    return f"is damaged: line {number} {wrong}; correct or remove that line"
    except UnicodeDecodeError:
        return _NOT_UTF8
    except (OSError, EOFError, lzma.LZMAError) as error:
        return f"could not be unpacked: {error}"
    return None


def _line_defect(line: str) -> str | None:
    names: list[str] = []

    def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in found]
        names.extend(key for key in keys if keys.count(key) > 1)
        return dict(found)

    try:
        row = json.loads(line, object_pairs_hook=pairs)
    except ValueError as error:
        return f"is not JSON ({error})"
    if not isinstance(row, dict):
        return "is not an object with columns as its keys"
    if names:
        return f"names '{names[0]}' twice"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    return None


_NOT_UTF8 = "is not UTF-8 text; convert it (for example with iconv), or give a text or data file"


def _open(path: Path) -> IO[str]:
    """A stream of the text of a file, compressed or not, without a mark of its byte order; newlines become \\n."""
    unpack = _UNPACK.get(path.suffix.lower())
    if unpack is not None:
        return unpack(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


@contextmanager
def _readable(path: Path, source: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} {_NOT_UTF8}.") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UsageError(f"{source} could not be unpacked: {error}; fetch it again.") from error


def _text(path: Path, name: str) -> str:
    """A whole text file; UsageError if it is none."""
    with _readable(path, name), _open(path) as stream:
        text = stream.read()
    if "\0" in text:
        raise UsageError(f"{name} holds NUL characters, so it is not text; give a text or data file.")
    return text


def _texts(paths: list[Path], source: str, split: str) -> Dataset:
    """One row per file. Of several, those that are not text are left out, with a warning."""
    import datasets

    if split != "train":
        raise UsageError(f"{source} is text, which has the split train alone; got {split}.")
    texts: list[str] = []
    refused: list[str] = []
    for path in paths:
        try:
            texts.append(_text(path, source if len(paths) == 1 else str(path)))
        except UsageError as error:
            if len(paths) == 1:
                raise
            refused.append(str(error))
    if not texts:
        raise UsageError(f"{source} is a folder without text; give its files, or another folder.")
    if refused:
        _warn(f"{source}: {len(refused):,} of {len(paths):,} files are left out; the first: {refused[0]}")
    if len(texts) == 1 and not texts[0].strip():
        raise UsageError(f"{source} is empty; give files with text in them.")
    return datasets.Dataset.from_dict({"text": texts}, features=datasets.Features({"text": datasets.Value("string")}))


def _folder(path: Path, source: str, split: str, config: str | None) -> Dataset:
    """A folder that `datasets` saved, one of data files, or one of text and code."""
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if config is not None:
            raise UsageError(f"dataset_config {config} has no effect on the saved dataset {source}; remove it.")
        try:
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        except Exception as error:  # of many types, for one cause
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"The dataset '{source}' could not be read: {reason[:300]}") from error
    visible = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p.relative_to(path))]
    content = [p for p in visible if not _BESIDE.fullmatch(p.name)]
    rows, other = [p for p in content if row_kind(p)], [p for p in content if not row_kind(p)]
    if any(p.suffix == ".safetensors" for p in other):
        raise UsageError(f"{source} is the folder of a model; give its files that hold text, or another folder.")
    if rows and not other:
        return _load(source, str(path.resolve()), config, split=split, **_options_of_all(rows, source))
    return _mixed(visible, rows, source, split, config)


def _matches(source: str, split: str, config: str | None) -> Dataset:
    """All files of a pattern, as if they were a folder."""
    found = local_paths(source)
    rows = [path for path in found if row_kind(path)]
    if not found:
        raise UsageError(f"No file matches {source}; check the pattern.")
    if len(rows) < len(found):
        return _mixed(found, rows, source, split, config)
    if config is not None:
        raise UsageError(f"dataset_config {config} has no effect on the files {source}; remove it.")
    if len(found) == 1:
        return _data_file(found[0], source, split)
    empty = next((path for path in rows if path.stat().st_size == 0), None)
    if empty is not None:
        raise UsageError(f"The dataset '{empty}' is empty; give rows, or remove it.")
    options = _options_of_all(rows, source)
    files = [glob.escape(str(path.resolve())) for path in rows]
    try:
        return _load(source, str(row_kind(rows[0])), None, data_files=files, split=split, **options)
    except LordError as error:
        if "Unknown split" not in str(error):
            for path in rows:
                defect = _defect(path)
                if defect is not None:
                    raise UsageError(f"The dataset '{path}' {defect}.") from error
        raise


def _mixed(paths: list[Path], rows: list[Path], source: str, split: str, config: str | None) -> Dataset:
    """Text, among which files of rows may lie. rows: those of `paths`."""
    other = [path for path in paths if path not in rows and not _BESIDE.fullmatch(path.name)] or paths
    if config is not None:
        raise UsageError(f"dataset_config {config} has no effect on the text in {source}; remove it.")
    if any(row_kind(p) != "json" or ".json" not in p.suffixes for p in rows):
        raise UsageError(f"{source} holds both rows ({rows[0].name}) and text ({other[0].name}); give its files.")
    if rows:  # settings of a program
        _warn(f"{source}: {len(rows):,} JSON files are left out of a folder of text; the first is {rows[0].name}.")
    return _texts([p for p in paths if p not in rows], source, split)


def _options_of_all(paths: list[Path], source: str) -> dict[str, Any]:
    """How files of rows are read together; UsageError for files of which some would be left out or misread."""
    kinds = sorted({str(row_kind(path)) for path in paths})
    if len(kinds) > 1:
        raise UsageError(f"{source} holds files of the kinds {' and '.join(kinds)}; give those of one kind.")
    if kinds != ["csv"]:
        return {}
    options = [_csv_options(path, str(path)) for path in paths]
    for path, found in zip(paths, options, strict=True):
        if found != options[0]:
            raise UsageError(f"{paths[0]} and {path} have different columns; give one of them.")
    return options[0]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.parts)


def _warn(message: str) -> None:
    warnings.warn(message, LordWarning, stacklevel=4)
