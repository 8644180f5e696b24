"""No verb destroys what it reads, what that was made from, or what an adapter was trained on; disks are asked first."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_like
from tiny import save_tiny, tiny_llama, write_code_rows

import lord_tune
from lord_tune.errors import LordError, UsageError
from lord_tune.integrations import space
from lord_tune.integrations.destination import protect, protect_file

TEXT = {"context_length": 32, "calibration_tokens": 128}
STEPS = {"max_steps": 2, "max_length": 32, "per_device_train_batch_size": 1, "disable_tqdm": True}


@dataclass
class World:
    """base -> factored -> adapter, with the rows that they were made of, side by side."""

    base: Path
    factored: Path
    adapter: Path
    rows: Path
    folder: Path

    def train(self, model: Path, out: Path, **options: Any) -> Any:
        given = STEPS | {"save_strategy": "no"} | options
        return lord_tune.train(model_name_or_path=str(model), dataset_name=str(self.rows), output_dir=str(out), **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_tiny(tiny_llama(layers=1), folder / "base")
    (folder / "text").mkdir()
    w = World(*(folder / name for name in ("base", "factored", "adapter", "text/rows.jsonl")), folder)
    write_code_rows(w.rows)
    lord_tune.decompose(str(w.base), str(w.factored), method="svd", rank=4)
    w.train(w.factored, w.adapter)
    write_like(tiny_llama(layers=1), folder / "q4_0.gguf", "llama")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> World:
    """A copy to spoil. The records name what they were made from by absolute names, and by the way there."""
    folder = tmp_path / "runs"
    shutil.copytree(made, folder)
    for name in ("factored/decomposition.json", "adapter/adapter_config.json", "adapter/train_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace(str(made), str(folder)))
    return World(*(folder / name for name in ("base", "factored", "adapter", "text/rows.jsonl")), folder)


def contents(folder: Path) -> dict[str, str]:
    """Every file, folder and link, byte for byte."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
        for path in sorted(folder.rglob("*"))
    }


def linked(w: World) -> None:
    (w.folder / "link").symlink_to(w.factored, target_is_directory=True)


Call = Callable[[World], Any]


def decompose(model: Path, out: Path, **options: Any) -> Any:
    return lord_tune.decompose(str(model), str(out), method="svd", rank=2, overwrite=True, **options)


def export(model: Path, out: Path, form: Any = "dense", **options: Any) -> Any:
    return lord_tune.export(str(model), str(out), form, overwrite=True, **options)


def correct(w: World, quantized: Path, out: Path) -> Any:
    given = {"calibration": [str(w.rows)], "rank": 2, **TEXT}
    return lord_tune.correct(str(quantized), str(w.base), str(out), overwrite=True, **given)


def evaluate(w: World, file: Path) -> Any:
    return lord_tune.evaluate(str(w.factored), [str(w.rows)], context_length=32, json=str(file))


def plan(w: World, file: Path) -> Any:
    return lord_tune.plan(str(w.base), method="svd", rank=2, save=str(file))


def text_into_the_output(w: World) -> None:
    """The text lies in an earlier output, which would be replaced."""
    shutil.rmtree(w.adapter)
    shutil.move(w.rows, w.factored / "rows.jsonl")


def weights_behind_links(w: World) -> None:
    """A model whose files are links into the folder that would be replaced."""
    model = w.folder / "model"
    model.mkdir()
    for path in w.factored.iterdir():
        (model / path.name).symlink_to(path)


def a_record_of_the_way_alone(w: World) -> None:
    """The adapter knows its base only by the way there, as where everything was moved together."""
    path = w.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/factored"}))


def an_adapter_further_down(w: World) -> None:
    """As PEFT writes it: no record of a run."""
    (w.folder / "adapters").mkdir()
    w.adapter.rename(w.folder / "adapters" / "mine")
    (w.folder / "adapters" / "mine" / "train_config.json").unlink()


SPOIL: dict[str, Callable[[World], None]] = {
    "decompose, its text": text_into_the_output,
    "export, its text": text_into_the_output,
    "compare, its text": text_into_the_output,
    "export, links into it": weights_behind_links,
    "decompose, moved": a_record_of_the_way_alone,
    "decompose, adapter further down": an_adapter_further_down,
}


def compare(base: Path, out: Path, texts: list[Path]) -> Any:
    sized = {"methods": ["svd"], "bits_per_weight": 8, "overwrite": True}
    return lord_tune.compare(str(base), str(out), text=[str(text) for text in texts], **sized)


# what is called -> what the sentence says
CASES: dict[str, tuple[Call, str]] = {
    "decompose, itself": (lambda w: decompose(w.factored, w.factored), "is the model"),
    "decompose, by a link": (lambda w: decompose(w.factored, w.folder / "link"), "is the model"),
    "decompose, of a link": (lambda w: decompose(w.folder / "link", w.factored), "is the model"),
    "decompose, dots": (lambda w: decompose(w.factored, w.adapter / ".." / "factored"), "is the model"),
    "decompose, inside": (lambda w: decompose(w.base, w.base / "out"), "lies inside the model"),
    "decompose, around": (lambda w: decompose(w.base, w.folder), "holds the model"),
    "decompose, base of an adapter": (lambda w: decompose(w.base, w.factored), "holds the base model of the adapter"),
    "decompose, moved": (lambda w: decompose(w.base, w.factored), "base model of the adapter"),
    "decompose, adapter further down": (
        lambda w: decompose(w.base, w.factored),
        "base model of the adapter",
    ),
    "decompose, its text": (
        lambda w: lord_tune.decompose(
            *(str(w.base), str(w.factored)), rank=2, overwrite=True, calibration=[str(w.factored / "*.jsonl")], **TEXT
        ),
        "holds .*rows.jsonl, which this run reads",
    ),
    "export, itself": (lambda w: export(w.factored, w.factored), "is the model"),
    "export, adapter": (lambda w: export(w.adapter, w.adapter), "is the model"),
    "export, base": (lambda w: export(w.adapter, w.factored), "from which .* was made"),
    "export, original": (lambda w: export(w.adapter, w.base), "from which .* was made"),
    "export, inside the base": (lambda w: export(w.adapter, w.factored / "out"), "lies inside the model"),
    "export, links into it": (lambda w: export(w.folder / "model", w.factored), "or files of it"),
    "export, its text": (
        lambda w: export(w.base, w.factored, text=str(w.factored / "rows.jsonl")),
        "holds .*rows.jsonl, which this run reads",
    ),
    "train, itself": (lambda w: w.train(w.factored, w.factored), "is the model"),
    "train, original": (lambda w: w.train(w.factored, w.base), "from which .* was made"),
    "train, inside": (lambda w: w.train(w.factored, w.factored / "run"), "lies inside the model"),
    "train, teacher": (
        lambda w: w.train(w.factored, w.folder / "new", objective="distill", teacher_logits=str(w.base)),
        "from which .* was made",
    ),
    "correct, original": (lambda w: correct(w, w.folder / "q4_0.gguf", w.base), "is the model"),
    "correct, around": (lambda w: correct(w, w.folder / "q4_0.gguf", w.folder), "holds the model"),
    "correct, base of an adapter": (lambda w: correct(w, w.folder / "q4_0.gguf", w.factored), "of the adapter"),
    "plan, file of the model": (lambda w: plan(w, w.base / "config.json"), "is a file of the model"),
    "plan, sweep": (
        lambda w: lord_tune.plan(str(w.base), sweep=str(w.base / "config"), calibration=[str(w.rows)], **TEXT),
        "is a file of the model",
    ),
    "evaluate, file of the model": (lambda w: evaluate(w, w.factored / "decomposition.json"), "is a file of the model"),
    "evaluate, text": (lambda w: evaluate(w, w.rows), "is read by this run"),
    "inspect": (
        lambda w: lord_tune.inspect(str(w.factored), json=str(w.factored / "config.json")),
        "is a file of the model",
    ),
    "chat": (
        lambda w: lord_tune.chat(str(w.factored), prompt="x", json=str(w.factored / "config.json")),
        "is a file of the model",
    ),
    "compare": (lambda w: compare(w.base, w.factored, [w.rows]), "base model of the adapter"),
    "compare, its text": (lambda w: compare(w.base, w.factored, [w.factored / "*.jsonl"]), "which this run reads"),
    "report": (
        lambda w: lord_tune.report([str(w.factored)], out=str(w.factored / "config.json"), overwrite=True),
        "config.json",
    ),
    "quickstart": (
        lambda w: lord_tune.quickstart(model=str(w.factored), out=str(w.factored), overwrite=True),
        "is the model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_needed_is_refused_as_an_output_and_stays_byte_for_byte(case, world):
    call, says = CASES[case]
    SPOIL.get(case, lambda w: None)(world)
    if "link" in case and case not in SPOIL:
        linked(world)
    before = contents(world.folder)
    with pytest.raises(UsageError, match=says) as refused:
        call(world)
    assert len(str(refused.value).splitlines()) == 1
    assert contents(world.folder) == before


def test_what_nobody_needs_is_replaced(world):
    decompose(world.base, world.folder / "new")
    decompose(world.base, world.folder / "new")
    assert (world.folder / "new" / "decomposition.json").is_file()
    shutil.rmtree(world.adapter)
    decompose(world.base, world.factored)
    assert json.loads((world.factored / "decomposition.json").read_text())["config"]["rank"] == 2


def test_an_adapter_that_belongs_to_other_weights_keeps_nothing(world):
    """Its base was written again since: it is of no use to it any more."""
    record = world.adapter / "train_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base": "0" * 64}))
    decompose(world.base, world.factored)
    assert json.loads((world.factored / "decomposition.json").read_text())["config"]["rank"] == 2


def test_an_adapter_of_an_export_keeps_its_base(world):
    """`export --base` writes an adapter alone, whose base is part of an earlier export."""
    served = world.folder / "served"
    shutil.copytree(world.adapter, served / "adapter")
    shutil.copytree(world.base, served / "base")
    (served / "adapter" / "train_config.json").unlink()
    settings = json.loads((served / "adapter" / "adapter_config.json").read_text())
    base = {"base_model_name_or_path": str(served / "base")}
    (served / "adapter" / "adapter_config.json").write_text(json.dumps(settings | base))
    protect(served, [str(world.adapter)], replaces=True)  # its own adapter goes with it
    shutil.copytree(served / "adapter", world.folder / "alone")
    with pytest.raises(UsageError, match="base model of the adapter in .*alone"):
        protect(served, [str(world.adapter)], replaces=True)


def test_new_files_beside_a_model_are_allowed(world):
    before = sorted(world.folder.rglob("*"))
    protect_file(str(world.factored / "new.json"), [str(world.factored)])
    protect_file(str(world.folder / "other.json"), [str(world.factored)], [str(world.rows)])
    protect(world.folder / "out", [str(world.factored), "org/name", "demo", None], [str(world.rows)])
    assert sorted(world.folder.rglob("*")) == before


def test_a_record_of_the_same_verb_is_written_anew(world):
    """`evaluate M --json M/x.json`, twice; but never the model's own records, nor text."""
    path = world.factored / "scores.json"
    path.write_text('{"texts": {}}')
    protect_file(str(path), [str(world.factored)], own_key="texts")
    for other, models, data in ((path, world.factored, path), (world.factored / "config.json", world.factored, None)):
        with pytest.raises(UsageError):
            protect_file(str(other), [str(models)], [] if data is None else [str(data)], own_key="texts")
    with pytest.raises(UsageError, match="is a file of the model"):
        protect_file(str(path), [str(world.factored)])


def test_damaged_records_protect_nothing_and_break_nothing(world):
    with pytest.raises(UsageError, match="base model of the adapter"):
        protect(world.factored, [str(world.base)], replaces=True)  # a whole record does
    for text in ("", "[]", '{"base_model_name_or_path": 3}'):
        (world.adapter / "adapter_config.json").write_text(text)
        protect(world.factored, [str(world.base)], replaces=True)


class Disk:
    def __init__(self, free: int):
        self.free = free


DISK: dict[str, Call] = {
    "decompose": lambda w: decompose(w.base, w.folder / "new"),
    "dense": lambda w: export(w.factored, w.folder / "new"),
    "factored": lambda w: export(w.factored, w.folder / "new", "factored"),
    "train": lambda w: w.train(w.factored, w.folder / "new"),
}


@pytest.mark.parametrize("verb", DISK)
def test_a_disk_that_is_too_small_is_told_of_before_any_work(verb, world, monkeypatch):
    before = contents(world.folder)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Disk(1000))
    with pytest.raises(LordError, match=r"needs [0-9.]+ .?B of disk space in .*, where 1.0 kB are free") as refused:
        DISK[verb](world)
    assert refused.value.exit_code == 1
    assert contents(world.folder) == before
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Disk(10**9))
    DISK[verb](world)
    assert any((world.folder / "new").iterdir())


def test_the_space_of_an_export_is_what_it_takes(world, monkeypatch):
    """Within the headers and settings: 20 kB beside 250 kB of weights."""
    needed: list[float] = []
    monkeypatch.setattr(space, "human_bytes", lambda count: needed.append(count) or "")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Disk(-1))
    for verb in ("dense", "factored"):
        with pytest.raises(LordError):
            DISK[verb](world)
    monkeypatch.undo()
    for size, verb in zip(needed[::2], ("dense", "factored"), strict=True):
        DISK[verb](world)
        written = sum(path.stat().st_size for path in (world.folder / "new").glob("*.safetensors"))
        assert size <= written <= size + 20_000
        shutil.rmtree(world.folder / "new")


def test_a_run_that_continues_says_so_in_its_first_line(world, capfd):
    saves = {"save_strategy": "steps", "save_steps": 1}
    world.train(world.factored, world.folder / "new", **saves)
    assert "continuing" not in capfd.readouterr().out
    world.train(world.factored, world.folder / "new", **saves | {"max_steps": 3})
    first = capfd.readouterr().out.splitlines()[0]
    assert first == f"continuing the run in {world.folder / 'new'} from checkpoint-2"
    with pytest.raises(UsageError, match="finished run"):
        world.train(world.factored, world.folder / "new", **saves | {"max_steps": 3})
    assert "continuing" not in capfd.readouterr().out
