"""What llama.cpp itself computes from exported files, where the package xllamacpp is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ExportMismatch

POSITIONS = 8  # of the comparison text, each a request
LIMIT = 0.05  # KL in nats per token; llama.cpp rounds activations to 8 bits, and its cache to float16
SERVER = """
import json, sys, urllib.request
import xllamacpp
model, adapter, context = sys.argv[1], sys.argv[2], int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx = context
params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = False
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    params.lora_adapters = [lora]
server = xllamacpp.Server(params)
"""  # the beginning of a program: file, adapter or nothing, tokens at most, then arguments of its own
_PROBABILITIES = """
requests, size = json.loads(sys.argv[4]), int(sys.argv[5])
for prompt in requests:
    wanted = {"prompt": prompt, "n_predict": 1, "n_probs": size, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    found = json.load(urllib.request.urlopen(request))["completion_probabilities"][0]["top_logprobs"]
    print("RESULT " + json.dumps([[entry["id"], entry["logprob"]] for entry in found]), flush=True)
"""


def compared_in_engine(model: Path, adapter: Path | None, ids: Tensor, expected: Tensor) -> str:
    """A sentence about next-token distributions at several positions of a text. ids: (1, length); expected: (length,
    vocabulary) logits of what was written. Raises ExportMismatch over LIMIT."""
    if importlib.util.find_spec("xllamacpp") is None:
        return "decoded by the gguf package; with the package xllamacpp, the files are run in llama.cpp as well"
    text = ids[0].tolist()
    ends = sorted({round(1 + i * (len(text) - 1) / (POSITIONS - 1)) for i in range(POSITIONS)})
    words = [str(model), "" if adapter is None else str(adapter), str(len(text) + 16)]
    words += [json.dumps([text[:end] for end in ends]), str(expected.shape[1])]
    command = [sys.executable, "-c", SERVER + _PROBABILITIES, *words]
    run = subprocess.run(command, capture_output=True, text=True)
    found = [json.loads(line.removeprefix("RESULT ")) for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or len(found) != len(ends):
        last = (run.stderr.strip() or "no message").splitlines()[-1]
        raise ExportMismatch(
            f"llama.cpp could not run the written files: {last} It runs no file without a tokenizer, or of an "
            "architecture that it does not have; without the package xllamacpp, they are compared by the gguf package."
        )
    total, agreed = 0.0, 0
    for end, pairs in zip(ends, found, strict=True):
        own = expected[end - 1].double().log_softmax(-1)
        theirs = torch.full_like(own, -torch.inf)
        places, values = zip(*pairs, strict=True)
        theirs[torch.tensor(places)] = torch.tensor(values, dtype=torch.float64)
        if torch.isinf(theirs).any():
            raise ExportMismatch(
                f"llama.cpp gave probabilities for {len(set(places))} of {len(own)} tokens, so that the vocabulary of "
                "the written file is another one."
            )
        total += float((own.exp() * (own - theirs)).sum()) / len(ends)
        agreed += int(own.argmax() == theirs.argmax())
    if not total <= LIMIT:
        raise ExportMismatch(
            f"llama.cpp computes another model from the written files: KL {total:.3g} nats per token at {len(ends)} "
            f"positions, expected at most {LIMIT}. Nothing was kept; please report this."
        )
    version = importlib.metadata.version("xllamacpp")
    return (
        f"run in llama.cpp (xllamacpp {version}): KL {total:.2g} nats per token at {len(ends)} positions, "
        f"top-1 agreement {agreed}/{len(ends)}"
    )
