"""objective: distill: the loss against formulas, the teacher in memory against the teacher in files, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import decoded, forks, outcome, same, train, trainer_of, words_of, write_rows  # noqa: F401
from tiny import code_document, save_tiny, tiny_llama
from torch.nn import functional as F

import lord_tune
from lord_tune.errors import UsageError
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.training.distillation import TokenLoss, kl_divergence
from lord_tune.training.teacher_logits import CachedTeacher, bucketed_kl, compute, key_of, top_logits

VOCABULARY = 300


@pytest.fixture(scope="module")
def base(llama_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("distillation") / "base"
    lord_tune.decompose(str(llama_dir), str(out), rank=8, method="svd", backbone="int2")
    return out


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Documents of many lengths, some with a prompt that is not learned."""
    texts = [code_document(n)[: 8 + 9 * n % 50] for n in range(12)]
    made = [{"prompt": text[: len(text) // 3], "completion": text[len(text) // 3 :]} for text in texts]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", made)


def distil(base: Path, rows: Path, out: Path, **options: Any) -> dict[str, Any]:
    return train(base, rows, out, objective="distill", **options)


def column(metrics: dict[str, Any], key: str = "loss") -> list[float]:
    return [entry[key] for entry in metrics["history"] if key in entry]


def random_logits(seed: int, tokens: int = 7) -> torch.Tensor:
    return 3 * torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed))


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_the_formula(temperature):
    student, teacher = random_logits(0), random_logits(1)
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    assert float(kl_divergence(student, teacher, temperature)) == pytest.approx(
        float((p * (p / q).log()).sum()), rel=1e-5
    )
    assert float(kl_divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_stored_tokens_bound_the_kl_from_below(temperature):
    """Merging outcomes loses divergence; with the whole vocabulary nothing is merged."""
    student, teacher = random_logits(0), random_logits(1)
    full = float(kl_divergence(student, teacher, temperature))
    found = []
    for k in (1, 4, 16, 64, 299, 300):
        stored = top_logits(teacher / temperature, k)
        assert stored["values"].dtype == torch.float16 and stored["ids"].dtype == torch.int32
        found.append(float(bucketed_kl(student, stored, temperature)))
    assert all(a < b + 1e-4 for a, b in zip(found, found[1:], strict=False)) and found[0] > 0
    # float16 differences of up to 20 to the largest logit err by 5e-3, where the probability is 1e-9
    assert found[-1] == pytest.approx(full, rel=1e-3) and max(found) < full * 1.001
    assert found[0] < 0.9 * full


def test_the_tail_is_the_logsumexp_of_the_rest():
    logits = random_logits(3)
    stored = top_logits(logits, 5)
    largest = logits.max(-1, keepdim=True).values
    kept = logits.gather(-1, stored["ids"].long())
    whole = torch.cat([kept - largest, stored["tail"][:, None]], -1).logsumexp(-1) + largest[:, 0]
    assert torch.allclose(whole, logits.logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_chunks_change_neither_loss_nor_gradient(chunk, weight, temperature):
    hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head, labels, teacher = torch.nn.Linear(16, VOCABULARY).requires_grad_(False), torch.arange(7), random_logits(1)

    def kl_of(part: slice, student: torch.Tensor) -> torch.Tensor:
        return kl_divergence(student, teacher[part], temperature)

    loss, kl, ce, hits = TokenLoss.apply(hidden, labels, head, kl_of, weight, temperature, chunk)
    (2 * loss).backward()
    again = hidden.detach().requires_grad_()
    logits = head(again)
    whole_kl, whole_ce = kl_divergence(logits, teacher, temperature), F.cross_entropy(logits, labels, reduction="sum")
    whole = (1 - weight) * temperature**2 * whole_kl + weight * whole_ce
    (2 * whole).backward()
    assert torch.allclose(loss, whole, rtol=1e-5) and torch.allclose(hidden.grad, again.grad, atol=1e-5)
    assert torch.allclose(kl, whole_kl, rtol=1e-5) and torch.allclose(ce, whole_ce, rtol=1e-5)
    assert int(hits) == int((logits.argmax(-1) == labels).sum())


def test_no_counted_token_is_no_loss_and_no_gradient():
    hidden = torch.zeros(0, 16, requires_grad=True)
    loss, *_ = TokenLoss.apply(
        hidden, torch.zeros(0).long(), lambda h: h, lambda part, logits: logits.sum(), 0.0, 1.0, 4
    )
    loss.backward()
    assert float(loss.detach()) == 0 and hidden.grad.shape == (0, 16)


def test_the_logged_loss_is_that_of_the_counted_tokens(base, llama_dir, rows, tmp_path, monkeypatch):
    """Against both models run by hand, one document at a time; evaluation reports plain cross-entropy."""
    kept = trainer_of(monkeypatch)
    options = {"per_device_train_batch_size": 12, "max_steps": 1, "distill_ce_weight": 0.3, "distill_temperature": 2}
    metrics = distil(base, rows, tmp_path / "run", eval_dataset_name=str(rows), eval_strategy="steps", eval_steps=1,
                     per_device_eval_batch_size=12, learning_rate=0.0, **options)  # fmt: skip
    student, teacher = (load_dense_or_factored(str(folder)) for folder in (base, llama_dir))
    kl = ce = count = 0.0
    for row in kept[0].train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        counted = labels != -100
        with torch.no_grad():
            s, t = (model(input_ids=ids).logits[0, :-1][counted] for model in (student, teacher))
        kl, ce = kl + float(kl_divergence(s, t, 2.0)), ce + float(F.cross_entropy(s, labels[counted], reduction="sum"))
        count += int(counted.sum())
    assert 0 < count < sum(len(row["input_ids"]) for row in kept[0].train_dataset) - 12  # prompts are masked
    (entry,) = [entry for entry in metrics["history"] if "loss" in entry]
    (held,) = [entry for entry in metrics["history"] if "eval_loss" in entry]
    assert entry["kl"] == pytest.approx(kl / count, rel=1e-4) and entry["ce"] == pytest.approx(ce / count, rel=1e-4)
    assert entry["loss"] == pytest.approx(0.7 * 4 * kl / count + 0.3 * ce / count, rel=1e-4)
    assert held["eval_loss"] == pytest.approx(ce / count, rel=1e-4)
    assert held["eval_kl"] == pytest.approx(kl / count, rel=1e-4)


def test_accumulated_batches_weigh_every_token_the_same(base, rows, tmp_path):
    """4 rows at once, or 4 of 1: the rows have different numbers of counted tokens."""
    whole = distil(base, rows, tmp_path / "whole", per_device_train_batch_size=4, max_steps=3)
    parts = distil(base, rows, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4,
                   max_steps=3)  # fmt: skip
    for key in ("loss", "kl", "ce"):  # sums in another order
        assert column(parts, key) == pytest.approx(column(whole, key), rel=1e-4)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def test_distillation_recovers_more_than_it_started_with(base, rows, tmp_path):
    losses = column(
        distil(base, rows, tmp_path / "run", max_steps=30, learning_rate=3e-3, per_device_train_batch_size=4)
    )
    assert losses[-1] < 0.7 * losses[0]


# ---- the teacher in files ----------------------------------------------------------------------------------------


def test_files_give_what_the_teacher_gives_however_the_rows_are_batched(base, rows, tmp_path, monkeypatch, capfd):
    """Padding, packing, shuffling, epochs and evaluation all find their sequences in one folder, made once."""
    folder = str(tmp_path / "logits")
    stored = {"teacher_logits": folder, "teacher_top_k": VOCABULARY}
    ways = {
        "padded": {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 5},
        "packed": {"packing": True, "max_steps": 2},
        "held": {"eval_dataset_name": str(rows), "eval_strategy": "steps", "eval_steps": 2, "seed": 3},
    }
    for number, (name, options) in enumerate(ways.items()):
        live = distil(base, rows, tmp_path / f"live-{name}", **options)
        with monkeypatch.context() as patch:
            if number:  # the first made them
                from lord_tune.training import run

                patch.setattr(run, "load", lambda *given: pytest.fail("a teacher was loaded"))
            cached = distil(base, rows, tmp_path / f"cached-{name}", **options, **stored)
        for key in ("loss", "kl", "ce", "eval_loss", "eval_kl"):
            assert column(cached, key) == pytest.approx(column(live, key), rel=1e-3), (name, key)
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("teacher logits in")]
    assert "computed for 12 sequences" in said[0] and "bytes per token" in said[0]
    assert all("found, no teacher is loaded" in line for line in said[1:]) and len(said) == 3


def identity(**other: Any) -> dict[str, Any]:
    return {"format": 1, "teacher": "t", "top_k": 4, "temperature": 1.0} | other


def sequences(count: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    made = [torch.arange(5 + n) + n for n in range(count)]
    pairs = [(ids, torch.arange(len(ids) - 1) % 2 == 0) for ids in made]
    return {key_of(*pair): pair for pair in pairs}


def test_what_is_stored_survives_a_broken_shard(llama_dir, tmp_path):
    """A shard that is cut off or missing is computed again, the others are kept."""
    teacher, wanted = load_dense_or_factored(str(llama_dir)), sequences(6)
    cache = CachedTeacher(tmp_path / "logits", identity())
    compute(cache, teacher, cache.missing(wanted.values()), 4, 1.0, batch_tokens=16, shard_bytes=28 * 4)
    shards = sorted((tmp_path / "logits").glob("*.safetensors"))
    assert len(shards) > 2 and cache.sizes()[1] == sum(int(counted.sum()) for _, counted in wanted.values())
    before = {key: cache._read(key, torch.device("cpu")) for key in wanted}
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    kept = CachedTeacher(tmp_path / "logits", identity())
    missing = kept.missing(wanted.values())
    assert 0 < len(missing) < len(wanted)
    compute(kept, teacher, missing, 4, 1.0, batch_tokens=16)
    again = CachedTeacher(tmp_path / "logits", identity())
    assert not again.missing(wanted.values())
    for key, parts in before.items():
        found = again._read(key, torch.device("cpu"))
        assert torch.equal(found["ids"], parts["ids"]) and torch.allclose(found["tail"], parts["tail"], atol=1e-5)


@pytest.mark.parametrize(("key", "value"), [("teacher", "u"), ("top_k", 8), ("temperature", 2.0)])
def test_logits_of_another_teacher_are_refused(tmp_path, key, value):
    folder = tmp_path / "logits"
    cache = CachedTeacher(folder, identity())
    cache.add({"k": top_logits(random_logits(0), 4)})
    with pytest.raises(UsageError, match=f"was made with {key} .*, this run has {value}; name another folder"):
        CachedTeacher(folder, identity(**{key: value}))


def test_other_folders_are_not_written_into(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="holds other files"):
        CachedTeacher(tmp_path / "mine", identity())
    with pytest.raises(UsageError, match="is a file"):
        CachedTeacher(tmp_path / "mine" / "thesis.txt", identity())


def test_shuffled_labels_are_another_sequence():
    ids = torch.arange(4)
    assert key_of(ids, torch.tensor([True, True, True])) != key_of(ids, torch.tensor([False, True, True]))


# ---- runs --------------------------------------------------------------------------------------------------------


MOMENTS = [("rename", "logits/00000.safetensors", "after"), ("save", "checkpoint-4/optimizer.pt", "half")]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("moment", MOMENTS, ids=["while the logits are written", "while a checkpoint is written"])
def test_a_killed_distillation_continues_to_the_same_end(forks, base, rows, tmp_path, moment):  # noqa: F811
    words = words_of(base, rows, objective="distill", teacher_logits="logits", distill_ce_weight=0.5)
    assert forks.run(tmp_path / "whole", words).codes == [0]
    assert forks.run(tmp_path / "cut", words, die=moment).killed
    again = forks.run(tmp_path / "cut", words)
    assert again.codes == [0], again.stderr[-2000:]
    assert same(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize("where", ["memory", "files"])
def test_two_processes_distil_as_one_does(forks, base, rows, tmp_path, where):  # noqa: F811
    for processes, batch in ((1, 4), (2, 2)):
        more = {"teacher_logits": "logits"} if where == "files" else {}
        words = words_of(base, rows, objective="distill", mode="factors", logging_steps=1, save_strategy="no",
                         per_device_train_batch_size=batch, max_steps=3, **more)  # fmt: skip
        cut = words.index("--lora_dropout")
        del words[cut : cut + 2]
        ended = forks.run(tmp_path / str(processes), words, processes=processes)
        assert ended.codes == [0] * processes, ended.stderr[-2000:]
    one, two = (outcome(tmp_path / name)[0] for name in ("1", "2"))
    for key in ("loss", "kl", "ce", "num_tokens"):  # sums in another order
        assert [e[key] for e in two] == pytest.approx([e[key] for e in one], rel=1e-4), key


def test_the_teacher_is_neither_trained_nor_saved(base, rows, tmp_path, monkeypatch):
    kept = trainer_of(monkeypatch)
    distil(base, rows, tmp_path / "run", save_strategy="steps", save_steps=1)
    teacher = kept[0].teacher._model
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    names = set(load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"))
    assert names == set(load_file(tmp_path / "run" / "adapter_model.safetensors")) and all("lora_" in n for n in names)
    assert sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoint-2").glob("*.pt")) < 1_500_000
    assert teacher is not kept[0].accelerator._models and teacher not in kept[0].accelerator._models


def test_models_that_do_not_fit_are_refused(base, llama_dir, rows, tmp_path):
    other = tiny_llama()
    other.resize_token_embeddings(320)
    folder = save_tiny(other, tmp_path / "wide")
    with pytest.raises(UsageError, match="has 320 logits, the student 300"):
        distil(base, rows, tmp_path / "run", teacher_model_name_or_path=str(folder))
    changed = folder / "tokenizer.json"
    changed.write_text(changed.read_text().replace("<mask>", "<other>"))
    with pytest.raises(UsageError, match="another vocabulary"):
        distil(base, rows, tmp_path / "run", teacher_model_name_or_path=str(folder))
    record = json.loads((base / "decomposition.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in base.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    (moved / "decomposition.json").write_text(
        json.dumps(record | {"base": record["base"] | {"name": "/not/there"}, "base_folder": None})
    )
    with pytest.raises(UsageError, match="/not/there.*is not there; set teacher_model_name_or_path"):
        distil(moved, rows, tmp_path / "run")
    (moved / "decomposition.json").unlink()
    with pytest.raises(UsageError, match="finds no decomposition.json"):
        distil(moved, rows, tmp_path / "run")
    assert math.isfinite(column(distil(moved, rows, tmp_path / "run", teacher_model_name_or_path=str(llama_dir)))[0])
