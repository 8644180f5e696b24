"""One export in vLLM; check_vllm.sh calls this file in lord_tune's environment and in vLLM's."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

WINDOWS, LENGTH = 4, 512
WITHIN = 0.002  # of the perplexity
DECODED = 64  # tokens of a rate


def reference(folder: Path, text: Path, out: Path) -> None:
    """Log-probabilities of the text by the model that `folder` was exported from."""
    import torch

    import lord_tune

    source = json.loads((folder / "export.json").read_text())["source"]
    model, tokenizer = lord_tune.load(source)
    ids = tokenizer(text.read_text()[:40_000], verbose=False)["input_ids"]
    windows = [ids[start : start + LENGTH] for start in range(0, min(len(ids), WINDOWS * LENGTH) - 1, LENGTH)]
    found = []
    for window in windows:
        rows = torch.tensor([window])
        with torch.no_grad():
            logits = model(input_ids=rows).logits.float().log_softmax(-1)
        found.append(logits[0, :-1].gather(1, rows[0, 1:, None])[:, 0].tolist())
    out.write_text(json.dumps({"windows": windows, "found": found, "source": source}))


def engine(folder: Path, given: dict[str, Any], dtype: str, decode: bool) -> float:
    """The largest relative difference of a perplexity; prints what it is and how fast vLLM decodes."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    pair = (folder / "base").is_dir()
    adapter = folder / "adapter" if pair else None
    options: dict[str, Any] = {"trust_remote_code": True}
    request = None
    if adapter is not None and adapter.is_dir():
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        options |= {
            "enable_lora": True,
            "max_lora_rank": next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank),
        }
        request = LoRARequest("lord", 1, str(adapter))
    llm = LLM(
        str(folder / "base" if pair else folder),
        dtype=dtype,
        max_model_len=LENGTH + DECODED,
        max_num_seqs=2,
        enforce_eager=True,
        **options,
    )
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    own: list[float] = []
    for window in given["windows"]:
        answer = llm.generate({"prompt_token_ids": window}, scored, lora_request=request, use_tqdm=False)[0]
        own += [entry[token].logprob for entry, token in zip(answer.prompt_logprobs[1:], window[1:], strict=True)]
    ours = [value for window in given["found"] for value in window]
    found, expected = (math.exp(-statistics.fmean(values)) for values in (own, ours))
    difference = abs(found / expected - 1)
    largest = max(abs(a - b) for a, b in zip(own, ours, strict=True))
    print(
        f"{folder}, {dtype}: perplexity {found:.4f} in vLLM, {expected:.4f} of {given['source']} in lord_tune "
        f"({difference:.3%}), largest difference of a log-probability {largest:.3g}, "
        f"{len(own)} tokens"
    )
    if decode:
        rates = []
        for _ in range(4):
            start = time.perf_counter()
            params = SamplingParams(max_tokens=DECODED, ignore_eos=True, temperature=0)
            llm.generate({"prompt_token_ids": given["windows"][0][:8]}, params, lora_request=request, use_tqdm=False)
            rates.append(DECODED / (time.perf_counter() - start))
        print(f"{folder}, {dtype}: decodes {statistics.median(rates[1:]):.1f} tokens per second")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["reference", "engine"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+", help="TEXT OUT, or what `reference` wrote")
    parser.add_argument(
        "--dtype", help="default: float32; bfloat16 for compressed-tensors, which vLLM's CPU kernel takes"
    )
    parser.add_argument("--decode", action="store_true", help="measure the rate as well")
    given = parser.parse_args()
    if given.part == "reference":
        return reference(given.folder, *given.files)
    dtype = given.dtype or ("bfloat16" if (given.folder / "base").is_dir() else "float32")
    difference = engine(given.folder, json.loads(given.files[0].read_text()), dtype, given.decode)
    if difference > WITHIN:
        raise SystemExit(f"The perplexities differ by {difference:.3%}; expected at most {WITHIN:.1%}.")
    return None


if __name__ == "__main__":
    main()
