"""What we use of other libraries' objects, as types: protocols where several classes or a test's own object fit, the
real classes where they are what comes. At run time nothing of these libraries is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, TrainerCallback, TrainerState

CausalModel: TypeAlias = "PreTrainedModel | PeftModel"  # a language model, with or without adapters; any kind of head


class Tokenizer(Protocol):
    """transformers' tokenizer, of any backend."""

    eos_token: str | None
    eos_token_id: int | None
    mask_token_id: int | None
    chat_template: str | None

    def __call__(
        self,
        text: str,
        *,
        truncation: bool = ...,
        max_length: int | None = ...,
        verbose: bool = ...,
        add_special_tokens: bool = ...,
    ) -> Mapping[str, list[int]]: ...

    def decode(self, token_ids: list[int] | torch.Tensor, *, skip_special_tokens: bool = ...) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        *,
        tokenize: Literal[False],
        chat_template: str | None = ...,
        add_generation_prompt: bool = ...,
        tools: list[dict[str, object]] | None = ...,
        **read_by_the_template: object,
    ) -> str: ...

    def save_pretrained(self, save_directory: str | Path) -> object: ...


class AutogradContext(Protocol):
    """`ctx` of a torch.autograd.Function; what one keeps beside tensors is declared in a protocol of its own."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...


class TunerLayer(Protocol):
    """A layer of PEFT around a linear one: LoRA's; of IA3's layers all but r, scaling, lora_A and lora_B."""

    adapter_layer_names: tuple[str, ...]  # attributes that hold the weights of the adapters, by adapter
    r: dict[str, int]
    scaling: dict[str, float]
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict

    @property
    def disable_adapters(self) -> bool: ...

    @property
    def active_adapters(self) -> list[str]: ...

    def get_base_layer(self) -> nn.Module: ...


class TrlConfig(Protocol):
    """trl's SFTConfig, a masked model's too, or DPOConfig: what both have.

    What one alone has (packing, eos_token) is read with getattr or after isinstance.
    """

    output_dir: str  # transformers sets one where none is given
    max_length: int | None
    seed: int
    max_steps: int
    num_train_epochs: float
    learning_rate: float
    optim: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    use_cpu: bool
    torch_compile: bool
    ddp_find_unused_parameters: bool | None
    average_tokens_across_devices: bool
    load_best_model_at_end: bool
    save_only_model: bool
    resume_from_checkpoint: str | None

    @property
    def bf16(self) -> bool | None: ...

    @property
    def fp16(self) -> bool | None: ...

    @property
    def gradient_checkpointing(self) -> bool | None: ...

    @property
    def gradient_checkpointing_kwargs(self) -> dict[str, object] | None: ...

    @property
    def fsdp(self) -> object: ...

    @property
    def save_strategy(self) -> object: ...

    @property
    def world_size(self) -> int: ...

    @property
    def should_save(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...


class Accelerator(Protocol):
    """accelerate's Accelerator."""

    @property
    def device(self) -> torch.device: ...

    def wait_for_everyone(self) -> None: ...


class TrainerLike(Protocol):
    """One of our trainers (training/trainers.py), which transformers' and trl's are the bases of."""

    state: TrainerState
    model: CausalModel
    accelerator: Accelerator
    train_dataset: Dataset
    eval_dataset: Dataset | None
    data_collator: Callable[[list[dict[str, object]]], Mapping[str, torch.Tensor]]

    @property
    def args(self) -> TrlConfig: ...

    def get_train_dataloader(self) -> Sized: ...

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None: ...

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None: ...

    def train(self, resume_from_checkpoint: str | bool | None = ...) -> object: ...

    def save_state(self) -> None: ...

    def continue_log(self, checkpoint: Path) -> None: ...

    def take_up(self, checkpoint: Path) -> None: ...

    def mean_loss(self) -> float: ...

    def write_adapter(self, output: Path) -> None: ...
