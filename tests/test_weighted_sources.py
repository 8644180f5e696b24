"""Calibration text of several sources: how weights are read, shared out, kept in order and reported."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import ForkServer
from test_engine import TEXT, assert_equal_decompositions
from tiny import tiny_llama, tiny_tokenizer, write_code_rows

import lord_tune
from lord_tune.calibration.corpus import token_windows
from lord_tune.calibration.mixture import even_sample, in_words, interleaved, mixed_windows, shares
from lord_tune.cli import main
from lord_tune.config import DecomposeConfig
from lord_tune.data.texts import documents
from lord_tune.data.weighted import Source, weighted_sources
from lord_tune.decomposition import TextSize, Windows
from lord_tune.errors import CalibrationError, LordWarning, UsageError
from lord_tune.resolve import asked_text, windows_of

ROOT = Path(__file__).parent.parent
MIX = ["--calibration", "code.jsonl:0.6", "prose.txt:0.4"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with code.jsonl and prose.jsonl, none of whose words is in the code."""
    monkeypatch.chdir(tmp_path)
    write_code_rows(tmp_path / "code.jsonl")
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps({"text": f"ÄÖÜ {n} " * 90}) + "\n" for n in range(24)))
    return tmp_path


def windows(*calibration: str, tokens: int = 1024, **options: Any) -> tuple[Windows, dict[str, Any]]:
    """What a run with these sources reads, in windows of 64 tokens."""
    values = {"calibration_tokens": tokens, "context_length": 64, "rank": 8, "calibration": list(calibration)}
    config = DecomposeConfig.build({"model": "m", "out": "o", **values, **options})
    found, described = windows_of(config, tiny_llama(), tiny_tokenizer())
    assert found is not None
    return found, dict(described)


def of_prose(ids: torch.Tensor) -> list[bool]:
    """Which windows are of prose.jsonl."""
    texts = [tiny_tokenizer().decode(window) for window in ids]
    return ["Ä" in text or "Ö" in text or "Ü" in text for text in texts]


# --- how they are read ---


def test_a_number_behind_the_last_colon_is_a_weight(here):
    found = weighted_sources(["code.jsonl:3", "prose.jsonl:1e0", "org/wiki.v1:0.5", "wiki:.5", "missing.txt:3"])
    assert [source.name for source in found] == ["code.jsonl", "prose.jsonl", "org/wiki.v1", "wiki", "missing.txt"]
    assert [source.weight for source in found] == pytest.approx([0.375, 0.125, 0.0625, 0.0625, 0.375])
    large = weighted_sources(["code.jsonl:1e308", "prose.jsonl:1e308"])
    assert [source.weight for source in large] == [0.5, 0.5]


@pytest.mark.parametrize(
    "name",
    ["code.jsonl", "C:\\data\\code.jsonl", "C:/data/2", "C:2", "org/wiki", "org/wiki:main", "https://host/a", ":2"],
)
def test_other_colons_belong_to_the_name(here, name):
    assert weighted_sources([name, "prose.jsonl"]) == [Source(name, None), Source("prose.jsonl", None)]


def test_a_file_of_exactly_this_name_comes_first(here):
    (here / "a:0.5").write_text("text")
    (here / "a").write_text("text")
    assert weighted_sources(["a:0.5"]) == [Source("a:0.5", None)]
    assert weighted_sources(["a:0.5:1", "code.jsonl:3"]) == [Source("a:0.5", 0.25), Source("code.jsonl", 0.75)]
    assert weighted_sources(["a:2", "code.jsonl:2"])[0] == Source("a", 0.5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["code.jsonl:0", "prose.jsonl:1"], "Got the weight '0' of code.jsonl in `calibration`; expected a positive"),
        (["code.jsonl:1", "prose.jsonl:-2"], "Got the weight '-2' of prose.jsonl"),
        (["code.jsonl:nan", "prose.jsonl:1"], "Got the weight 'nan' of code.jsonl"),
        (["code.jsonl:inf", "prose.jsonl:1"], "Got the weight 'inf' of code.jsonl"),
        (["code.jsonl:1e999", "prose.jsonl:1"], "Got the weight '1e999' of code.jsonl"),
        (["code.jsonl:half", "prose.jsonl"], "Got the weight 'half' of code.jsonl"),
        (["code.jsonl:50%", "prose.jsonl:50%"], "Got the weight '50%' of code.jsonl"),
        (["code.jsonl:", "prose.jsonl"], "Got the weight '' of code.jsonl"),
        (["code.jsonl:1", "prose.jsonl"], "prose.jsonl in `calibration` has no weight and other sources have one"),
        (["code.jsonl:0.5"], "The weight of code.jsonl has no effect"),
        (["code.jsonl:1", "./code.jsonl:1"], "./code.jsonl stands twice in `calibration`"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_weight_that_is_none_is_refused_by_name(here, given, says):
    for verb, first in ((lord_tune.decompose, ("m", "out")), (lord_tune.plan, ("m",))):
        with pytest.raises(UsageError, match=re.escape(says)) as error:
            verb(*first, rank=8, calibration=given)
        assert str(error.value).count(".  ") == 0 and "\n" not in str(error.value)
    assert {path.name for path in here.iterdir()} == {"code.jsonl", "prose.jsonl"}


# --- how they are shared out ---


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ([1], 5, [5]),
        ([0.5, 0.5], 16, [8, 8]),
        ([0.5, 0.5], 5, [3, 2]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([0.4, 0.35, 0.25], 10, [4, 4, 2]),  # quotas 4, 3.5, 2.5: the first of the equal remainders
        ([0.98, 0.01, 0.01], 16, [14, 1, 1]),
        ([0.49, 0.49, 0.02], 3, [1, 1, 1]),
        ([1e-300, 1], 2, [1, 1]),
    ],
)
def test_shares_are_the_largest_remainders_and_at_least_one(weights, count, expected):
    assert shares(weights, count) == expected


@pytest.mark.parametrize("counts", [(8, 8), (14, 2), (5, 3, 1), (1, 1), (7,)])
def test_every_beginning_holds_the_parts_in_proportion(counts):
    parts = [torch.tensor([[i, j] for j in range(count)]) for i, count in enumerate(counts)]
    mixed = interleaved(parts)
    for i, part in enumerate(parts):
        assert torch.equal(mixed[mixed[:, 0] == i], part)  # each in its own order
    for length in range(1, len(mixed) + 1):
        found = Counter(mixed[:length, 0].tolist())
        for i, count in enumerate(counts):
            assert abs(found[i] - length * count / sum(counts)) <= 1, (length, i)


def test_a_sample_holds_the_parts_in_proportion_at_every_size():
    """An even sample over the interleaved windows would not: of 8 + 8, every second one is of one source."""
    parts = [torch.tensor([[i, j] for j in range(8)]) for i in range(2)]
    for count in range(1, 20):
        found = even_sample(parts, count)
        sizes = [int((found[:, 0] == i).sum()) for i in range(2)]
        assert sum(sizes) == min(16, max(2, count)) and abs(sizes[0] - sizes[1]) <= 1
    assert sorted(even_sample(parts, 16).tolist()) == torch.cat(parts).tolist()


def test_sources_without_weights_are_one_text_as_before(here):
    """The windows that the documents of all files give together, and an even sample of all of them."""
    found, described = windows("code.jsonl", "prose.jsonl")
    texts = documents(["code.jsonl", "prose.jsonl"], tiny_tokenizer())
    calibration, heldout = token_windows(texts, tiny_tokenizer(), 1024, 64, 64, 0)
    assert torch.equal(found.calibration, calibration) and torch.equal(found.heldout, heldout)
    assert torch.equal(found.sensitivity, calibration)
    few, _ = windows("code.jsonl", "prose.jsonl", sensitivity_tokens=5 * 64, kept_fraction=0.8, rank=None)
    assert torch.equal(few.sensitivity, calibration[[0, 3, 7, 11, 15]])
    assert "mixture" not in described and described["source"] == ["code.jsonl", "prose.jsonl"]


def test_each_source_gives_its_share_of_every_kind_of_window(here):
    options = {"kept_fraction": 0.8, "rank": None}
    found, described = windows("code.jsonl:3", "prose.jsonl:1", tokens=2048, sensitivity_tokens=512, **options)
    assert [len(ids) for ids in (found.calibration, found.heldout, found.sensitivity)] == [32, 2, 8]
    assert [sum(of_prose(ids)) for ids in (found.calibration, found.heldout, found.sensitivity)] == [8, 1, 2]
    for first in range(0, 32, 4):
        assert sum(of_prose(found.calibration[first : first + 4])) == 1
    own = token_windows(documents(["code.jsonl"]), tiny_tokenizer(), 24 * 64, 64, 64, 0)
    assert torch.equal(found.calibration[[not prose for prose in of_prose(found.calibration)]], own[0])
    assert described["source"] == ["code.jsonl", "prose.jsonl"] and described["tokens"] == 2048
    assert described["mixture"] == {
        "code.jsonl": {"asked_weight": 0.75, "weight": 0.75, "tokens": 1536, "heldout_tokens": 64},
        "prose.jsonl": {"asked_weight": 0.25, "weight": 0.25, "tokens": 512, "heldout_tokens": 64},
    }


def test_the_windows_depend_on_seed_and_weights_alone(here):
    one, _ = windows("code.jsonl:1", "prose.jsonl:1")
    same, _ = windows("code.jsonl:0.5", "prose.jsonl:0.5")
    other, _ = windows("code.jsonl:1", "prose.jsonl:1", seed=1)
    assert torch.equal(one.calibration, same.calibration) and torch.equal(one.heldout, same.heldout)
    assert torch.equal(one.sensitivity, same.sensitivity) and not torch.equal(one.calibration, other.calibration)


def test_held_out_documents_are_not_calibrated_on(here):
    (here / "prose.jsonl").write_text("".join(json.dumps({"text": f"Ä{n}Ö " * 90}) + "\n" for n in range(24)))
    found, _ = windows("code.jsonl:1", "prose.jsonl:1", tokens=2048)
    calibration, heldout = (
        {number for window in ids for number in re.findall(r"Ä(\d+)Ö", tiny_tokenizer().decode(window))}
        for ids in (found.calibration, found.heldout)
    )
    assert calibration and heldout and not calibration & heldout


def test_one_window_of_each_source_is_held_out_where_a_sixteenth_is_less(here):
    found, _ = windows("code.jsonl:9", "prose.jsonl:1", tokens=1024)
    assert of_prose(found.heldout).count(True) == of_prose(found.heldout).count(False) == 1
    assert sum(of_prose(found.calibration)) == 2  # of 16, the quota is 1.6
    found, _ = windows(
        "code.jsonl:9", "prose.jsonl:1", tokens=1024, sensitivity_tokens=64, kept_fraction=0.8, rank=None
    )
    assert sorted(of_prose(found.sensitivity)) == [False, True]
    config = DecomposeConfig.build(
        {"model": "m", "out": "o", "kept_fraction": 0.8, "calibration": ["one:1", "two:1"], "sensitivity_tokens": 64}
    )
    assert asked_text(config, 64) == TextSize(16384, 1024, 64, 128, 64)  # and it is what `plan` counts


def test_fewer_windows_than_sources_are_refused(here):
    says = r"`calibration_tokens` 64 fills fewer windows of 64 tokens than the 2 sources .* at least 128"
    with pytest.raises(UsageError, match=says):
        windows("code.jsonl:1", "prose.jsonl:1", tokens=64)
    windows("code.jsonl:1", "prose.jsonl:1", tokens=128)


def test_a_source_that_is_too_short_is_named_with_the_weight_it_has(here):
    (here / "short.txt").write_text("ÄÖÜ. " * 60)
    available = len(tiny_tokenizer()((here / "short.txt").read_text())["input_ids"])
    fills = available // 64 - 1  # one is held out
    assert 1 <= fills < 8
    with pytest.warns(LordWarning) as told:
        found, described = windows("code.jsonl:1", "short.txt:1")
    weight = fills / (8 + fills)
    says = (
        f"short.txt fills {fills} of its 8 windows of 64 tokens; all of it is used, and its weight is {weight:.1%} in"
    )
    assert [str(one.message).startswith(says) for one in told] == [True]
    assert len(found.calibration) == 8 + fills and described["mixture"]["short.txt"]["tokens"] == 64 * fills
    assert described["mixture"]["short.txt"]["asked_weight"] == 0.5
    assert math.isclose(sum(share["weight"] for share in described["mixture"].values()), 1)


def test_a_source_without_a_window_of_each_is_refused_by_name(here):
    (here / "tiny.txt").write_text("word")
    with pytest.raises(CalibrationError, match=r"^tiny\.txt has \d+ tokens; at least 128 are needed"):
        windows("code.jsonl:1", "tiny.txt:1")
    with pytest.raises(UsageError, match=r"The text file missing\.txt does not exist"):
        windows("code.jsonl:1", "missing.txt:1")


def test_no_warning_where_every_source_suffices(here):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = {name: documents([name]) for name in ("code.jsonl", "prose.jsonl")}
        weights = {"code.jsonl": 0.5, "prose.jsonl": 0.5}
        parts = mixed_windows(texts, weights, tiny_tokenizer(), 16, 4, 64, 0)
    assert [(len(part.calibration), len(part.heldout)) for part in parts.values()] == [(8, 2), (8, 2)]


# --- what a run says of them ---


@pytest.fixture(scope="module")
def mixed_run(llama_dir, tmp_path_factory) -> Path:
    """A folder with both texts and OUT of a run on them; prose comes from a YAML file's relative path."""
    folder = tmp_path_factory.mktemp("mixed")
    write_code_rows(folder / "code.jsonl")
    (folder / "prose.txt").write_text("The lighthouse keeper climbed the stairs, counting the steps aloud. " * 200)
    server = ForkServer()
    try:
        for out, processes in (("out", 1), ("two", 2)):
            words = ["decompose", str(llama_dir), out, "--kept-fraction", "0.8", *TEXT]
            ended = server.run(folder, [*words, *MIX], processes=processes)
            assert ended.codes == [0] * processes, ended.stderr[-2000:]
            assert ended.stdout.count("calibrating on code.jsonl (62.5 %, 320 tokens) and prose.txt (37.5 %, 192") == 1
    finally:
        server.close()
    return folder


@pytest.mark.slow
def test_two_processes_give_the_same_decomposition_of_a_mixture(mixed_run):
    assert_equal_decompositions(mixed_run / "out", mixed_run / "two")


def test_the_report_and_the_card_name_the_mixture(mixed_run):
    report = json.loads((mixed_run / "out/decomposition.json").read_text())
    assert report["config"]["calibration"] == MIX[1:]
    assert "--calibration code.jsonl:0.6 prose.txt:0.4" in report["command"]
    found = report["calibration"]
    assert found["source"] == ["code.jsonl", "prose.txt"] and found["tokens"] == 512
    assert found["mixture"]["prose.txt"] == {
        "asked_weight": pytest.approx(0.4),
        "weight": 0.375,
        "tokens": 192,
        "heldout_tokens": 64,
    }
    card = (mixed_run / "out/README.md").read_text()
    assert "Calibrated on code.jsonl (62.5 %, 320 tokens) and prose.txt (37.5 %, 192 tokens).\n" in card


def test_a_card_without_a_mixture_does_not_speak_of_one(llama_dir, rows_file, tmp_path):
    out = tmp_path / "out"
    lord_tune.decompose(
        str(llama_dir), str(out), rank=8, calibration=[str(rows_file)], calibration_tokens=128, context_length=64
    )
    assert "Calibrated on" not in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_run_with_other_weights_is_not_resumed(mixed_run, llama_dir, tmp_path):
    server = ForkServer()
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("code.jsonl", "prose.txt"):
        (folder / name).write_bytes((mixed_run / name).read_bytes())
    words = ["decompose", str(llama_dir), "out", "--kept-fraction", "0.8", *TEXT]
    try:
        assert server.run(folder, [*words, *MIX], die=("line", "calibrating/1", "half")).killed
        other = ["--calibration", "code.jsonl:0.4", "prose.txt:0.6", "--resume"]
        ended = server.run(folder, [*words, *other])
        assert ended.codes == [2] and "asked_weight was 0.6, now it is 0.4" in ended.stderr
        ended = server.run(folder, [*words, *MIX, "--resume"])
        assert ended.codes == [0], ended.stderr
    finally:
        server.close()
    assert (folder / "out/model-00001-of-00004.safetensors").read_bytes() == (
        mixed_run / "out/model-00001-of-00004.safetensors"
    ).read_bytes()


def test_a_plan_counts_the_windows_of_the_run(mixed_run, llama_dir, tmp_path, monkeypatch, capsys):
    """One held-out window more than without weights, as the run reads: both estimate the same scratch files."""
    monkeypatch.chdir(mixed_run)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calibration: [code.jsonl:0.6, prose.txt:0.4]\nkept_fraction: 0.8\n")
    words = ["plan", str(llama_dir), "--config", str(recipe), *TEXT, "--json"]
    found = {}
    for name, more in (("mixed", []), ("pooled", ["--calibration", "code.jsonl", "prose.txt"])):
        with pytest.raises(SystemExit) as stop:
            main([*words, str(tmp_path / name), *more])
        assert stop.value.code == 0, capsys.readouterr().err
        found[name] = json.loads((tmp_path / name).read_text())["scratch_bytes"]
    assert found["mixed"] > found["pooled"]


def test_the_mixture_in_words():
    share = {"asked_weight": 0.5, "weight": 1 / 3, "tokens": 1024, "heldout_tokens": 64}
    assert in_words({"a": share, "b": share}) == "a (33.3 %, 1,024 tokens) and b (33.3 %, 1,024 tokens)"
    assert in_words(dict.fromkeys("abc", share)).count(", b (33.3 %, 1,024 tokens) and c (") == 1


# --- the texts of the recipes ---


def test_prose_is_split_without_overlap_and_recipes_name_what_is_written(tmp_path):
    """Topics of the language reference quote each other; no paragraph is both calibrated on and held out."""
    command = [sys.executable, str(ROOT / "scripts/make_code_data.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    texts = {
        path.stem: [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in tmp_path.iterdir()
    }
    train, held = (
        {" ".join(part.split()) for text in texts[name] for part in text.split("\n\n")}
        for name in ("prose_train", "prose_heldout")
    )
    assert not train & held
    assert sum(map(len, texts["prose_train"])) > 200_000 and sum(map(len, texts["prose_heldout"])) > 40_000
    named = set()
    for path in (ROOT / "recipes").glob("[!l]*/decompose/*.yaml"):  # those of Llama read other texts
        settings = re.sub("(?m)^#.*", "", path.read_text())  # headers name the held-out text of their figures
        named |= set(re.findall(r"data/(\w+)\.jsonl", settings))
    assert named == {"code_train", "prose_train"} and named < set(texts)
