"""The keys of trl that are set most, as the help of `train` shows them, so that it need not import trl.

A default is what a run here gets: trl's own, or that of training/arguments.py where the text says why it differs. All
other keys of trl are taken too; tests/test_trl_keys.py compares this list with the installed trl.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADING = "The usual keys of trl (all others are taken too)"


@dataclass(frozen=True)
class TrlKey:
    """One line of the help."""

    kind: type
    help: str
    default: object  # what a run gets; text where it depends on the run

    def line(self) -> str:
        """The help with the default."""
        return f"{self.help} [default: {self.default}]"


TRL_KEYS: dict[str, TrlKey] = {
    "max_steps": TrlKey(int, "optimiser steps; -1: as many as num_train_epochs makes", -1),
    "num_train_epochs": TrlKey(float, "passes over the rows", 1),
    "learning_rate": TrlKey(float, "of the optimiser", "1e-4; lora 2e-4, scales 1e-2, basis 1e-3; dpo: a tenth"),
    "lr_scheduler_type": TrlKey(str, "cosine, linear, constant, constant_with_warmup, ...", "cosine"),
    "warmup_steps": TrlKey(float, "steps, or below 1 their share, in which the learning rate rises", 0.05),
    "per_device_train_batch_size": TrlKey(int, "sequences at once on each process", 8),
    "gradient_accumulation_steps": TrlKey(int, "batches of one optimiser step", 1),
    "max_length": TrlKey(int, "tokens of a sequence; longer ones are cut", 1024),
    "packing": TrlKey(bool, "put short texts together into sequences of max_length", False),
    "assistant_only_loss": TrlKey(bool, "of chats, train on the assistant's turns alone", False),
    "completion_only_loss": TrlKey(bool, "of prompt and completion, train on the completion alone", "true"),
    "bf16": TrlKey(bool, "compute in bfloat16 beside float32 weights", "true on GPUs that can, false on CPUs"),
    "gradient_checkpointing": TrlKey(bool, "compute activations twice to keep fewer", "true on GPUs, false on CPUs"),
    "optim": TrlKey(str, "adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor, ...", "adamw_torch_fused"),
    "weight_decay": TrlKey(float, "of the optimiser", 0.0),
    "max_grad_norm": TrlKey(float, "longer gradients are cut", 1.0),
    "logging_steps": TrlKey(float, "steps from one line of the log to the next", 10),
    "eval_strategy": TrlKey(str, "no, epoch or steps", "epoch where there is a set to evaluate on, else no"),
    "save_steps": TrlKey(float, "steps from one checkpoint to the next", 500),
    "save_total_limit": TrlKey(int, "keep this many of the newest checkpoints", "all"),
    "seed": TrlKey(int, "of the order of the rows, and of adapters", 42),
    "report_to": TrlKey(str, "tensorboard, trackio, wandb, ... or none", "tensorboard and trackio if installed"),
    "push_to_hub": TrlKey(bool, "upload the finished adapter, without checkpoints, to the Hugging Face Hub", False),
    "hub_model_id": TrlKey(str, "push_to_hub: the repository, USER/NAME", "the name of output_dir"),
    "hub_private_repo": TrlKey(bool, "push_to_hub: a private one", "as your organization says"),
}
