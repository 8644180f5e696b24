"""What a training run reads, says, writes, survives and shares out; the objectives sft and dpo."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forking import ForkServer, free_port
from safetensors.torch import load_file
from tiny import EOS, code_document, read_tensors

import lord_tune
from lord_tune.errors import LordError, LordWarning, UsageError
from lord_tune.training import trainer_arguments
from lord_tune.training.checkpoints import defect
from lord_tune.training.curve import draw, points

SHORT = {"max_length": 64, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
CHATML = (  # SmolLM2's, whose default system turn is shortened
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(llama_dir, tmp_path_factory) -> Path:
    """A decomposed model whose L and R train beside packed codes."""
    out = tmp_path_factory.mktemp("training") / "base"
    lord_tune.decompose(str(llama_dir), str(out), rank=8, method="svd", backbone="int4")
    return out


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": code_document(n)} for n in range(16)])


@pytest.fixture(scope="module")
def forks():
    server = ForkServer()
    yield server
    server.close()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base: Path, rows: Path, out: Path, **options: Any) -> dict[str, Any]:
    own = {"model_name_or_path": str(base), "dataset_name": str(rows), "output_dir": str(out), "max_steps": 2}
    return lord_tune.train(**(SHORT | {"save_strategy": "no"} | own | options))


def trainer_of(monkeypatch) -> list[Any]:
    """The trainers of the runs that follow, for a look at what they were given."""
    from lord_tune.training import run

    kept: list[Any] = []
    make = run._make_trainer
    monkeypatch.setattr(run, "_make_trainer", lambda *given: kept.append(make(*given)) or kept[-1])
    return kept


def decoded(trainer: Any, index: int = 0) -> list[tuple[str, bool]]:
    row = trainer.train_dataset[index]
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    return [(trainer.processing_class.decode([token]), label != -100) for token, label in tokens]


def text_of(pieces: list[tuple[str, bool]], counted: bool) -> str:
    return "".join(piece for piece, marked in pieces if marked == counted)


# ---- what is tokenized -------------------------------------------------------------------------------------------


def test_the_prompt_is_masked_and_the_completion_ends_the_text(base, tmp_path, monkeypatch):
    kept = trainer_of(monkeypatch)
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "two and two", "completion": " is four"}] * 4)
    train(base, file, tmp_path / "run")
    pieces = decoded(kept[0])
    assert text_of(pieces, True) == " is four" + EOS and text_of(pieces, False) == "two and two"
    batch = kept[0].data_collator([kept[0].train_dataset[0], {"input_ids": [1, 2], "labels": [-100, 2]}])
    assert batch["labels"][1].tolist() == [-100, 2] + [-100] * (len(pieces) - 2)  # padding is not learned
    train(base, file, tmp_path / "all", completion_only_loss=False)
    assert text_of(decoded(kept[1]), False) == ""


def test_every_text_ends_with_one_end_of_text_token(base, tmp_path, monkeypatch):
    kept = trainer_of(monkeypatch)
    train(base, write_rows(tmp_path / "rows.jsonl", [{"text": "ab"}, {"text": "ab" + EOS}] * 2), tmp_path / "run")
    assert {text_of(decoded(kept[0], n), True) for n in range(4)} == {"ab" + EOS}


def test_a_tokenizer_without_padding_token_pads_with_what_is_not_learned(base, tmp_path, monkeypatch):
    """trl pads with the end-of-text token then; the ends of texts must be learned all the same."""
    bare = shutil.copytree(base, tmp_path / "bare")
    file = bare / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    kept = trainer_of(monkeypatch)
    train(bare, write_rows(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": "a"}] * 2), tmp_path / "run")
    data = kept[0].train_dataset
    batch = kept[0].data_collator(sorted(data, key=lambda row: -len(row["input_ids"]))[::3])
    end = kept[0].processing_class.eos_token_id
    assert batch["input_ids"][1].tolist()[1:] == [end] * 3 and batch["labels"][1].tolist()[1:] == [end, -100, -100]


def test_rows_that_max_length_cuts_are_counted(base, tmp_path):
    cut = [{"prompt": "p" * 10, "completion": "c" * length} for length in (5, 5, 60, 80)]
    gone = [{"prompt": "p" * 70, "completion": "c"}]
    with pytest.warns(LordWarning) as told:
        train(base, write_rows(tmp_path / "rows.jsonl", cut + gone), tmp_path / "run")
    said = [str(entry.message) for entry in told]
    assert any(line.startswith("1 of 5 rows have no trained token within max_length 64") for line in said)
    assert any(line.startswith("2 of 4 training sequences are cut at max_length 64") for line in said)
    with pytest.warns(LordWarning, match="2 of 4 training sequences are cut.* or set packing_strategy: bfd_split"):
        packed = write_rows(tmp_path / "packed.jsonl", [{"text": "t" * n} for n in (5, 9, 64, 90)])
        train(base, packed, tmp_path / "packed", packing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LordWarning)
        train(base, write_rows(tmp_path / "whole.jsonl", cut[:2]), tmp_path / "whole")
    with pytest.raises(LordError, match="None of the 3 rows has a token"):
        train(base, write_rows(tmp_path / "none.jsonl", gone * 3), tmp_path / "none")


def chat_base(base: Path, folder: Path, template: str) -> Path:
    from transformers import AutoTokenizer

    copy = shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copy)
    return copy


CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2},
    {"messages": [{"role": "system", "content": "Be odd"}, {"role": "user", "content": "Hi"}]
     + [{"role": "assistant", "content": "No"}]},
]  # fmt: skip


def qwen_template() -> str:
    from trl import chat_template_utils

    return chat_template_utils.qwen2_5_chat_template


@pytest.mark.parametrize("name", ["chatml", "qwen2.5"])
def test_only_what_the_assistant_says_is_learned(base, tmp_path, name, monkeypatch):
    """ChatML is marked by us, Qwen2.5 by trl; the saved template is the model's own."""
    template = CHATML if name == "chatml" else qwen_template()
    chat, kept = chat_base(base, tmp_path / "chat", template), trainer_of(monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", CHAT * 2)
    train(chat, rows, tmp_path / "run", assistant_only_loss=True, max_length=400)
    end = "<|im_end|>\n"
    # Qwen's marks of trl hold the newline after the role, which generation starts with as well
    head = "" if name == "chatml" else "\n"
    assert text_of(decoded(kept[0], 0), True) == (head + "Hello" + end) * 2
    assert text_of(decoded(kept[0], 1), True) == head + "No" + end
    own = kept[0].processing_class.apply_chat_template(CHAT[0]["messages"], tokenize=False)
    assert "".join(piece for piece, _ in decoded(kept[0], 0)) == own and "Hello" in own
    saved = tmp_path / "run" / "chat_template.jinja"
    assert saved.read_text() == template


def test_prompts_and_answers_as_messages_need_no_end_of_text(base, tmp_path, monkeypatch):
    """trl renders them with the chat template, which ends a turn in its own way."""
    chat, kept = chat_base(base, tmp_path / "chat", CHATML), trainer_of(monkeypatch)
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    train(chat, write_rows(tmp_path / "rows.jsonl", [row] * 4), tmp_path / "run", max_length=200)
    assert text_of(decoded(kept[0]), True) == "Hello<|im_end|>\n"


def test_the_seed_draws_lora_whatever_was_drawn_before(base, rows, tmp_path):
    drawn = {}
    for name, state, seed in (("one", 1, 5), ("other state", 2, 5), ("other seed", 1, 6)):
        transformers.set_seed(state)
        train(base, rows, tmp_path / name, mode="lora", max_steps=1, learning_rate=0.0, seed=seed)
        drawn[name] = read_tensors(tmp_path / name)
    key = next(key for key in drawn["one"] if "lora_A" in key)
    assert torch.equal(drawn["one"][key], drawn["other state"][key])
    assert not torch.equal(drawn["one"][key], drawn["other seed"][key])


def test_wrapped_packing_cuts_texts_anywhere(base, rows, tmp_path, monkeypatch):
    """Which is no loss of tokens and no reason for a warning."""
    kept = trainer_of(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LordWarning)
        train(base, rows, tmp_path / "run", packing=True, packing_strategy="wrapped")
    lengths = [len(row["input_ids"]) for row in kept[0].train_dataset]
    assert set(lengths[:-1]) == {64} and sum(lengths) == sum(len(code_document(n)) + 1 for n in range(16))


def test_the_configuration_of_the_training_set_is_not_that_of_another(base, rows, tmp_path, monkeypatch):
    from lord_tune.training import run

    asked = []
    real = run.prepare_rows

    def prepare(source: str, split: str, config: str | None, *more: Any) -> Any:
        asked.append((source, config))
        return real(str(rows), split, None, *more)

    monkeypatch.setattr(run, "prepare_rows", prepare)
    train(base, Path("org/set"), tmp_path / "run", dataset_config="part", eval_dataset_name=str(rows))
    assert asked == [("org/set", "part"), (str(rows), None)]


def test_a_template_that_cannot_be_marked_is_refused(base, tmp_path):
    chat = chat_base(base, tmp_path / "chat", "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}")
    rows = write_rows(tmp_path / "rows.jsonl", CHAT)
    with pytest.raises(UsageError, match="chat_template_path: FILE.jinja"):
        train(chat, rows, tmp_path / "run", assistant_only_loss=True)


def test_packed_evaluation_keeps_documents_apart(base, tmp_path):
    """With a cache, later documents of a pack would see the earlier ones."""
    texts = [{"text": "abcdefgh" * 2}, {"text": "12345678" * 2}, {"text": "xyzxyzxy" * 2}]
    file = write_rows(tmp_path / "rows.jsonl", texts)
    options = {"eval_dataset_name": str(file), "eval_on_start": True, "max_steps": 1, "eval_strategy": "no"}
    alone = train(base, file, tmp_path / "alone", per_device_eval_batch_size=3, **options)
    packed = train(base, file, tmp_path / "packed", packing=True, per_device_eval_batch_size=3, **options)
    losses = [next(e["eval_loss"] for e in run["history"] if "eval_loss" in e) for run in (alone, packed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # float32 sums in another order


# ---- what is said and drawn --------------------------------------------------------------------------------------


def test_one_line_per_logging_step(base, rows, tmp_path, capfd):
    train(base, rows, tmp_path / "run", max_steps=4, logging_steps=2, eval_dataset_name=str(rows), eval_steps=4,
          eval_strategy="steps")  # fmt: skip
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("  step")]
    assert len(lines) == 3 and "{'loss'" not in out + err
    assert [line.split()[1] for line in lines] == ["2/4", "4/4", "4/4"] and "eval loss" in lines[2]
    assert all(word in lines[0] for word in ("loss ", "lr ", "tokens/s", "left"))


def test_the_curve_is_drawn_at_saves_and_at_the_end(base, rows, tmp_path, monkeypatch):
    from lord_tune.training import progress

    drawn = []
    monkeypatch.setattr(progress, "draw", lambda log, file, title, unit: drawn.append((len(log), title, unit)))
    train(base, rows, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
    assert [count for count, _, _ in drawn] == [2, 4, 5]
    assert drawn[0][1:] == ("base, mode factors, objective sft", "loss (nats per token)")


@pytest.mark.parametrize("steps", [1, 7, 400])
def test_the_curve(tmp_path, steps):
    log = [{"step": n, "loss": 1 / n, "kl": 0.5 / n, "ce": 2 / n, "learning_rate": 1e-4} for n in range(1, steps + 1)]
    log += [{"step": steps, "eval_loss": 1.0, "eval_kl": 0.1}, {"step": steps, "train_runtime": 1.0}]
    assert draw(log, tmp_path / "curve.png", "model, mode factors, objective distill", "loss (nats per token)")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1
    assert not draw([], tmp_path / "none.png", "", "")


def test_a_step_that_a_resumed_run_logs_again_counts_once():
    assert points([{"step": 2, "loss": 5.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 4.0}], "loss") == (
        [1, 2],
        [3.0, 4.0],
    )


def test_trackers_are_those_that_are_installed(tmp_path, monkeypatch):
    from lord_tune.training import arguments

    for installed in ([], ["trackio"], ["tensorboard", "trackio"]):
        monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name, have=installed: name in have or None)
        given = {"output_dir": str(tmp_path)}
        assert trainer_arguments(given, "factors", True, []).report_to == installed
        assert trainer_arguments(given | {"report_to": "none"}, "factors", True, []).report_to == []


# ---- killed and continued ----------------------------------------------------------------------------------------

MOMENTS = [
    ("step", "1", "before"),  # before the first checkpoint
    ("step", "5", "before"),
    ("rename", "checkpoint-4/log_state.json", "after"),
    ("save", "checkpoint-4/adapter_model.safetensors", "half"),
    ("save", "checkpoint-4/optimizer.pt", "half"),
    ("save", "checkpoint-4/rng_state.pth", "before"),
    ("save", ".adapter.partial/adapter_model.safetensors", "half"),
    ("rename", "run/adapter_model.safetensors", "after"),
    ("rename", "run/train_results.json", "before"),
]


def words_of(base: Path, rows: Path, **options: Any) -> list[str]:
    # dropout: the state of the random numbers must continue too; logging does not fall on the checkpoints
    own = {"model_name_or_path": str(base), "dataset_name": str(rows), "output_dir": "run", "max_steps": 6}
    own |= {"save_steps": 2, "mode": "lora", "lora_dropout": 0.1, "logging_steps": 3, "packing": "false"}
    return ["train", *(word for key, value in (SHORT | own | options).items() for word in (f"--{key}", str(value)))]


def outcome(folder: Path) -> tuple[Any, ...]:
    results = json.loads((folder / "run" / "train_results.json").read_text())
    kept = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate", "step", "kl", "ce")
    history = [{key: entry[key] for key in kept if key in entry} for entry in results["history"]]
    return history, results["train_loss"], load_file(folder / "run" / "adapter_model.safetensors")


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    weights = first[2].keys() == second[2].keys() and all(torch.equal(first[2][k], second[2][k]) for k in first[2])
    return first[:2] == second[:2] and weights


@pytest.fixture(scope="module")
def uninterrupted(forks, base, rows, tmp_path_factory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("whole")
    ended = forks.run(folder, words_of(base, rows))
    assert ended.codes == [0], ended.stderr[-2000:]
    return outcome(folder)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: " ".join(moment).replace("/", " "))
def test_a_killed_run_continues_to_the_same_end(forks, base, rows, tmp_path, uninterrupted, moment):
    words = words_of(base, rows)
    ended = forks.run(tmp_path, words, die=moment)
    assert ended.killed, ended.stderr[-2000:]
    adapter = tmp_path / "run" / "adapter_model.safetensors"
    if adapter.exists():
        load_file(adapter)  # never a half written one
    again = forks.run(tmp_path, words)
    assert again.codes == [0], again.stderr[-2000:]
    assert same(outcome(tmp_path), uninterrupted)
    if moment[1].startswith("checkpoint-4/"):
        assert "checkpoint-4 is left out and removed: " in again.stderr
        results = json.loads((tmp_path / "run" / "train_results.json").read_text())
        assert results["resumed_from"].endswith("checkpoint-2")
    assert not (tmp_path / "run" / ".adapter.partial").exists()


def test_a_checkpoint_is_whole_or_says_what_it_lacks(forks, base, rows, tmp_path):
    forks.run(tmp_path, words_of(base, rows, max_steps=2))
    whole = tmp_path / "run" / "checkpoint-2"
    assert defect(whole) is None
    assert defect(whole, processes=2) == "rng_state_0.pth is missing"
    names = ["trainer_state.json", "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt"]
    for name in [*names, "rng_state.pth", "log_state.json"]:
        file = whole / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert defect(whole), name
        file.unlink()
        assert name in str(defect(whole)), name
        file.write_bytes(content)
    (whole / "optimizer.pt").unlink()
    assert defect(whole, optimizer=False) is None
    moved = whole.rename(tmp_path / "run" / "checkpoint-3")
    assert "another step" in str(defect(moved))
    with pytest.raises(UsageError, match="is not whole: trainer_state.json is of another step"):
        train(base, rows, tmp_path / "other", resume_from_checkpoint=str(moved))


def test_a_run_continues_on_as_many_processes_as_before(forks, base, rows, tmp_path):
    forks.run(tmp_path, words_of(base, rows, max_steps=2), processes=2)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    ended = forks.run(tmp_path, words_of(base, rows, max_steps=4))
    assert ended.codes == [2] and "another processes" in ended.stderr
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


# ---- preferences -------------------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"{n} plus 1 is", "chosen": f" {n + 1}", "rejected": f" {n + 7}"} for n in range(8)]


@pytest.mark.parametrize("mode", ["factors", "lora"])
def test_dpo_starts_at_ln_2_and_learns(base, tmp_path, capfd, mode):
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    metrics = train(base, rows, tmp_path / "run", objective="dpo", mode=mode, max_steps=8, beta=0.5)
    losses = [entry["loss"] for entry in metrics["history"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0] - 0.01
    assert not (tmp_path / "run" / "ref").exists()  # trl's frozen copy of the adapter
    model, _ = lord_tune.load(str(tmp_path / "run"))
    assert list(model.peft_config) == ["default"]
    out, err = capfd.readouterr()
    assert "prompt: 0 plus 1 is" in out and "chosen: ⟦ 1<eos>⟧" in out and "rejected: ⟦ 7<eos>⟧" in out
    assert "accuracy" in err


def test_dpo_takes_messages(base, tmp_path):
    chat = chat_base(base, tmp_path / "chat", CHATML)
    turns = [
        {key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in pair.items()}
        for pair in PAIRS
    ]
    rows = write_rows(tmp_path / "pairs.jsonl", turns)
    metrics = train(chat, rows, tmp_path / "run", objective="dpo", max_length=200)
    assert metrics["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    with pytest.raises(UsageError, match="no chat template"):
        train(base, rows, tmp_path / "other", objective="dpo")


def test_dpo_refuses_what_it_cannot_use(base, bert_dir, rows, tmp_path):
    with pytest.raises(UsageError, match="expects prompt, chosen and rejected"):
        train(base, rows, tmp_path / "run", objective="dpo")
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"prompt": "a", "chosen": [{"role": "user", "content": "b"}],
                                                   "rejected": [{"role": "user", "content": "c"}]}])  # fmt: skip
    with pytest.raises(UsageError, match="row 1: 'prompt' is text and 'chosen' is a list"):
        train(base, mixed, tmp_path / "run", objective="dpo")
    lord_tune.decompose(str(bert_dir), str(tmp_path / "bert"), rank=4, method="svd")
    for objective in ("dpo", "distill"):
        with pytest.raises(UsageError, match="predicts the next token"):
            train(tmp_path / "bert", rows, tmp_path / "run", objective=objective)
    given = {"output_dir": str(tmp_path)}
    assert trainer_arguments(given | {"beta": 0.3}, "lora", True, [], False, "dpo").beta == 0.3
    assert trainer_arguments(given, "lora", True, [], False, "dpo").learning_rate == pytest.approx(2e-5)
    with pytest.raises(UsageError, match="trl's DPOConfig|did you mean"):
        trainer_arguments(given | {"packing": True}, "lora", True, [], False, "dpo")
    with pytest.raises(UsageError, match="Unknown training key 'beta'"):
        trainer_arguments(given | {"beta": 0.3}, "lora", True, [])


# ---- several processes -------------------------------------------------------------------------------------------


def test_two_processes_log_what_one_does(forks, base, rows, tmp_path):
    """The same global batch: 4 rows. Sums in another order: 2^-24 per addition, of losses near 6."""
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        words = words_of(base, rows, mode="factors", logging_steps=1, per_device_train_batch_size=batch)
        cut = words.index("--lora_dropout")
        del words[cut : cut + 2]
        ended = forks.run(folder, words, processes=processes)
        assert ended.codes == [0] * processes, ended.stderr[-2000:]
    one, two = (outcome(tmp_path / name) for name in ("1", "2"))
    losses = [[entry["loss"] for entry in history] for history, _, _ in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 6
    assert (tmp_path / "2" / "run" / "checkpoint-6" / "rng_state_1.pth").is_file()
    assert defect(tmp_path / "2" / "run" / "checkpoint-6", processes=2) is None


def test_ways_of_sharding_that_cannot_work_are_refused(tmp_path, monkeypatch):
    def arguments(**more: Any) -> None:
        trainer_arguments({"output_dir": str(tmp_path)} | more, "factors", True, [])

    with pytest.raises(UsageError, match="FSDP1 flattens"):
        arguments(fsdp="full_shard")
    for config in ({"version": 2}, '{"version": 2}'):
        with pytest.raises(UsageError, match="FSDP on a CPU"):
            arguments(fsdp="full_shard", fsdp_config=config)
    with pytest.raises(UsageError, match="Got bf16 with FSDP2"):
        arguments(fsdp="full_shard", fsdp_config={"version": 2}, bf16=True)
    with pytest.raises(UsageError, match="ZeRO"):
        arguments(deepspeed="zero3.json")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="FSDP1 flattens"):
        arguments()
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UsageError, match="FSDP on a CPU"):
        arguments()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UsageError, match="mixed_precision: bf16 with FSDP2"):
        arguments()


FSDP = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import lord_tune
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.adapters.attach import add_lora, expose_factors
torch.set_num_threads(1)
folder, mode, shard = sys.argv[1], sys.argv[2], len(sys.argv) > 3
torch.manual_seed(0)
model = load_dense_or_factored(folder)
exposed = expose_factors(model) if mode == "factors" else add_lora(model, rank=4)
rank, size = 0, 1
if shard:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (size,))
    for layer in exposed.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(exposed, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in exposed.parameters() if p.requires_grad)
    packed = [p for p in exposed.parameters() if p.dtype == torch.uint8 and p.numel()]
    assert packed and all(isinstance(p, DTensor) for p in packed)
optimizer = torch.optim.AdamW([p for p in exposed.parameters() if p.requires_grad], 1e-2)
batch = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
for _ in range(4):
    part = batch[rank::size]
    loss = exposed(input_ids=part, labels=part, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    whole = loss.detach().clone()
    if shard:
        dist.all_reduce(whole)
        whole /= size
    if rank == 0:
        print("loss", float(whole), flush=True)
"""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["factors", "lora"])
def test_fsdp2_shards_factors_and_packed_codes(aligned_llama_dir, tmp_path, mode):
    """torch's fully_shard on two CPU processes, which accelerate does not offer: the same losses as one process."""
    options = {"backbone": "nf4"} if mode == "factors" else {"factor_format": "nf4"}
    lord_tune.decompose(str(aligned_llama_dir), str(tmp_path / "base"), rank=16, method="svd", **options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", FSDP, str(tmp_path / "base"), mode]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment, **pipes)]
    for rank in range(2):
        world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        runs.append(subprocess.Popen([*command, "shard"], env=environment | world, **pipes))
    ended = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], [err[-1500:] for _, err in ended]
    losses = [[float(line.split()[1]) for line in out.splitlines() if line.startswith("loss")] for out, _ in ended[:2]]
    # means of two halves and sums in another order: 1e-6 of losses near 6, a little more after steps of AdamW
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]
