"""The steps of a run, as the journal names them."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """The passes over the blocks."""

    FORWARD = "forward"
    CALIBRATING = "calibrating"
    SENSITIVITY = "sensitivity"
    MEASURING = "measuring"
    PROBING = "probing"
    SEARCHING = "searching"
    HEAD = "head"
    WRITING = "writing"


CHECKED = "checked"  # the walk over the blocks did what the model does
HEAD = "head-inputs"  # what the output head reads is summed up
REST = "rest"  # the shard of everything outside the blocks


def of_block(phase: Phase, index: int) -> str:
    return f"{phase}/{index}"


def start_of(phase: Phase) -> str:
    """The states in front of the first block are written."""
    return f"started-{phase}"


def is_block(step: str, phase: Phase | None = None) -> bool:
    """Whether a step finished a block (of this phase)."""
    before, slash, _ = step.partition("/")
    return bool(slash) and (phase is None or before == phase)
