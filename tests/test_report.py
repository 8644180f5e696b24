"""The report: what it shows is what the records hold, text is escaped, parts without numbers are left out."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import lord_tune
from lord_tune.cli import main
from lord_tune.errors import UsageError
from lord_tune.evaluation.records import Value, measured_of
from lord_tune.factorizations.tails import POINTS, tail_curve, thinned
from lord_tune.reporting.numbers import change, decimals, fixed, significant
from lord_tune.reporting.parts import DENSE, EMBEDDINGS, FACTORS, HEAD, bytes_by_part, tensor_bytes
from lord_tune.reporting.runs import layers_of, read_run

SMALL = {"calibration_tokens": 512, "context_length": 64}
VOID = {"meta", "link", "br", "input", "img", "hr"}
EVIL = "<script>alert('&')</script>"


class Page(HTMLParser):
    """Tags, texts by place, tables, and whether every tag is closed by its own."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        self.errors += self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}>")

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))
        if any(tag in self.open for tag in ("td", "th")):
            self.tables[-1][-1][-1] += data.strip() + ("" if not data.strip() else " ")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag):
        return [text for name, text in self.texts if name == tag]

    def row(self, label):
        """The cells of the first row that begins so."""
        found = (row for table in self.tables for row in table if row and row[0].startswith(label))
        return [cell.strip() for cell in next(found)]


def page_of(path) -> Page:
    return Page(Path(path).read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llama_dir, rows_file):
    """Plain L R, Q + L R, an adapter on the latter, their measurements, and one of the original."""
    root = tmp_path_factory.mktemp("report")
    text = [str(rows_file)]
    lord_tune.decompose(str(llama_dir), str(root / "lord"), kept_fraction=0.7, calibration=text, **SMALL)
    lord_tune.decompose(str(llama_dir), str(root / "nf4"), backbone="nf4", rank=4, calibration=text, **SMALL)
    lord_tune.train(
        model_name_or_path=str(root / "nf4"),
        dataset_name=str(rows_file),
        output_dir=str(root / "sft"),
        max_steps=4,
        logging_steps=1,
        max_length=64,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
    )
    given = {"context_length": 64, "max_tokens": 256}
    for name in ("lord", "nf4"):
        lord_tune.evaluate(str(root / name), text=text, json=str(root / name / "evaluate.json"), **given)
    lord_tune.evaluate(str(llama_dir), text=text, json=str(root / "dense.json"), **given)
    return root


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The page of all of them."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    found = lord_tune.report([str(runs / name) for name in ("dense.json", "lord", "sft")], out=str(out))
    assert found["runs"] == ["dense", "lord", "nf4", "sft"]  # the checkpoint of the adapter came along
    return page_of(out)


def test_the_page_is_well_formed_and_alone(whole):
    assert whole.errors == []
    assert not whole.all("script") and not whole.all("link") and not whole.all("img") and not whole.all("iframe")
    for tag, attributes in whole.tags:
        for key in ("src", "href", "xlink:href", "data"):
            assert (attributes.get(key) or "#").startswith("#"), (tag, attributes)
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
    style = " ".join(whole.text("style"))
    assert "@import" not in style and "http" not in style


def test_the_page_is_accessible(whole):
    assert whole.all("html")[0]["lang"] == "en" and whole.all("title")
    levels = [int(tag[1]) for tag, _ in whole.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    names = [attributes["id"] for _, attributes in whole.tags if "id" in attributes]
    assert len(names) == len(set(names))
    links = re.findall(r"url\(#([^)]+)\)", " ".join(str(a) for _, a in whole.tags))
    assert set(links) | {a["href"][1:] for a in whole.all("a") + whole.all("use")} <= set(names)
    drawings = [svg for svg in whole.all("svg") if svg.get("class") != "swatch"]
    assert drawings and len(drawings) == len(whole.all("figure")) == len(whole.all("figcaption"))
    for svg in drawings:
        assert svg["role"] == "img" and set(svg["aria-labelledby"].split()) <= set(names)
    assert len(whole.all("caption")) == len(whole.all("table"))
    assert {th["scope"] for th in whole.all("th")} == {"col", "row", "colgroup"}


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_light_and_dark(whole):
    """WCAG 2.1: 4.5 for text (1.4.3), 3 for what a figure is read by (1.4.11)."""
    style = " ".join(whole.text("style"))
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media screen")[:2])
    dark = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style.split("@media screen")[1].split("* {")[0]))
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style.split("@media screen")[0]))
    assert len(light) == len(dark) >= 18

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for colours in (light, dark):
        for name in ("ink", "muted", "accent"):
            assert contrast(colours[name], colours["page"]) >= 4.5, (name, colours)
        assert contrast(colours["note-ink"], colours["note"]) >= 4.5
        for index in range(8):
            assert contrast(colours[f"series-{index}"], colours["page"]) >= 3


def test_figures_take_their_colours_from_the_page(whole):
    drawn = [a["style"] for tag, a in whole.tags if tag in ("path", "text", "g", "rect") and a.get("style")]
    colours = set(re.findall(r"(?:fill|stroke): ([^;]+)", "; ".join(drawn)))
    assert {c for c in colours if not c.startswith("var(--")} <= {"none"}


def test_numbers_are_those_of_the_records(whole, runs, rows_file):
    record = json.loads((runs / "lord" / "decomposition.json").read_text())
    measured = {name: json.loads((runs / name / "evaluate.json").read_text()) for name in ("lord", "nf4")}
    dense = json.loads((runs / "dense.json").read_text())["perplexity"]
    row = whole.row(f"perplexity, {rows_file.name}")
    shown = [float(cell.split()[0].replace(",", "")) if cell[0].isdigit() else None for cell in row[1:]]
    wanted = [dense, measured["lord"]["perplexity"], measured["nf4"]["perplexity"], None]
    for got, value in zip(shown, wanted, strict=True):
        assert got == (None if value is None else pytest.approx(value, abs=0.51)), row
    assert "the run read this text" in row[2]
    totals = record["totals"]
    numbers = whole.row("stored numbers")
    assert numbers[1] == f"{totals['parameters_before']:,.0f}"
    assert numbers[2].startswith(f"{totals['parameters']:,.0f}")
    assert whole.row("training steps")[1:] == ["–", "–", "–", "4"]
    kept = [kind for kind in (row[0].strip() for table in whole.tables for row in table if row)]
    assert kept.count("mlp.down_proj") == 2  # a table of kinds for each decomposition
    text = " ".join(text for _, text in whole.texts)
    assert record["command"].split(" --")[1] in text and "lord-tune train --model-name-or-path" in text


def test_differing_options_are_marked(whole):
    row = whole.row("backbone")
    assert "differs" in row[0] and row[1:] == ["none", "nf4"]
    assert "differs" not in whole.row("context_length")[0]


def test_every_part_is_there(whole):
    assert whole.text("h2") == [
        *("What was done", "Before and after", "Options", "Bytes by part", "Layers", "Errors over depth"),
        *("Training", "Not in this report"),
    ]
    captions = whole.text("figcaption")
    assert {"Rank over depth", "Bits per weight over depth", "training loss", "mlp.up_proj"} <= set(captions)
    assert any("Samples: no JSON file" in text for text in whole.text("li"))


def test_parts_without_records_are_left_out_with_a_sentence(llama_dir, tmp_path):
    lord_tune.decompose(str(llama_dir), str(tmp_path / "svd"), method="svd", rank=8)
    record = json.loads((tmp_path / "svd" / "decomposition.json").read_text())
    assert all(2 < len(layer["spectrum"]["ranks"]) <= POINTS for layer in record["layers"].values())
    for layer in record["layers"].values():
        del layer["spectrum"]  # as of an earlier version
    (tmp_path / "svd" / "decomposition.json").write_text(json.dumps(record))
    found = lord_tune.report([str(tmp_path / "svd")], out=str(tmp_path / "r.html"))
    page = page_of(tmp_path / "r.html")
    assert page.errors == []
    assert page.text("h2") == [
        *("What was done", "Before and after", "Options", "Bytes by part", "Layers", "Not in this report")
    ]
    told = " ".join(found["missing"])
    for words in ("Spectra of svd: not recorded", "Errors of the layers of svd", "Loss curves", "Samples", "evaluate"):
        assert words in told and any(words in text for text in page.text("li"))
    assert len(page.all("figure")) == 2  # bytes by part, and a map of bits


def test_text_of_users_is_escaped(runs, tmp_path):
    folder = tmp_path / f"{EVIL.replace('/', '')} $x_1$"
    shutil.copytree(runs / "nf4", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    record = json.loads((folder / "decomposition.json").read_text())
    record["layers"] = {name.replace("mlp", f"{EVIL}$a_b$"): layer for name, layer in record["layers"].items()}
    record["command"], record["base"]["name"], record["config"]["calibration"] = EVIL, EVIL, [EVIL]
    (folder / "decomposition.json").write_text(json.dumps(record))
    chat = [{"prompt": EVIL, "answer": f"</dd>{EVIL}"}]
    (folder / "chat.json").write_text(json.dumps(chat))
    lord_tune.report([str(folder)], out=str(tmp_path / "r.html"))
    page = page_of(tmp_path / "r.html")
    assert page.errors == [] and not page.all("script")
    assert "<script" not in (tmp_path / "r.html").read_text()
    assert EVIL in page.text("h3") and f"</dd>{EVIL}" in page.text("dd")
    assert any("$a_b$" in text for text in page.text("text"))  # in a figure, as it is


def test_samples_stand_beside_those_of_the_original(runs, tmp_path):
    folder = tmp_path / "nf4"
    shutil.copytree(runs / "nf4", folder)
    record = json.loads((folder / "evaluate.json").read_text())
    record |= {"model": str(folder), "samples": [{"prompt": "once", "original": "upon a time", "model": "more"}]}
    (folder / "evaluate.json").write_text(json.dumps(record))
    lord_tune.report([str(folder)], out=str(tmp_path / "r.html"))
    page = page_of(tmp_path / "r.html")
    place = page.text("h3").index("once")
    assert place and page.text("dd")[-2:] == ["upon a time", "more"] and page.text("dt")[-2:] == ["original", "nf4"]


def test_a_measurement_of_another_model_is_left_out(runs, tmp_path):
    folder = tmp_path / "nf4"
    shutil.copytree(runs / "nf4", folder)
    record = json.loads((folder / "evaluate.json").read_text())
    (folder / "evaluate.json").write_text(json.dumps(record | {"model": str(runs / "lord")}))
    run = read_run(str(folder))
    assert run.measured is None and "is left out" in run.notes[0]


def test_figures_of_a_checkpoint_that_was_written_again_are_left_out(runs, tmp_path):
    for name in ("nf4", "sft"):
        shutil.copytree(runs / name, tmp_path / name)
    config = json.loads((tmp_path / "sft" / "train_config.json").read_text())
    config |= {"model_name_or_path": "gone", "base_folder": "../nf4"}
    (tmp_path / "sft" / "train_config.json").write_text(json.dumps(config))
    assert read_run(str(tmp_path / "sft")).origin == (tmp_path / "nf4").resolve()
    (tmp_path / "sft" / "train_config.json").write_text(json.dumps(config | {"base": "of other weights"}))
    run = read_run(str(tmp_path / "sft"))
    assert run.origin is None and "written again since" in run.notes[0]


def test_the_export_of_an_adapter_is_shown(runs, tmp_path):
    lord_tune.export(str(runs / "sft"), str(tmp_path / "factored"), "factored")
    lord_tune.report([str(tmp_path / "factored")], out=str(tmp_path / "r.html"))
    page = page_of(tmp_path / "r.html")
    assert page.errors == [] and page.row("KL to its source")[1] != "–"
    assert page.row("factors (L and R)") and page.row("backbones (Q)")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "does not exist"),
        ({}, "is no result of lord_tune"),
        ({"decomposition.json": "[]"}, "is not a record that lord_tune wrote"),
        ({"decomposition.json": "{"}, "is not valid JSON"),
        ({"inner/train_config.json": "{}"}, "the folders inner in it are"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, words):
    folder = tmp_path / "thing"
    for name, text in (content or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if content == {}:
        folder.mkdir()
    with pytest.raises(UsageError, match=words):
        lord_tune.report([str(folder)], out=str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def test_a_file_that_is_no_measurement_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"layers": {}}')
    (tmp_path / "a.txt").write_text("text")
    for name in ("a.json", "a.txt"):
        with pytest.raises(UsageError, match="is no result of lord_tune"):
            lord_tune.report([str(tmp_path / name)], out=str(tmp_path / "r.html"))


def test_only_a_report_is_replaced(runs, tmp_path):
    out = tmp_path / "new folder" / "r.html"
    given = [str(runs / "dense.json")]
    lord_tune.report(given, out=str(out))
    with pytest.raises(UsageError, match="exists already"):
        lord_tune.report(given, out=str(out))
    lord_tune.report(given, out=str(out), overwrite=True)
    with pytest.raises(UsageError, match="is not the page of a report"):
        lord_tune.report(given, out=str(runs / "dense.json"), overwrite=True)
    with pytest.raises(UsageError, match="is a folder"):
        lord_tune.report(given, out=str(tmp_path))
    assert [path.name for path in out.parent.iterdir()] == ["r.html"]


def test_too_many_results_are_refused(tmp_path):
    record = json.dumps({"perplexity": 2.0, "texts": {"a": {"perplexity": 2.0}}})
    names = [tmp_path / f"{number}.json" for number in range(9)]
    for path in names:
        path.write_text(record)
    with pytest.raises(UsageError, match="Got 9 results"):
        lord_tune.report([str(path) for path in names], out=str(tmp_path / "r.html"))


def test_the_command_line_takes_runs_and_out(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(runs / "dense.json"), str(runs / "nf4"), "--out", str(tmp_path / "r.html")])
    assert stop.value.code == 0 and (tmp_path / "r.html").is_file()
    with pytest.raises(SystemExit) as stop:
        main(["report", "--out", str(tmp_path / "other.html")])
    assert stop.value.code == 2 and "RUNS is missing" in capsys.readouterr().err


# ---- records and numbers -------------------------------------------------------------------------------------------


def test_records_of_evaluate_and_of_lm_eval():
    texts = {"a": {"perplexity": 10.0, "loss": math.log(10), "loss_standard_error": 0.02, "tokens": 5}}
    texts["a"]["original"] = {"kl": 0.1, "kl_standard_error": 0.01, "top1_agreement": 0.9, "perplexity": 9.0}
    tasks = {"t": {"acc": 0.5, "acc_stderr": 0.05, "items": 7}, "h": {"pass@1": 0.2, "pass@1_interval": [0.1, 0.3]}}
    found = measured_of({"model": "m", "model_bytes": 3, "texts": texts, "tasks": tasks})
    assert found.perplexity["a"].error == pytest.approx(0.2)  # exp(loss) times that of the loss
    assert found.kl["a"] == Value(0.1, 0.01) and found.agreement["a"].value == 0.9 and found.original["a"].value == 9.0
    assert found.scores == {"t, acc": Value(0.5, 0.05), "h, pass@1": Value(0.2, None, (0.1, 0.3))}
    harness = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.05}}, "n-shot": {"t": 0}}
    assert measured_of(harness).scores == {"t, acc": Value(0.5, 0.05)}


def test_numbers_have_the_digits_that_mean_something():
    assert fixed(Value(9.73149, 0.0421), decimals([Value(9.73149, 0.0421)])) == "9.731 ± 0.042"
    assert fixed(Value(12345.6), decimals([Value(12345.6), Value(4000.0)])) == "12,346"
    assert fixed(Value(-0.5), 2) == "−0.50" and decimals([]) == 0 and decimals([Value(0.0)]) == 0
    assert change(10.54, 10.0) == "+5.4\u202f%" and change(9.0, 10.0) == "−10.0\u202f%" and change(1.0, None) == ""
    assert change(5000.0, 10.0) == "×\u202f500"
    assert significant(None) == "–" and significant(0.0) == "0.00" and significant(1.5e-7) == "1.50e−07"


def test_places_of_layers():
    entry = {"shape": [4, 4], "rank": 2}
    names = {"encoder.layer.0.a": entry, "decoder.layer.3.mlp.experts.7.up": entry, "pooler.dense": entry}
    kinds = [(layer.kind, layer.block) for layer in layers_of(names)]
    assert kinds == [("encoder.layer a", 0), ("decoder.layer mlp.experts.*.up", 3), ("pooler.dense", None)]


def test_bytes_by_part_are_all_bytes(runs):
    record = json.loads((runs / "lord" / "decomposition.json").read_text())
    layers = {name: layer["rank"] != "dense" for name, layer in record["layers"].items()}
    parts = bytes_by_part(runs / "lord", layers)
    files = (runs / "lord").glob("*.safetensors")
    assert sum(parts.values()) == sum(size for path in files for size, _ in tensor_bytes(path).values())
    assert parts[EMBEDDINGS] == parts[HEAD] == 300 * 64 * 4  # vocabulary, hidden size, float32; not tied
    kept = record["totals"]["kept_fraction"] * 4 * record["totals"]["linear_parameters"]
    assert parts[FACTORS] + parts[DENSE] == pytest.approx(kept, rel=0.01)  # and the places of the pivots


def test_a_thinned_curve_keeps_its_ends_and_its_values():
    curve = tail_curve(torch.rand(1000, dtype=torch.float64).sort(descending=True).values, torch.tensor(500.0))
    kept = thinned(curve)
    assert len(kept["ranks"]) <= POINTS and kept["ranks"][0] == 0 and kept["ranks"][-1] == 1000
    for rank, error in zip(kept["ranks"], kept["errors"], strict=True):
        assert error == pytest.approx(float(curve[rank]), rel=1e-3)
    assert thinned(curve[:1])["ranks"] == [0]


def test_the_recorded_spectrum_meets_the_recorded_error(runs):
    """Where the chosen rank is a recorded one, both are the error of the same truncation (Q + L R: before the factors
    are rounded to the dtype of the weights, float32 here)."""
    for name in ("lord", "nf4"):
        record = json.loads((runs / name / "decomposition.json").read_text())
        met = 0
        for layer in record["layers"].values():
            ranks, errors = (layer["spectrum"] or {"ranks": [], "errors": []}).values()
            assert all(after <= before for before, after in zip(errors, errors[1:], strict=False))
            if layer["rank"] in ranks:
                met += 1
                assert errors[ranks.index(layer["rank"])] == pytest.approx(layer["error_calibrated"], rel=2e-3)
        assert met, name


# ---- in a browser --------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_it_in_every_way(runs, tmp_path):
    """On a screen, in the dark, on a phone without scrolling to the side, and as PDF."""
    from PIL import Image

    out = tmp_path / "r.html"
    lord_tune.report([str(runs / name) for name in ("dense.json", "lord", "sft")], out=str(out))
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]

    def shot(name: str, *options: str) -> Image.Image:
        picture = tmp_path / name
        command = [*common, *options, f"--screenshot={picture}", f"file://{out}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return Image.open(picture).convert("RGB")

    light = shot("light.png", "--window-size=1280,2400")
    dark = shot("dark.png", "--window-size=1280,2400", "--blink-settings=preferredColorScheme=0")
    assert min(light.getpixel((3, 3))) > 240 and max(dark.getpixel((3, 3))) < 60
    # a browser window has a least width, a frame has none
    frame = tmp_path / "frame.html"
    script = "const d=f.contentDocument.documentElement;document.title=d.scrollWidth+' '+d.clientWidth"
    frame.write_text(
        f'<title>no</title><iframe id="f" src="r.html" style="border:0;width:390px" onload="{script}"></iframe>'
    )
    command = [*common, "--allow-file-access-from-files", "--dump-dom", f"file://{frame}"]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    widths = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert widths is not None and int(widths[1]) <= int(widths[2]) == 390
    pdf = tmp_path / "r.pdf"
    command = [*common, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", f"file://{out}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert pdf.read_bytes().startswith(b"%PDF")
