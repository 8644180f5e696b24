"""Write lord_tune/options.py and lord_tune/signatures.py: python scripts/make_options.py [--check]

The command line must not import torch to print its help, so what the dataclasses of `factorizations/`, `quantizers/`
and `allocation/` declare is written into a plain file, options.py. The records of config.py are built on it, and a type
checker cannot read them as keywords of the verbs, so these are written into signatures.py. --check writes nothing and
exits with 1 where a file is not up to date.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

from lord_tune.allocation import ALLOCATORS
from lord_tune.declared import Option, options_of
from lord_tune.exports.run import EXPORTS
from lord_tune.factorizations import METHODS
from lord_tune.quantizers import QUANTIZERS

PACKAGE = Path(__file__).resolve().parent.parent / "lord_tune"
DEFAULT_METHOD = "whitened"
HEAD = '''"""The names of methods, formats and allocators, and the options they declare.

Written by scripts/make_options.py: do not edit.

A method, a format or an allocator declares its options in its own file, with `option(...)`; see declared.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

'''

SIGNATURES_HEAD = '''"""The keyword arguments of the verbs, for type checkers and editors.

Written by scripts/make_options.py: do not edit.

What a verb takes by position is in its own signature, so it is missing here. `train` has no entry, because every
argument of trl's trainers is one of its keywords as well.
"""

from __future__ import annotations

from typing import Literal, TypedDict

'''


def family(name: str) -> str:
    """int for int2, int3, ...: what the formats of one kind are called together."""
    return re.sub(r"-?\d+$", "", name) if name not in METHODS and name != "nf4" else name


def source_of(annotation: Any) -> str:
    """The annotation as it is written."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(source_of(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return f"Literal[{', '.join(map(json.dumps, typing.get_args(annotation)))}]"
    if typing.get_args(annotation):
        return f"{annotation.__name__}[{', '.join(map(source_of, typing.get_args(annotation)))}]"
    return "None" if annotation is type(None) else annotation.__name__


def field_of(key: str, owners: dict[str, Option]) -> str:
    """The pydantic field of a key that these methods and formats share."""
    first = next(iter(owners.values()))
    annotation, default = source_of(first.annotation), first.default
    groups: dict[str, Any] = {family(name): item.default for name, item in owners.items()}
    helps = list(dict.fromkeys(item.help for item in owners.values()))
    text = f"{', '.join(groups)}: {'; '.join(helps)}"
    if len(set(map(repr, groups.values()))) > 1:  # each has its own
        annotation, default = f"{annotation} | None", None
        text += f"; default: {', '.join(f'{name} {value}' for name, value in groups.items())}"
    limits = "".join(f", {name}={value}" for name, value in first.limits.items())
    shown = json.dumps(default) if isinstance(default, str) else repr(default)
    lines = textwrap.wrap(text, 96, drop_whitespace=False, break_on_hyphens=False)
    return f"    {key}: {annotation} = Field({shown}{limits}, description=({' '.join(map(json.dumps, lines))}))"


def check_alike(key: str, owners: dict[str, Option]) -> None:
    """Exit where two owners of a key take other values: one field of a record stands for both."""
    (first, wanted), *others = owners.items()
    for name, item in others:
        if (item.annotation, item.limits) != (wanted.annotation, wanted.limits):
            sys.exit(f"error: {first} and {name} declare `{key}` with other types or limits; give one another key")


def formatted(text: str) -> str:
    formatter = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(PACKAGE / "made.py"), "-"]
    return subprocess.run(formatter, input=text, capture_output=True, text=True, check=True).stdout


def options_text() -> str:
    owners: dict[str, dict[str, Option]] = {}
    for name, owner in {**METHODS, **QUANTIZERS, **ALLOCATORS}.items():
        for item in options_of(owner):
            owners.setdefault(item.key, {})[name] = item
    methods = [DEFAULT_METHOD, *(name for name in METHODS if name != DEFAULT_METHOD)]
    quoted = {"Method": methods, "Quantized": list(QUANTIZERS), "Allocation": list(ALLOCATORS), "Export": list(EXPORTS)}
    lines = [f"{name} = Literal[{', '.join(map(json.dumps, names))}]" for name, names in quoted.items()]
    lines += ["", "", "class MethodOptions(BaseModel):", '    """What methods, formats and allocators declare."""', ""]
    for key, found in owners.items():
        check_alike(key, found)
        lines.append(field_of(key, found))
    families = {"METHOD_KEYS": METHODS, "FORMAT_KEYS": QUANTIZERS, "ALLOCATION_KEYS": ALLOCATORS}
    for title, family_of in families.items():
        keys = [key for key, found in owners.items() if next(iter(found)) in family_of]
        lines += ["", f"{title} = ({', '.join(map(json.dumps, keys))})"]
    return formatted(HEAD + "\n".join(lines) + "\n")


def signatures_text() -> str:
    """One TypedDict per verb; to be called when options.py is up to date."""
    from lord_tune.config import RECORDS  # built on options.py

    parts = []
    for verb, record in RECORDS.items():
        if record.model_config["extra"] == "allow":
            continue
        keys = {field.alias or name: field for name, field in record.model_fields.items()}
        lines = [f"class {verb.capitalize()}Options(TypedDict, total=False):", f'    """Keywords of `{verb}`."""', ""]
        kinds = {key: source_of(keys[key].annotation) for key in keys if key not in record.positional}
        # one name is a list of one (lord_tune/python_values.py)
        lines += [f"    {key}: {kind.replace('list[str]', 'str | list[str]')}" for key, kind in kinds.items()]
        parts.append("\n".join(lines))
    return formatted(SIGNATURES_HEAD + "\n\n\n".join(parts) + "\n")


def main() -> None:
    for name, made in (("options.py", options_text), ("signatures.py", signatures_text)):
        path, wanted = PACKAGE / name, made()
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif not path.is_file() or path.read_text() != wanted:
            print(f"error: lord_tune/{name} is not up to date; run python scripts/make_options.py", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
