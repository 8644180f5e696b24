"""trl's and transformers' trainers with what all our runs share: a log that a resumed run continues exactly, no model
card and no telemetry of trl's, an adapter that appears whole.

The one file that imports trl at its top, and nothing imports it at its own: `import lord_tune.commands` needs no trl.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import nested_gather
from trl import DPOTrainer, SFTTrainer

from ..integrations.files import ADAPTER_FILE
from ..layers import plain_model
from ..storage import read_json, write_json
from .checkpoints import LOG_FILE
from .distillation import CHUNK, Teacher, TokenLoss, hand_over_hidden_states, head_of

if TYPE_CHECKING:
    from datasets import Dataset
    from optuna import Trial
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainingArguments
    from trl import SFTConfig

    from ..protocols import TrainerLike


class TrainerData(TypedDict):
    """What trl's trainers are given beside the model and their arguments."""

    train_dataset: Dataset
    eval_dataset: Dataset | None
    processing_class: PreTrainedTokenizerBase


class Recorded(Trainer):
    """The first base of our trainers. transformers forgets the sums since the last log line when it saves, so that
    after a resume this line is the mean of fewer steps, and train_loss is divided by steps it did not see; here both
    are kept."""

    # transformers' and, where they exist, trl's and ours
    _tr_loss: Tensor
    _metrics: dict[str, defaultdict[str, list[float]]]
    _total_train_tokens: int
    sums: dict[str, list[float]]

    def _save_checkpoint(self, model: nn.Module, trial: Trial | dict[str, object] | None) -> None:
        mean = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()  # of the processes; all take part
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            summed = {
                "loss": mean,
                "total": self._total_loss_scalar,
                "logged_step": self._globalstep_last_logged,
                "metrics": dict(getattr(self, "_metrics", {}).get("train", {})),
                "sums": getattr(self, "sums", {}),
                "tokens": getattr(self, "_total_train_tokens", 0),
            }
            write_json(folder / LOG_FILE, summed)  # before the rest: trainer_state.json is what comes last
        super()._save_checkpoint(model, trial)

    def continue_log(self, checkpoint: Path) -> None:
        """Take up the sums that a checkpoint holds; called when training begins."""
        summed = read_json(checkpoint / LOG_FILE)
        self.state.best_model_checkpoint = _moved(self.state.best_model_checkpoint, checkpoint.parent)
        self._tr_loss += torch.tensor(summed["loss"], dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        self._total_loss_scalar, self._globalstep_last_logged = summed["total"], summed["logged_step"]
        if hasattr(self, "_metrics"):
            for key, values in summed["metrics"].items():
                self._metrics["train"][key] = values
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = summed["tokens"]
        if hasattr(self, "sums"):
            self.sums = summed["sums"]

    def take_up(self, checkpoint: Path) -> None:
        """Become what training was when it wrote its last checkpoint; only the adapter was not written any more."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = _moved(self.state.best_model_checkpoint, checkpoint.parent) if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(checkpoint))
        self._tr_loss, self._total_loss_scalar = torch.tensor(0.0, device=self.args.device), 0.0
        self.continue_log(checkpoint)
        self._total_loss_scalar += self._tr_loss.item()

    def mean_loss(self) -> float:
        """Over all steps, those before a resume included; transformers' own divides by the steps since."""
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def write_adapter(self, output: Path) -> None:
        """The trained adapter and the tokenizer in `output`: each file appears whole, adapter_config.json last. All
        processes call it; a copy of the adapter that trl keeps as DPO's reference stays out."""
        temporary = output / ".adapter.partial"
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(temporary))
        if self.args.should_save:
            files = [path for path in temporary.iterdir() if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == ADAPTER_FILE):
                os.replace(path, output / path.name)
            shutil.rmtree(temporary)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """trl writes one at every checkpoint; ours is written at the end."""

    def _send_telemetry(self) -> None:
        """Nothing goes to the network that was not asked for."""


def _moved(checkpoint: str | None, output: Path) -> str | None:
    """A checkpoint of a run that now lies in `output`. transformers keeps its path of then, and where that is gone, or
    is now a copy's, would keep the last weights instead of the best, or take the copy's."""
    here = None if checkpoint is None else output / Path(checkpoint).name
    return str(here) if here is not None and here.is_dir() else checkpoint


class ContinueLog(TrainerCallback):
    """Calls `continue_log` at the one moment after transformers has set its sums to zero."""

    def __init__(self, trainer: TrainerLike, checkpoint: Path):
        self._trainer, self._checkpoint = trainer, checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer.continue_log(self._checkpoint)


class SupervisedTrainer(Recorded, SFTTrainer):
    """objective: sft"""


class PreferenceTrainer(Recorded, DPOTrainer):
    """objective: dpo; the reference is the frozen copy of the adapter that trl makes before the first step."""


class DistillationTrainer(Recorded, SFTTrainer):
    """objective: distill. `loss` in its logs is the loss of distillation.py, `kl` and `ce` are means per counted
    token at the temperatures T and 1; `eval_loss` is the plain CE of sft, `eval_kl` stands beside it."""

    teacher: Teacher  # set before training. The trainer is no nn.Module: accelerate does not wrap, move or save it

    def __init__(
        self,
        model: PeftModel,
        arguments: SFTConfig,
        ce_weight: float,
        temperature: float,
        **data: Unpack[TrainerData],
    ):
        super().__init__(model, arguments, **data)
        self._ce_weight, self._temperature = ce_weight, temperature
        self.sums: dict[str, list[float]] = {}  # mode -> summed KL, CE, hits and tokens since the last log
        self._plain = plain_model(model)
        assert not any(p.requires_grad for p in self._plain.get_output_embeddings().parameters())
        hand_over_hidden_states(self._plain)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert not return_outputs, "the logits are never made as a whole"
        labels = inputs["labels"]
        seen = {key: value for key, value in inputs.items() if key != "labels"}
        counted = labels[:, 1:] != -100
        kl_of = self.teacher.targets(seen, counted)
        logits_of = head_of(self._plain)
        chunk = max(1, CHUNK // self._plain.config.get_text_config().vocab_size)

        def on_hidden(hidden: Tensor) -> tuple[Tensor, ...]:
            tokens = hidden[:, :-1][counted]
            options = self._ce_weight, self._temperature, chunk
            return TokenLoss.apply(tokens, labels[:, 1:][counted], logits_of, kl_of, *options)

        loss, kl, ce, hits = model(**seen, use_cache=False, on_hidden=on_hidden)
        count = counted.sum()
        self._add_up(inputs, torch.stack([kl, ce, hits, count.float()]))
        if not self._plain.training:
            return ce / count.clamp(min=1)
        loss = loss / torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        return loss

    def _add_up(self, inputs: dict[str, Tensor], found: Tensor) -> None:
        mode = "train" if self._plain.training else "eval"
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        found = torch.cat([found, torch.as_tensor([float(tokens)], device=found.device)])
        *sums, seen = self.accelerator.gather(found[None]).cpu().double().sum(0).tolist()
        before = self.sums.get(mode, [0.0] * len(sums))
        self.sums[mode] = [a + b for a, b in zip(before, sums, strict=True)]
        if mode == "train":
            self._total_train_tokens += int(seen)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self._plain.training else "eval"
        sums = self.sums.pop(mode, None)
        if sums is not None and sums[3] > 0:
            prefix = "" if mode == "train" else "eval_"
            kl, ce, accuracy = (total / sums[3] for total in sums[:3])
            logs |= {f"{prefix}kl": kl, f"{prefix}ce": ce, f"{prefix}mean_token_accuracy": accuracy}
            logs[f"{prefix}num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)


class MaskedTrainer(Recorded):
    """A masked language model."""
