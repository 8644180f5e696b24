"""trl's and transformers' trainers with what all our runs share: a log that a resumed run continues exactly, no model
card and no telemetry of trl's, an adapter that appears whole."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import nested_gather
from trl import DPOTrainer, SFTTrainer

from ..integrations.files import ADAPTER_FILE
from ..storage import read_json, write_json
from .checkpoints import LOG_FILE

if TYPE_CHECKING:
    from datasets import Dataset
    from optuna import Trial
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainingArguments

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
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
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


class MaskedTrainer(Recorded):
    """A masked language model."""
