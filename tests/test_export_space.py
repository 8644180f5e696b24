"""Every export asks for the room that it takes before it writes anything."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
from gguf_files import write_like

import lord_tune
import lord_tune.exports.gguf
import lord_tune.exports.run
from lord_tune.errors import LordError
from lord_tune.integrations import space
from lord_tune.integrations.models import load_dense_or_factored

CASES = {
    "dense": {"backbone": "nf4"},
    "factored": {"backbone": "nf4"},
    "peft": {"backbone": "nf4"},
    "compressed-tensors": {"backbone": "w4a16", "group_size": 32},
    "gguf": {"backbone": "q4_0"},
    "vllm": {},
}


@pytest.fixture(scope="module")
def sources(aligned_llama_dir, tmp_path_factory):
    """Format -> (factored checkpoint, further options of its export)."""
    place = tmp_path_factory.mktemp("sources")
    write_like(load_dense_or_factored(str(aligned_llama_dir)), place / "like.gguf", "llama")
    found = {}
    for form, options in CASES.items():
        if not (place / str(options)).exists():
            lord_tune.decompose(aligned_llama_dir, place / str(options), method="svd", rank=8, **options)
        found[form] = place / str(options), {"like": place / "like.gguf"} if form == "gguf" else {}
    return found


@pytest.mark.parametrize("form", CASES)
def test_what_is_asked_for_is_what_is_written(form, sources, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(lord_tune.exports.gguf, "compared_in_engine", lambda *files: "not run")
    for module in (lord_tune.exports.gguf, lord_tune.exports.run):
        monkeypatch.setattr(module, "check_space", lambda folder, size, what: asked.append((size, what)))
    source, options = sources[form]
    written = lord_tune.export(source, tmp_path / "out", form, **options)["bytes"]
    ((size, what),) = asked
    # beside the tensors there are names and shapes, of a model as small as this up to a fifth
    assert what == f"The {form} export" and 0.8 * written < size <= written


@pytest.mark.parametrize("form", CASES)
def test_a_full_disk_is_refused_in_a_sentence_and_nothing_is_left(form, sources, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    source, options = sources[form]
    with pytest.raises(
        LordError, match=f"^The {form} export needs .* of disk space in .*, where 5.0 kB are free; make"
    ):
        lord_tune.export(source, tmp_path / "out", form, **options)
    assert not list(tmp_path.iterdir()) and shutil.disk_usage(tmp_path).free == 5000
