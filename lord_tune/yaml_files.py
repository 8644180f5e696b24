"""YAML as people write it: 1e-5 is a number, `no` is a word where a word is wanted, and `~/x` is below the home folder.

PyYAML reads YAML 1.1, in which `save_strategy: no` is false, `1e-5` is text, `1:30` is 90 and `010` is 8. Here numbers
are those of YAML 1.2. A plain yes, no, on or off is left as the word where an option says what it takes; inside a
mapping (`fsdp_config: {offload_params: no}`), whose keys nobody declares, it is true or false.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError

_HOME = re.compile(r"~[\w.\-]*(/|$)")
_WORDS = {"yes": True, "on": True, "no": False, "off": False}
_RESOLVERS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("!word", r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "yYnNoO"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Word(str):
    """A plain yes, no, on or off."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 16 if text.startswith("0x") else 10)

    def word(self, node: yaml.ScalarNode) -> _Word:
        return _Word(self.construct_scalar(node))


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("!word", _Loader.word)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)


def load_yaml(path: str) -> dict[str, Any]:
    """A mapping from a YAML file."""
    file = Path(expand_home(path))
    if not file.is_file():
        raise UsageError(f"The config file {path} does not exist; check the path.")
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        line = str(error).strip().replace("\n", " ")
        raise UsageError(f"{path} is not valid YAML: {line[:300]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no keys; expected a YAML mapping (key: value).")
    return {str(key): _plain(value, inside=False) for key, value in content.items()}


def _plain(value: object, inside: bool) -> Any:
    """Words as text, or, `inside` a mapping, as true and false."""
    if isinstance(value, dict):
        return {str(key) if isinstance(key, str) else key: _plain(item, True) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, inside) for item in value]
    if isinstance(value, _Word):
        return _WORDS[value.lower()] if inside else str(value)
    return value


def expand_home(value: Any) -> Any:
    """Text that begins with ~/ or ~NAME/ as a path below that home folder; in lists and mappings too."""
    if isinstance(value, dict):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [expand_home(item) for item in value]
    if not isinstance(value, str | os.PathLike) or not _HOME.match(str(value)):
        return value
    found = os.path.expanduser(value)
    if str(found).startswith("~"):
        raise UsageError(f"The home folder in {value} is not known; write the whole path.")
    return found
