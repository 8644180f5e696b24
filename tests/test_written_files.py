"""Files of an export are written tensor by tensor: they are those that safetensors writes of all tensors at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_like
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_llama

import lord_tune
from lord_tune.exports import source as source_file
from lord_tune.integrations.shards import Piece, save_pieces
from lord_tune.layers import FactoredLinear

FORMS = {
    "peft": {"backbone": "nf4", "rank": 8},
    "peft twice": {"backbone": "nf4", "rank": 8, "double_quant": True},
    "compressed-tensors": {"backbone": "w4a16", "group_size": 64, "rank": 8},
    "compressed-tensors with zeros": {"backbone": "w4a16", "group_size": 64, "rank": 8, "symmetric": False},
    "vllm": {"rank": 8},
    "vllm pivoted": {"rank": 40},
    "gguf": {"backbone": "q4_0", "rank": 8},
}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "a.weight": torch.randn(7, generator=generator),
        "codes": torch.randint(0, 255, (5, 3), generator=generator, dtype=torch.uint8),
        "turned": torch.randn(4, 6, generator=generator).T,
        "shape": torch.tensor([3, 5]),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "packed": torch.arange(6, dtype=torch.int32).view(2, 3),
        "none": torch.empty(0, 3),
    }


def test_pieces_are_the_file_of_safetensors(tmp_path):
    values = tensors()
    made: list[str] = []

    def piece(*names: str) -> Piece:
        def make() -> dict[str, torch.Tensor]:
            made.extend(names)
            return {name: values[name] for name in names}

        return Piece({name: torch.empty_like(values[name], device="meta") for name in names}, make)

    names = list(values)
    save_pieces(tmp_path / "pieces", [piece(*names[:3]), *map(piece, names[3:])])
    save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "whole", {"format": "pt"})
    assert made == names and (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_piece_that_is_another_than_it_said_is_no_file(tmp_path):
    said = {"a": torch.empty(2, 3, device="meta")}
    for made in ({"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).half()}, {"b": torch.zeros(2, 3)}):
        with pytest.raises(AssertionError):
            save_pieces(tmp_path / "file", [Piece(said, lambda made=made: made)])


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_tiny(tiny_llama(intermediate=192).bfloat16(), tmp_path_factory.mktemp("original") / "model")


@pytest.mark.parametrize("case", FORMS)
def test_no_more_than_a_layer_is_there_at_once(case, original, tmp_path, monkeypatch):
    """And the source is never loaded whole."""
    if case.startswith("compressed"):
        pytest.importorskip("compressed_tensors")
    form, options = case.split()[0], FORMS[case]
    lord_tune.decompose(original, tmp_path / "factored", method="svd", **options)
    extra: dict[str, Any] = {}
    if form == "gguf":
        extra = {"like": str(write_like(tiny_llama(intermediate=192), tmp_path / "like.gguf", "llama"))}
        monkeypatch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")
    monkeypatch.setattr(source_file, "load_to_fold", lambda name: pytest.fail("the source was loaded whole"))
    most, opened = [0], source_file.Source.load

    def watched(source: Any, names: Any) -> None:
        opened(source, names)
        layers = [module for module in source.model.modules() if isinstance(module, FactoredLinear)]
        there = [sum(p.numel() for p in layer.parameters() if not p.is_meta) for layer in layers]
        most.append(sum(number > 1 for number in there))  # the description of nested scales needs one number

    monkeypatch.setattr(source_file.Source, "load", watched)
    lord_tune.export(str(tmp_path / "factored"), str(tmp_path / "out"), form, **extra)
    assert max(most) == 1
    for file in (tmp_path / "out").rglob("*.safetensors"):
        save_file(load_file(file), tmp_path / "again", {"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes(), file
