"""Continue many prompts: batches of similar length, padded on the left, each row until one of its stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..errors import UsageError
from ..integrations.running import kind_of, max_length
from ..layers import plain_model
from ..protocols import CausalModel, Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationMixin


@dataclass(frozen=True)
class Decoding:
    """How text is generated."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: the likeliest token
    stops: tuple[str, ...] = ()  # text is cut before the first of these
    chat: bool = False  # prompts go through the chat template, as one turn of a user
    seed: int = 0


def continued(
    model: CausalModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    decoding: Decoding,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[int, str]]:
    """(index of a prompt, what the model wrote), a batch after the other, the longest prompts first.

    What a row writes depends on its batch only through rounding. UsageError for a prompt without room for an answer.
    """
    if kind_of(model) != "causal":
        raise UsageError(f"{type(plain_model(model)).__name__} does not continue text; take a causal language model.")
    encoded = [_encode(tokenizer, prompt, decoding.chat) for prompt in prompts]
    longest, room = max(map(len, encoded), default=0), max_length(model)
    if longest + decoding.max_new_tokens > room:
        raise UsageError(
            f"A prompt has {longest} tokens, and with `max_new_tokens` {decoding.max_new_tokens} the model takes {room}"
            "; give a smaller `max_new_tokens`."
        )
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    torch.manual_seed(decoding.seed)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = _batch(model, tokenizer, [encoded[index] for index in batch], decoding)
        yield from zip(batch, texts, strict=True)
        progress(start + len(batch))


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    asked = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.inference_mode()
def _batch(model: CausalModel, tokenizer: Tokenizer, rows: list[list[int]], decoding: Decoding) -> list[str]:
    width = max(map(len, rows))
    padding = _padding(model, tokenizer)
    device = next(model.parameters()).device
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    stop = _Stops(tokenizer, decoding.stops, width)
    generate = cast("GenerationMixin", model).generate
    made = cast(
        Tensor,
        generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_settings(model, decoding, padding),
            stopping_criteria=StoppingCriteriaList([stop]),
        ),
    )
    return [_cut(tokenizer.decode(row[width:], skip_special_tokens=True), decoding.stops) for row in made]


def _settings(model: CausalModel, decoding: Decoding, padding: int) -> GenerationConfig:
    """Of the model's own only what ends a text: its habits of sampling are no part of a measurement."""
    own = plain_model(model).generation_config
    told: dict[str, Any] = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id")}
    told |= {"max_new_tokens": decoding.max_new_tokens, "pad_token_id": padding, "do_sample": decoding.temperature > 0}
    if decoding.temperature > 0:
        told |= {"temperature": decoding.temperature, "top_p": 1.0, "top_k": 0}
    return GenerationConfig(**told)


def _padding(model: CausalModel, tokenizer: Tokenizer) -> int:
    """Some token; the attention mask hides it."""
    found = getattr(tokenizer, "pad_token_id", None)
    found = getattr(tokenizer, "eos_token_id", None) if found is None else found
    return 0 if found is None else found


def _cut(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((place for place in (text.find(stop) for stop in stops) if place >= 0), default=len(text))]


class _Stops(StoppingCriteria):
    """A row ends once a stop string is in its last tokens: a string of n bytes spans n tokens at most."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], start: int):
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        self._seen = max((len(stop.encode()) for stop in stops), default=0) + 1

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._seen) :]
        texts = [self._tokenizer.decode(row) for row in tails]
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device, dtype=torch.bool)
