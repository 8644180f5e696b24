"""Options that a method or a format declares in its own file, as fields of its dataclass.

    sink_weight: float = option(0.05, "extra weight of position-0 inputs in the Gram matrix", ge=0)

That line is all there is to an option: `scripts/make_options.py` makes the YAML key, the flag of the command line and
the keyword of Python from it (options.py), a run hands the value to the dataclass, and a value that the chosen method
and formats would ignore is refused. Several methods may share a key.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_type_hints

Value: TypeAlias = int | float | bool | str | None  # of an option
PLAIN, PIVOTED = "plain", "pivoted"  # how factors are stored: L and R, or factorizations/pivoting.py
FORMS = (PLAIN, PIVOTED)
# formats whose rows can be decoded one by one, for embeddings. lloyd is not among them: it clips outliers, which costs
# more than all else without a rotation (perplexity 22.6 on SmolLM2-135M where int4 has 10.8, and dense 9.23)
LOOKUPS = ("int8", "int4", "int3", "int2", "nf4", "e8-4", "e8-3", "e8-2")
Options: TypeAlias = dict[str, Value]  # field of a method's or format's dataclass -> value


@dataclass(frozen=True)
class Option:
    """One declared option."""

    key: str  # in YAML, on the command line and in Python
    field: str  # of the dataclass
    annotation: Any
    default: Any  # a Value
    help: str
    limits: dict[str, float]  # of ge, gt, le, lt
    at_rank_0: bool  # whether it does something where there is no L R
    without_q: bool  # whether it does something where there is no backbone


def option(
    default: Value,
    help: str,
    *,
    key: str | None = None,
    at_rank_0: bool = True,
    without_q: bool = True,
    **limits: float,
) -> Any:  # what dataclasses.field returns is Any too
    """A field of a method's or format's dataclass that users may set."""
    metadata = {"help": help, "key": key, "limits": limits, "at_rank_0": at_rank_0, "without_q": without_q}
    return field(default=default, metadata=metadata)


def options_of(owner: type) -> list[Option]:
    """What a method or a format declares."""
    hints = get_type_hints(owner)
    return [
        Option(
            item.metadata["key"] or item.name,
            item.name,
            hints[item.name],
            item.default,
            item.metadata["help"],
            dict(item.metadata["limits"]),
            item.metadata["at_rank_0"],
            item.metadata["without_q"],
        )
        for item in dataclasses.fields(owner)
        if "help" in item.metadata
    ]


def chosen(owner: type, config: object) -> Options:
    """Field -> value for every option that the record sets; None leaves the owner's default."""
    found = {item.field: getattr(config, item.key) for item in options_of(owner)}
    return {name: value for name, value in found.items() if value is not None}
