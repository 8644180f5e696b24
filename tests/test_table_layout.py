"""Tables at 80 columns: numbers and words of headings stay whole, names break where their parts end."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from lord_tune.table_layout import broken, fitted, widths_within

LAYER = ["model.layers.31.self_attn.q_proj", "18944x3584", "dense", "lloyd2", "16.00", "0.0381", "0.0420", "0.0793"]
INSPECT = ["layer", "shape", "rank", "backbone", "bits/weight", "calibrated", "held-out", "plain SVD"]
KINDS = ["layer", "shape", "factored", "rank", "calibrated", "held-out", "plain SVD", "Q alone"]
KIND = ["self_attn.q_proj", "18944x3584", "28/28", "64-128", "0.0381", "0.0420", "0.0793", "0.1234"]
EQUAL = ["layer", "Q + L R", "2-bit Q", "3-bit Q", "4-bit Q", "Q at equal bits"]
BITS = ["mlp.down_proj", *["0.0381 (6.28)"] * 4, "< 0.0631"]
MEMORY = ["part", "foreseen", "measured", ""]
PART = ["activations", "819.4 MB", "1.4 GB", "of the tokens whose loss is computed at once, and more"]


def shown(columns: list[str], row: list[str], width: int) -> list[str]:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(fitted("", columns, [row], width))
    return captured.get().splitlines()


@pytest.mark.parametrize(("columns", "row"), [(INSPECT, LAYER), (KINDS, KIND), (EQUAL, BITS), (MEMORY, PART)])
def test_at_80_columns_nothing_is_cut_in_its_middle(columns, row):
    lines = shown(columns, row, 80)
    assert max(map(len, lines)) <= 80
    words = re.split(r"[\s│┃]+", " ".join(lines))
    for cell in row[1:]:
        assert set(cell.split()) <= set(words), cell
    for name in columns:
        for word in re.findall(r"[^ /-]+[/-]?", name):
            assert any(word in found for found in words), word
    assert len(lines) <= 8


def test_a_table_that_fits_has_a_frame_and_a_wider_one_has_none():
    assert shown(["a", "b"], ["x", "1"], 80)[0].startswith("┏")
    assert "┏" not in "".join(shown(INSPECT, LAYER, 80)) and shown(INSPECT, LAYER, 160)[0].startswith("┏")


def test_names_break_where_their_parts_end():
    assert broken("model.layers.0.self_attn.q_proj", 18).split("\n") == ["model.layers.0.", "self_attn.q_proj"]
    assert broken("0.0381 (6.28)", 8).split("\n") == ["0.0381", "(6.28)"]
    assert broken("whitened:backbone=lloyd3", 18).split("\n") == ["whitened:backbone=", "lloyd3"]
    assert "".join(broken("a" * 40, 12).split("\n")) == "a" * 40  # nothing is lost
    assert broken("line\nother", 20) == "line\nother"


def test_long_columns_share_what_numbers_leave():
    widths = widths_within(["layer", "value", "n"], [60, 60, 6], 80)
    assert sum(widths) <= 80 and widths[2] == 6 and abs(widths[0] - widths[1]) <= 1
    assert widths_within(["key", "value"], [10, 90], 80) == [10, 70]
