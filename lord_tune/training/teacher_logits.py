"""The teacher's most likely tokens, computed once and kept in a folder.

Of every counted position the k largest logits z_i / T are stored as float16 differences to the largest one (the likely
tokens, which carry the KL, are exact to 5e-4 of their small distance), their ids as int32, and the log of the summed
probability of all other tokens, relative to the largest, as float32: the logsumexp of the whole vocabulary follows from
these. That is 6 k + 4 bytes per token (388 at k = 64; the full float32 logits of 49,152 tokens take 196,608).

The KL over the k tokens and one bucket for all others is a lower bound of the full KL (merging outcomes never raises a
divergence: Cover and Thomas, "Elements of information theory", theorem 2.7.1) and equal to it when k is the vocabulary.

A sequence is found by its content, the hash of its token ids and of which of them are counted, so shuffling, epochs,
packing and padding do not matter. Each shard is one safetensors file, written whole and then entered into index.json;
after a kill the finished ones are kept.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..console import human_bytes, is_main_process, progress, say
from ..errors import LordError, UsageError
from ..layers import plain_model
from ..storage import read_json, write_json, write_tensors
from .distillation import KlOfTokens, head_of

if TYPE_CHECKING:
    from ..protocols import CausalModel

INDEX = "index.json"
_PATIENCE = 60.0  # seconds until a folder that another machine made is visible
SHARD_BYTES = 1 << 27
_FORMAT = 1
Sequence = tuple[Tensor, Tensor]  # ids (length,), counted (length - 1,): whose next token is trained


class Identity(TypedDict):
    """What a folder of logits was made of; one of anything else is refused."""

    format: int
    teacher: str
    dtype: str
    vocabulary: int
    top_k: int
    temperature: float


class _Row(TypedDict):
    """A row of a trl trainer's dataset, tokenized; seq_lengths if it is packed."""

    input_ids: list[int]
    labels: NotRequired[list[int]]
    seq_lengths: NotRequired[list[int]]


def key_of(ids: Tensor, counted: Tensor) -> str:
    """The name of a sequence."""
    digest = hashlib.sha256(ids.cpu().long().numpy().tobytes())
    digest.update(counted.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def sequences_of_row(row: _Row) -> Iterator[Sequence]:
    """The documents of a row of the trainer's dataset (several, if it is packed)."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row.get("labels", row["input_ids"]))
    start = 0
    for length in row.get("seq_lengths") or [len(ids)]:
        part = slice(start, start + length)
        yield ids[part], labels[part][1:] != -100
        start += length


def sequences_of_batch(inputs: dict[str, Tensor], counted: Tensor) -> Iterator[Sequence]:
    """The same documents in a batch: rows without their padding, or one row split where positions start again."""
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        for row, marked, mask in zip(ids, counted, inputs["attention_mask"].bool(), strict=True):
            length = int(mask.sum())  # trl pads on the right
            yield row[:length], marked[: length - 1]
        return
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        yield ids[0, start:end], counted[0, start : end - 1]


def top_logits(logits: Tensor, k: int) -> dict[str, Tensor]:
    """What is stored of logits (tokens, vocabulary) that were divided by T; k may be the vocabulary."""
    values, ids = logits.float().topk(k)
    rest = logits.float().scatter(-1, ids, -torch.inf).logsumexp(-1)
    tail = (rest - values[:, 0]).clamp(min=-1e4)
    relative = (values - values[:, :1]).clamp(min=-6e4)
    return {"values": relative.half(), "ids": ids.int(), "tail": tail}


def bucketed_kl(student: Tensor, stored: dict[str, Tensor], temperature: float) -> Tensor:
    """KL over k tokens and the bucket of all others, summed over the tokens, nats. student: (tokens, vocabulary)"""
    log_q_all = (student / temperature).log_softmax(-1)
    ids = stored["ids"].long()
    log_p, log_q = stored["values"].float(), log_q_all.gather(-1, ids)
    if ids.shape[1] < student.shape[1]:
        log_p = torch.cat([log_p, stored["tail"][:, None]], -1)
        rest = log_q_all.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q, rest], -1)
    return nn.functional.kl_div(log_q, log_p.log_softmax(-1), reduction="sum", log_target=True)


class CachedTeacher:
    """Targets from a folder; no teacher is in memory."""

    def __init__(self, folder: Path, identity: Identity):
        self._folder, self._identity = folder, identity
        self._temperature: float = identity["temperature"]
        self._open: dict[str, Any] = {}
        self.places: dict[str, tuple[str, int, int]] = {}  # key -> shard, first row, rows
        self._shards: dict[str, dict[str, list[int]]] = {}
        self.read()

    def read(self) -> None:
        """Take up what the folder holds. UsageError if it holds the logits of something else."""
        if self._folder.exists() and not self._folder.is_dir():
            raise UsageError(f"teacher_logits {self._folder} is a file; name a folder.")
        index = self._folder / INDEX
        if not index.is_file():
            if self._folder.is_dir() and any(not p.name.startswith(".") for p in self._folder.iterdir()):
                raise UsageError(f"teacher_logits {self._folder} holds other files; name a new folder.")
            return
        found = read_json(index)
        for name, value in self._identity.items():
            if found.get("identity", {}).get(name) != value:
                was = found.get("identity", {}).get(name)
                raise UsageError(
                    f"teacher_logits {self._folder} was made with {name} {was}, this run has {value}; name another "
                    "folder, or remove it to compute the logits anew."
                )
        self._shards = {name: keys for name, keys in found["shards"].items() if self._whole(name, keys)}
        self.places = {key: (name, *place) for name, keys in self._shards.items() for key, place in keys.items()}  # type: ignore[misc]

    def _whole(self, name: str, keys: dict[str, list[int]]) -> bool:
        try:
            with safe_open(self._folder / name, framework="pt") as tensors:
                rows = tensors.get_slice("tail").get_shape()[0]
        except (OSError, SafetensorError):
            return False  # it is computed again
        return rows == max((start + count for start, count in keys.values()), default=0)

    def missing(self, sequences: Iterable[Sequence]) -> dict[str, Sequence]:
        """Those that the folder lacks, each once."""
        named = ((key_of(ids, counted), (ids, counted)) for ids, counted in sequences if counted.any())
        return {key: sequence for key, sequence in named if key not in self.places}

    def add(self, stored: dict[str, dict[str, Tensor]]) -> None:
        """Write one shard: key -> what `top_logits` gave."""
        number = 1 + max((int(name.split(".")[0]) for name in self._shards), default=-1)
        name, places, start = f"{number:05d}.safetensors", {}, 0
        for key, tensors in stored.items():
            places[key] = [start, len(tensors["tail"])]
            start += len(tensors["tail"])
        parts = {part: torch.cat([tensors[part] for tensors in stored.values()]) for part in ("values", "ids", "tail")}
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / INDEX).is_file():  # first, so that a shard is never in a folder of unknown identity
            write_json(self._folder / INDEX, {"identity": self._identity, "shards": {}})
        write_tensors(self._folder / name, parts)
        self._shards[name] = places
        self.places |= {key: (name, *place) for key, place in places.items()}  # type: ignore[misc]
        write_json(self._folder / INDEX, {"identity": self._identity, "shards": self._shards})

    def sizes(self) -> tuple[int, int]:
        """(bytes of the shards, tokens in them)"""
        files = [self._folder / name for name in self._shards]
        return sum(file.stat().st_size for file in files), sum(count for _, _, count in self.places.values())

    def _read(self, key: str, device: torch.device) -> dict[str, Tensor]:
        name, start, count = self.places[key]
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt").__enter__()
        part = slice(start, start + count)
        return {what: self._open[name].get_slice(what)[part].to(device) for what in ("values", "ids", "tail")}

    def targets(self, inputs: dict[str, Tensor], counted: Tensor) -> KlOfTokens:
        keys = [key_of(*sequence) for sequence in sequences_of_batch(inputs, counted) if sequence[1].any()]
        absent = [key for key in keys if key not in self.places]
        if absent:
            raise LordError(f"{self._folder} lacks the logits of a sequence of this batch; report this.")
        found = [self._read(key, counted.device) for key in keys]
        stored = (
            {part: torch.cat([tensors[part] for tensors in found]) for part in ("values", "ids", "tail")}
            if found
            else {}
        )

        def kl(part: slice, student: Tensor) -> Tensor:
            return bucketed_kl(student, {name: tensor[part] for name, tensor in stored.items()}, self._temperature)

        return kl


@torch.no_grad()
def compute(
    cache: CachedTeacher,
    teacher: CausalModel,
    missing: dict[str, Sequence],
    top_k: int,
    temperature: float,
    batch_tokens: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Run the teacher over the missing sequences, longest first, and write their shards."""
    model = plain_model(teacher)
    logits_of, device = head_of(model), next(model.parameters()).device
    per_shard = max(1, shard_bytes // (6 * top_k + 4))
    order = sorted(missing, key=lambda key: -len(missing[key][0]))
    ready: dict[str, dict[str, Tensor]] = {}
    with progress() as update:
        done = 0
        while done < len(order):
            length = len(missing[order[done]][0])
            keys = order[done : done + max(1, batch_tokens // length)]
            ids = torch.zeros(len(keys), length, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, key in enumerate(keys):
                own = missing[key][0]
                ids[row, : len(own)], mask[row, : len(own)] = own, 1
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
            for row, key in enumerate(keys):
                counted = missing[key][1].to(device)
                kept = hidden[row, : len(counted)][counted]
                pieces = [top_logits(logits_of(part).float() / temperature, top_k) for part in kept.split(256)]
                ready[key] = {name: torch.cat([p[name] for p in pieces]).cpu() for name in pieces[0]}
            done += len(keys)
            if sum(len(t["tail"]) for t in ready.values()) >= per_shard or done == len(order):
                cache.add(ready)
                ready = {}
            update("teacher logits (sequences)", done, len(order))


def prepare(
    folder: Path,
    identity: Identity,
    sequences: Callable[[], Iterable[Sequence]],
    load_teacher: Callable[[], CausalModel],
    batch_tokens: int,
) -> CachedTeacher:
    """The cached teacher of these sequences. What is missing is computed by the main process, the only one that loads
    the teacher; the others look into the folder until it is all there (a barrier would time out). Processes on several
    machines need a folder that all of them see."""
    machines = int(os.environ.get("WORLD_SIZE", 1)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    cache = CachedTeacher(folder, identity)
    missing = cache.missing(sequences())
    if is_main_process():
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            compute(cache, load_teacher(), missing, identity["top_k"], identity["temperature"], batch_tokens)
        size, tokens = cache.sizes()
        what = f"computed for {len(missing)} sequences" if missing else "found, no teacher is loaded"
        share = f"{human_bytes(size)} for {tokens:,} tokens, {size / max(tokens, 1):.0f} bytes per token"
        say(f"teacher logits in {folder}: {what}; {share}")
        return cache
    start = time.monotonic()
    while any(key not in cache.places for key in missing):
        time.sleep(1)
        cache.read()
        if machines > 1 and not folder.is_dir() and time.monotonic() - start > _PATIENCE:
            raise UsageError(
                f"teacher_logits {folder} does not appear on this machine; name a folder that all machines share."
            )
    return cache
