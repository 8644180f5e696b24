"""Conversation with a model: the prompts of `chat`, and the answers as they are generated."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from .config import ChatConfig
from .console import note, say
from .errors import UsageError
from .integrations.running import max_length
from .layers import plain_model
from .protocols import CausalModel, Tokenizer

Message = dict[str, str]
RESET, LEAVE = "/reset", ("/exit", "/quit")


class Talk:
    """One conversation."""

    def __init__(self, model: CausalModel, tokenizer: Tokenizer, config: ChatConfig):
        plain = plain_model(model)
        if not plain.can_generate() or getattr(plain.config, "is_encoder_decoder", False):
            raise UsageError(f"{type(plain).__name__} does not continue text; chat with a causal language model.")
        self._model, self._tokenizer, self._config = model.eval(), tokenizer, config
        self.templated = getattr(tokenizer, "chat_template", None) is not None
        if config.system is not None and not self.templated:
            raise UsageError(
                "The tokenizer has no chat template, so that `system` has no place; put it into the prompt."
            )
        self._longest = max_length(plain)
        self._messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        self._messages = [] if self._config.system is None else [{"role": "system", "content": self._config.system}]

    def answer(self, prompt: str) -> str:
        """Of the next turn, printed while it is generated. The oldest turns are left out where they do not fit."""
        asked = {"role": "user", "content": prompt}
        self._messages.append(asked)
        ids = self._ids(prompt)
        first = 0 if self._config.system is None else 1
        while ids.shape[1] + self._config.max_new_tokens > self._longest and len(self._messages) > first + 1:
            del self._messages[first : first + 2]  # a question and its answer
            ids = self._ids(prompt)
        if ids.shape[1] + self._config.max_new_tokens > self._longest:
            self._messages.remove(asked)
            raise UsageError(
                f"The prompt has {ids.shape[1]} tokens, and with `max_new_tokens` {self._config.max_new_tokens} the "
                f"model takes {self._longest}; shorten one of them."
            )
        settings = self._settings()
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        ids = ids.to(next(self._model.parameters()).device)
        with torch.inference_mode():
            made: Any = self._model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
            )
        text: str = self._tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": text})
        return text

    def _ids(self, prompt: str) -> torch.Tensor:
        if not self.templated:
            return torch.tensor([self._tokenizer(prompt, verbose=False)["input_ids"]])
        text = self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True, tokenize=False)
        return torch.tensor([self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])

    def _settings(self) -> GenerationConfig:
        """The model's own, with what was given."""
        config, own = self._config, plain_model(self._model).generation_config
        told: dict[str, Any] = own.to_dict() if own is not None else {}
        told |= {"max_new_tokens": config.max_new_tokens, "max_length": None}
        if told.get("pad_token_id") is None:
            told["pad_token_id"] = getattr(self._tokenizer, "eos_token_id", None)
        if config.temperature == 0:
            told |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif config.temperature is not None or config.top_p is not None:
            told |= {"do_sample": True}
            told |= {k: v for k, v in (("temperature", config.temperature), ("top_p", config.top_p)) if v is not None}
        return GenerationConfig(**told)


def prompts_of(config: ChatConfig) -> tuple[Iterable[str], bool]:
    """What is asked, and whether each prompt is a conversation of its own."""
    if config.prompt is not None:
        return [config.prompt], True
    if config.file is not None:
        return _of_file(Path(config.file)), True
    return _typed(), False


def _of_file(path: Path) -> list[str]:
    """Lines of text, or the `prompt`s of .jsonl rows."""
    lines = [line for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    if not lines:
        raise UsageError(f"The file {path} does not exist or is empty; pass one prompt per line.")
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UsageError(
                f"Line {number} of {path} is no row with a text `prompt`; pass such rows, or lines of text."
            )
        found.append(prompt)
    return found


def _typed() -> Iterator[str]:
    """Lines of the standard input; on a terminal with a prompt, until it is closed or left."""
    if sys.stdin.isatty():
        note(f"type a message; {RESET} starts anew, {LEAVE[0]} or Ctrl-D leaves")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() in LEAVE:
            return
        if line.strip():
            yield line


def converse(talk: Talk, prompts: Iterable[str], apart: bool) -> Iterator[dict[str, str]]:
    """Ask everything. apart: each prompt anew; else what cannot be asked is told of, and the conversation goes on."""
    asked = 0
    for prompt in prompts:
        if apart or prompt.strip() == RESET:
            talk.reset()
        if prompt.strip() == RESET:
            continue
        if apart and asked:
            say()
        asked += 1
        try:
            yield {"prompt": prompt, "answer": talk.answer(prompt)}
        except UsageError as error:
            if apart:
                raise
            say(str(error))
