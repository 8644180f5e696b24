"""What llama.cpp serves: KL at equal bytes, perplexity in the engine against our own, and decoding rates.

    pip install gguf xllamacpp
    python scripts/bench_serving.py OUT --calibration CODE.jsonl --code HELDOUT.txt --wikitext VALID.txt [--only NAME]

SmolLM2 (`demo`), whose GGUF file is the original. Rows: the original in F16, llama.cpp's plain types Q4_0 and Q5_0,
mixtures of the two at the bytes of q4_0 + L R, and q4_0 + L R of ranks 16 and 32 with factors in Q8_0, made here with
error feedback and without. KL and perplexity are computed here from the decoded files (log-probabilities in float16),
on TOKENS tokens of each text; the engine's loss is compared with ours at PLACES places of the code, each a prompt that
it reads anew (continued from its cache, it computes in other kernels). --rates measures the rates of all rows that are
there, in turns with `evaluate`'s own of q4_0 + L R: when nothing else runs. Bytes are those of the blocks' linears: the
embedding is the same in all. Rows stay in OUT/rows. About 6 minutes a decomposition on one thread. SmolLM2's weights
are a Q4_1 grid: Q4_1 and what holds it are no controls.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import lord_tune
from lord_tune.calibration.corpus import file_windows
from lord_tune.console import show_table
from lord_tune.evaluation.speed import speeds
from lord_tune.exports.llama_cpp import SERVER
from lord_tune.integrations.models import quiet
from lord_tune.integrations.sources import gguf_file
from lord_tune.storage import read_json, write_json

LENGTH, TOKENS, PLACES = 512, 4096, 128
ROUNDS, DECODED = 5, 64
RANKS = (16, 32)

_ANSWERS = """
for request in json.load(open(sys.argv[4])):
    given = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    found = json.load(urllib.request.urlopen(given))
    kept = {"rate": found["timings"]["predicted_per_second"]}
    if request.get("n_probs"):
        kept["top"] = [[e["id"], e["logprob"]] for e in found["completion_probabilities"][0]["top_logprobs"]]
    print("RESULT " + json.dumps(kept), flush=True)
"""


def served(model: Path, adapter: Path | None, requests: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """llama.cpp's answers, in a process of its own."""
    asked = scratch / "requests.json"
    write_json(asked, requests)
    words = [str(model), "" if adapter is None else str(adapter), str(LENGTH + DECODED + 16), str(asked)]
    run = subprocess.run([sys.executable, "-c", SERVER + _ANSWERS, *words], capture_output=True, text=True)
    found = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if len(found) != len(requests):
        raise SystemExit(f"llama.cpp answered {len(found)} of {len(requests)} requests: {run.stderr[-500:]}")
    return found


def places(ids: list[int]) -> list[int]:
    """How many tokens of the text each answer of the engine follows on."""
    return [round(place) for place in np.linspace(8, min(len(ids), LENGTH) - 1, PLACES)]


def engine_losses(model: Path, adapter: Path | None, ids: list[int], scratch: Path, vocabulary: int) -> list[float]:
    """At the places."""
    common = {"n_predict": 1, "n_probs": vocabulary, "temperature": 0, "cache_prompt": False}
    ends = places(ids)
    answers = served(model, adapter, [{"prompt": ids[:end]} | common for end in ends], scratch)
    return [-dict(answer["top"])[ids[end]] for end, answer in zip(ends, answers, strict=True)]


@torch.no_grad()
def log_probabilities(name: str, windows: torch.Tensor) -> list[torch.Tensor]:
    model, _ = lord_tune.load(name)
    return [model(input_ids=window[None]).logits[0].float().log_softmax(-1).half() for window in windows]


def plain_types(source: Path, target: Path, kind_of: Callable[[str], str]) -> None:
    """The original with its blocks' matrices rounded by the gguf package."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    left_out = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in left_out and (value := field.contents()):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, value, field.types[0], field.types[-1] if array else None)
    for tensor in reader.tensors:
        if _is_matrix(tensor):
            kind = gguf.GGMLQuantizationType[kind_of(tensor.name)]
            whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, gguf.quants.quantize(whole, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _is_matrix(tensor: Any) -> bool:
    return len(tensor.shape) == 2 and tensor.name.startswith("blk.")


def linear_bytes(*files: Path | None) -> int:
    """Of the blocks' matrices, and of an adapter's."""
    found = 0
    for path in files:
        if path is not None:
            found += sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if _is_matrix(t))
    return found


def mixed_kinds(source: Path, limit: int) -> dict[str, str]:
    """Q5_0 for layers spread evenly over the model, as many as fit in the bytes; Q4_0 for the others."""
    tensors = [tensor for tensor in gguf.GGUFReader(source).tensors if _is_matrix(tensor)]
    sizes = {tensor.name: int(np.prod(tensor.shape)) for tensor in tensors}
    total = sum(size * 18 // 32 for size in sizes.values())
    width = max(1, (len(tensors) - 1).bit_length())
    order = [i for i in (int(format(n, f"0{width}b")[::-1], 2) for n in range(2**width)) if i < len(tensors)]
    kinds = dict.fromkeys(sizes, "Q4_0")
    for index in order:
        name = tensors[index].name
        if total + sizes[name] * 4 // 32 <= limit:
            total, kinds[name] = total + sizes[name] * 4 // 32, "Q5_0"
    return kinds


class Bench:
    def __init__(self, given: argparse.Namespace):
        self.given, self.folder = given, given.out
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        source = gguf_file("demo")
        assert source is not None
        self.source, self.f16 = source, self.folder / "f16.gguf"
        if not self.f16.exists():
            plain_types(source, self.f16, lambda name: "F16")
        _, tokenizer = lord_tune.load("demo")
        self.texts = {
            name: file_windows(str(path), tokenizer, LENGTH, TOKENS)
            for name, path in (("code", given.code), ("wikitext", given.wikitext))
        }
        self._reference: dict[str, list[torch.Tensor]] = {}

    def reference(self, text: str) -> list[torch.Tensor]:
        if text not in self._reference:
            self._reference[text] = log_probabilities("demo", self.texts[text])
        return self._reference[text]

    def row(self, name: str, make: Callable[[], tuple[Path, Path | None, str]]) -> dict[str, Any] | None:
        """make: the file, its adapter, and what loads here."""
        path = self.folder / "rows" / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = read_json(path)
            if "files" in found:  # not of an earlier protocol
                return found
        if self.given.only not in name:
            return None
        model, adapter, ours = make()
        row: dict[str, Any] = {"bytes": linear_bytes(model, adapter), "kl": {}, "perplexity": {}}
        ids: list[int] = self.texts["code"][0].tolist()
        for text, windows in self.texts.items():
            kls, losses = [], []
            for window, own, whole in zip(windows, log_probabilities(ours, windows), self.reference(text), strict=True):
                p, q = whole.float(), own.float()
                kls.append((p.exp() * (p - q)).sum(-1))
                losses.append(-q[:-1].gather(1, window[1:, None])[:, 0])
                if text == "code" and "engine" not in row:
                    there = engine_losses(model, adapter, ids, self.folder, q.shape[1])
                    apart = [own - float(losses[0][end - 1]) for own, end in zip(there, places(ids), strict=True)]
                    row["engine"] = [statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart))]
            all_kl = torch.cat(kls)
            row["kl"][text] = [float(all_kl.mean()), float(all_kl.std() / math.sqrt(len(all_kl)))]
            row["perplexity"][text] = math.exp(float(torch.cat(losses).mean()))
        row["files"] = [str(model), None if adapter is None else str(adapter), ours]
        write_json(path, row)
        return row

    def rates(self, rows: dict[str, dict[str, Any] | None]) -> dict[str, float]:
        """Tokens per second of each row in llama.cpp, and of `evaluate` on those with L R: medians of turns."""
        path = self.folder / "rates.json"
        if self.given.rates:
            prompt = self.texts["code"][0].tolist()[:32]
            request = {"prompt": prompt, "n_predict": DECODED, "temperature": 0, "ignore_eos": True}
            found: dict[str, list[float]] = {}
            torch.set_num_threads(1)
            for _ in range(ROUNDS):
                for name, row in rows.items():
                    if row is not None:
                        model, adapter, ours = row["files"]
                        answers = served(Path(model), adapter and Path(adapter), [request] * 2, self.folder)
                        found.setdefault(name, []).append(answers[1]["rate"])
                        if adapter:
                            loaded, _ = lord_tune.load(ours)
                            own = speeds(loaded, [1])["batches"]["1"]["decode_tokens_per_second"]
                            found.setdefault(f"{name}, evaluate", []).append(own)
            write_json(path, {name: statistics.median(each) for name, each in found.items()})
        measured: dict[str, float] = read_json(path) if path.exists() else {}
        return measured

    def corrected(self, rank: int, rounding: str) -> tuple[Path, Path | None, str]:
        name = f"q4_0_r{rank}_{rounding}"
        model, out = self.folder / name, self.folder / f"{name}_gguf"
        if not (model / "decomposition.json").exists():
            lord_tune.decompose(
                "demo",
                str(model),
                backbone="q4_0",
                rank=rank,
                rounding=rounding,
                calibration=[str(self.given.calibration)],
                overwrite=True,
            )
        if not (out / "export.json").exists():
            lord_tune.export(str(model), str(out), "gguf", like="demo", adapter_type="q8_0", overwrite=True)
        return out / "model.gguf", out / "adapter.gguf", str(model)

    def plain(self, name: str, kind_of: Callable[[str], str]) -> tuple[Path, Path | None, str]:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            plain_types(self.source, path, kind_of)
        return path, None, str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--rates", action="store_true", help="measure the rates of the rows that are there")
    parser.add_argument("--only", default="", help="measure rows with this in their names; show all that are there")
    quiet()
    bench = Bench(parser.parse_args())
    found = {
        "F16": bench.row("F16", lambda: (bench.f16, None, "demo")),
        "Q4_0": bench.row("Q4_0", lambda: bench.plain("Q4_0", lambda name: "Q4_0")),
        "Q5_0": bench.row("Q5_0", lambda: bench.plain("Q5_0", lambda name: "Q5_0")),
    }
    for rank in RANKS:
        for rounding in ("feedback", "nearest"):
            name = f"q4_0_r{rank}_{rounding}"
            found[name] = bench.row(name, lambda rank=rank, rounding=rounding: bench.corrected(rank, rounding))  # type: ignore[misc]
        beside = found[f"q4_0_r{rank}_feedback"]
        if beside is not None:
            kinds = mixed_kinds(bench.source, beside["bytes"])
            name = f"mix_r{rank}"
            found[name] = bench.row(name, lambda name=name, kinds=kinds: bench.plain(name, kinds.__getitem__))  # type: ignore[misc]
    weights = sum(int(np.prod(t.shape)) for t in gguf.GGUFReader(bench.source).tensors if _is_matrix(t))
    rates = bench.rates(found)
    rows = []
    for name, row in found.items():
        if row is not None:
            cells = [f"{row['kl'][t][0]:.4f} ± {row['kl'][t][1]:.4f}" for t in bench.texts]
            cells += [f"{row['perplexity'][t]:.3f}" for t in bench.texts]
            cells.append(f"{row['engine'][0]:+.4f} ± {row['engine'][1]:.4f}")
            cells += [f"{rates[key]:.1f}" if key in rates else "-" for key in (name, f"{name}, evaluate")]
            rows.append([name, f"{8 * row['bytes'] / weights:.2f}", *cells])
    columns = ["row", "bits/weight", *(f"KL, {t}" for t in bench.texts), *(f"perplexity, {t}" for t in bench.texts)]
    columns += ["loss in llama.cpp less ours", "tokens/s in llama.cpp", "by evaluate"]
    show_table(f"{TOKENS} tokens of each text; llama.cpp on one thread", columns, rows)


if __name__ == "__main__":
    main()
