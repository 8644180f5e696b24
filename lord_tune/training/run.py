"""Recovery: the one story of a training run, from rows to the written adapter, for every mode and objective."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import set_seed

from ..adapters.attach import BASIS, coverage
from ..adapters.loading import load
from ..console import is_main_process, note
from ..data.rows import RowFormat
from ..data.texts import described
from ..errors import LordError, UsageError
from ..integrations.files import ADAPTER_FILE, RUN_FILE
from ..integrations.models import DTYPE_NAMES, load_tokenizer
from ..integrations.running import max_length
from ..integrations.sources import weights_identity
from ..integrations.space import check_space
from ..layers import expert_of, factored_layers, plain_model
from ..memory import large_blocks_apart
from ..storage import read_json, write_json
from .arguments import DISTILL, DPO, TrainOptions
from .basis import Pruning, check_run, steps_of
from .checkpoints import bytes_to_write, defect, newest_complete
from .data import (
    chat_template,
    check_embedded,
    check_tokenized,
    other_template,
    prepare_rows,
    rows_sha256,
    sample_spans,
)
from .distillation import LiveTeacher, check_head
from .memory import FirstStep, TrainingPeak
from .modes import expose, teacher_source, trained_kind
from .pieces import fitting_pieces
from .preference import prepare_pairs, sample_pair

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import DPOConfig, SFTConfig

    from ..protocols import CausalModel, Tokenizer, TrainerLike, TrlConfig
    from .distillation import Teacher
    from .forecast import MemoryEstimate
    from .progress import ShowProgress
    from .trainers import DistillationTrainer, Recorded, TrainerData

_MAY_CHANGE = {  # of a continued run, whose folder may have another name now
    *("resume_from_checkpoint", "num_train_epochs", "max_steps", "dry_run", "report_to", "output_dir"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy"),
}
# a name or path -> what it stands for: only the latter has to stay, so that a run may be moved with what it reads
_STANDS_FOR = {
    "model_name_or_path": "base",
    "base_folder": "base",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "rows",
    "eval_dataset_name": "eval_rows",
}
Notify = Callable[[str, object], None]  # (event, payload): "coverage", "data", "sample"


def train_model(
    model: CausalModel,
    tokenizer: Tokenizer,
    options: TrainOptions,
    arguments: TrlConfig,  # SFTConfig or DPOConfig
    resolved: Mapping[str, object],  # stored beside the checkpoints: a changed run refuses to resume
    notify: Notify = lambda event, payload: None,
    foreseen: MemoryEstimate | None = None,  # from before the model was loaded
) -> dict[str, Any]:
    """Train and write the adapter to arguments.output_dir; resumes from the newest whole checkpoint found there.

    Returns the trainer's metrics: train_loss, steps, the loss history, trainable_parameters.
    """
    output = Path(arguments.output_dir)
    resolved = dict(resolved) | {"processes": arguments.world_size}  # its checkpoints hold a random state for each
    teacher = teacher_source(options) if options.objective == DISTILL else None
    resolved |= {
        "teacher": None if teacher is None else weights_identity(teacher),
        "rows": rows_sha256(options.dataset_name),
        "eval_rows": rows_sha256(options.eval_dataset_name),
    }
    checkpoint, broken = _checkpoint(output, arguments)
    _check_output(output, checkpoint, broken, resolved, arguments)
    check_experts(model, arguments)
    if options.mode == BASIS:
        check_run(arguments)
    kind = trained_kind(model)
    if options.objective != "sft" and kind != "causal":
        raise UsageError(f"objective: {options.objective} needs a model that predicts the next token; use sft.")
    rows, form = _rows(options.dataset_name, options.dataset_train_split, options, arguments, tokenizer)
    told = described(form, len(rows), options.plain_prompts)
    notify("data", {"source": options.dataset_name, "described": told})
    held = None
    if options.eval_dataset_name or options.dataset_test_split:
        name = options.eval_dataset_name or options.dataset_name
        held, _ = _rows(name, options.dataset_test_split or "train", options, arguments, tokenizer)
    set_seed(arguments.seed)  # before adapters are drawn; the trainer seeds again
    exposed = expose(model, options)
    notify("coverage", coverage(exposed))
    check_space(output, bytes_to_write(exposed, arguments), f"The adapter in {output}, with a checkpoint of the run,")
    before = output.exists()
    made = _make_trainer(exposed, tokenizer, arguments, rows, held, options)
    if not before:  # the trainer makes an empty folder; what is refused below leaves none
        with contextlib.suppress(OSError):
            output.rmdir()
    trainer = cast("TrainerLike", made)  # typed more narrowly than transformers' own attributes
    pruning = Pruning(exposed, options, steps_of(trainer)) if options.mode == BASIS else None
    if pruning is not None:
        trainer.add_callback(pruning)
    check_embedded(trainer, tokenizer)
    if options.objective == DPO:
        notify("sample", sample_pair(trainer, tokenizer))
    else:
        chats = form.kind == "messages" or form.kind == "prompt_completion" and isinstance(rows[0]["prompt"], list)
        supervised = cast("SFTConfig", arguments)
        wrapped = supervised.packing and supervised.packing_strategy == "wrapped"  # ends of texts lie anywhere
        if not wrapped:
            check_tokenized(trainer, tokenizer, len(rows), chats)
        ends = form.kind == "prompt_completion" and not chats and not wrapped
        notify("sample", sample_spans(trainer, tokenizer, require_eos=ends))
    if teacher is not None:
        cast("DistillationTrainer", made).teacher = _make_teacher(
            trainer, tokenizer, teacher, str(resolved["teacher"]), options
        )
    show = _show_progress(trainer, options, checkpoint)
    if is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN_FILE, resolved)
        for folder, wrong in broken.items():
            note(f"{folder} is left out and removed: {wrong}")
            shutil.rmtree(folder)
    counted = FirstStep()
    trainer.add_callback(counted)
    device = trainer.args.device
    with (
        TrainingPeak(foreseen.held if foreseen else 0, device) as peak,
        large_blocks_apart(),
        fitting_pieces(device.type != "cpu"),
    ):
        if checkpoint is not None and _at_end(checkpoint, arguments):
            trainer.take_up(checkpoint)
        else:
            try:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            finally:
                counted.close()
    _check_trained(exposed, arguments)
    trainer.write_adapter(output)
    trainer.save_state()
    show.draw(trainer.state, output)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    metrics = {
        "train_loss": trainer.mean_loss(),
        "steps": trainer.state.global_step,
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "trainable_parameters": coverage(exposed).trainable_parameters,
        "train_runtime": next((e["train_runtime"] for e in trainer.state.log_history if "train_runtime" in e), None),
        "history": history,
        "memory": {
            "predicted": foreseen.to_dict() if foreseen else None,
            "measured": counted.parts | {"peak": peak.bytes},
        },
    } | ({} if pruning is None else {"basis": pruning.results()})
    if is_main_process():
        write_json(output / "train_results.json", metrics)
    return metrics


def begun(output: Path, arguments: TrlConfig) -> Path | None:
    """The checkpoint that a run into `output` will continue from, before any work; None for a run of its own."""
    found, _ = _checkpoint(output, arguments)
    return None if found is None or _finished(output, found, arguments) else found


def check_experts(model: nn.Module, arguments: TrlConfig) -> None:
    """An expert that no token of a batch chose has no gradient, which plain data parallelism waits for."""
    if arguments.world_size > 1 and arguments.ddp_find_unused_parameters is False:
        if any(expert_of(name) is not None for name in factored_layers(model)):
            raise UsageError(
                "ddp_find_unused_parameters: false does not work with decomposed experts, some of which may get no "
                "token of a batch; leave it out."
            )


def _rows(
    source: str, split: str, options: TrainOptions, arguments: TrlConfig, tokenizer: Tokenizer
) -> tuple[Dataset, RowFormat]:
    config = options.dataset_config if source == options.dataset_name else None
    if options.objective == DPO:
        return prepare_pairs(source, split, config, tokenizer), RowFormat("pairs", "prompt")
    text = getattr(arguments, "dataset_text_field", "text")
    template = other_template(getattr(arguments, "chat_template_path", None))
    assistant_only = getattr(arguments, "assistant_only_loss", False)
    return prepare_rows(source, split, config, tokenizer, text, template, assistant_only, options.plain_prompts)


def _checkpoint(output: Path, arguments: TrlConfig) -> tuple[Path | None, dict[Path, str]]:
    """(where to continue from, newer checkpoints that are not whole)"""
    asked = arguments.resume_from_checkpoint
    if asked and str(asked).lower() in ("true", "false"):  # transformers' spelling of what is done anyway
        if str(asked).lower() == "false":
            raise UsageError(
                "Got resume_from_checkpoint: false, but a run always continues from the checkpoints in its output_dir; "
                "choose another output_dir to start anew."
            )
        asked = None
    if not asked:
        return newest_complete(output, arguments) if output.is_dir() else (None, {})
    if not Path(asked).is_dir():
        raise UsageError(f"The checkpoint {asked} (resume_from_checkpoint) does not exist; check the path.")
    wrong = defect(Path(asked), arguments.world_size, not arguments.save_only_model)
    if wrong:
        raise UsageError(f"The checkpoint {asked} (resume_from_checkpoint) is not whole: {wrong}; name another one.")
    return Path(asked), {}


def _make_teacher(
    trainer: TrainerLike, tokenizer: Tokenizer, source: str, weights: str, options: TrainOptions
) -> Teacher:
    """The targets of distillation: a model in memory, or a folder of its most likely tokens. weights: which the source
    holds (weights_identity)."""
    from .teacher_logits import Identity, prepare, sequences_of_row

    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"The teacher {source} has another vocabulary than the student; distillation needs the same.")
    dtype = next(name for name, kind in DTYPE_NAMES.items() if kind == trainer.model.dtype)
    probe = torch.tensor([trainer.train_dataset[0]["input_ids"][:16]])
    vocabulary = plain_model(trainer.model).get_output_embeddings().weight.shape[0]
    check_head(trainer.model, probe)

    def load_teacher() -> CausalModel:
        teacher = load(source, dtype)[0].to(trainer.accelerator.device)  # type: ignore[arg-type]  # its decorator's type
        found = plain_model(teacher).get_output_embeddings()
        if found is None or found.weight.shape[0] != vocabulary:
            came = "no language-model head" if found is None else f"{found.weight.shape[0]:,} logits"
            raise UsageError(f"The teacher {source} has {came}, the student {vocabulary:,}; they must have the same.")
        check_head(teacher, probe)
        return teacher

    if options.teacher_logits is None:
        return LiveTeacher(load_teacher(), options.distill_temperature)
    identity: Identity = {
        "format": 1,
        "teacher": weights,
        "dtype": dtype,
        "vocabulary": vocabulary,
        "top_k": min(options.teacher_top_k, vocabulary),
        "temperature": options.distill_temperature,
    }
    sets = [trainer.train_dataset, *([] if trainer.eval_dataset is None else [trainer.eval_dataset])]
    length = trainer.args.max_length or max_length(trainer.model)
    return prepare(
        Path(options.teacher_logits),
        identity,
        lambda: itertools.chain.from_iterable(sequences_of_row(row) for rows in sets for row in rows),
        load_teacher,
        batch_tokens=trainer.args.per_device_train_batch_size * length,
    )


def _show_progress(trainer: TrainerLike, options: TrainOptions, checkpoint: Path | None) -> ShowProgress:
    """Our lines and our curve in place of transformers' printed dicts."""
    from transformers import PrinterCallback

    from .progress import ShowProgress
    from .trainers import ContinueLog

    name = Path(options.model_name_or_path).name
    title = f"{name}, mode {options.mode}, objective {options.objective}"
    show = ShowProgress(trainer, title, "loss (nats per pair)" if options.objective == DPO else "loss (nats per token)")
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        trainer.add_callback(ContinueLog(trainer, checkpoint))
    trainer.add_callback(show)
    return show


def _check_trained(model: nn.Module, arguments: TrlConfig) -> None:
    """The trainer goes on after a NaN loss, so the weights are looked at."""
    broken = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if broken:
        raise LordError(
            f"Training diverged: {len(broken)} trained tensors hold NaN or Inf, like {broken[0]}; lower learning_rate "
            f"({arguments.learning_rate:g}) or max_grad_norm. No adapter was written."
        )


def _check_output(
    output: Path, checkpoint: Path | None, broken: dict[Path, str], resolved: Mapping[str, object], arguments: TrlConfig
) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    run = output / RUN_FILE
    if not output.is_dir() or not run.is_file():
        raise UsageError(f"{output} holds something other than a training run; choose another output_dir.")
    if checkpoint is None and not broken and not (output / ADAPTER_FILE).is_file():
        return  # a run that stopped before its first checkpoint: nothing to continue, nothing to lose
    before = read_json(run)
    # as text: the command line gives "64" where YAML gives 64
    same = {name for name, what in _STANDS_FOR.items() if resolved.get(what) and resolved[what] == before.get(what)}
    # which steps prune depends on how many there are
    fixed = {"num_train_epochs", "max_steps"} if resolved.get("mode") == BASIS else set()
    keys = {*before, *resolved} - (_MAY_CHANGE - fixed) - same
    changed = sorted(key for key in keys if str(before.get(key)).lower() != str(resolved.get(key)).lower())
    if changed:
        raise UsageError(
            f"{output} holds a run with another {', '.join(changed[:5])}; choose another output_dir, or remove it to "
            "start anew."
        )
    if checkpoint is None:
        if broken:
            return  # it was killed in its first checkpoint
        raise UsageError(f"{output} holds a finished run without checkpoints; choose another output_dir.")
    if _finished(output, checkpoint, arguments):
        more = "" if resolved.get("mode") == BASIS else "raise max_steps or num_train_epochs, or "
        raise UsageError(f"{output} holds a finished run; {more}choose another output_dir.")


def _finished(output: Path, checkpoint: Path, arguments: TrlConfig) -> bool:
    """Whether the adapter in `output` is that of the whole run."""
    results = output / "train_results.json"
    if (
        not results.is_file()
        or read_json(results)["steps"] < read_json(checkpoint / "trainer_state.json")["global_step"]
    ):
        return False  # stopped between its last checkpoint and the adapter
    return _at_end(checkpoint, arguments)


def _at_end(checkpoint: Path, arguments: TrlConfig) -> bool:
    """Whether a checkpoint is that of the last step; the trainer would go on for one more."""
    state = read_json(checkpoint / "trainer_state.json")
    if arguments.max_steps > 0:
        return state["global_step"] >= arguments.max_steps
    return state["epoch"] >= arguments.num_train_epochs


def _make_trainer(
    model: PeftModel,
    tokenizer: Tokenizer,
    arguments: TrlConfig,
    rows: Dataset,
    held: Dataset | None,
    options: TrainOptions,
) -> Recorded:
    if trained_kind(model) == "masked":
        return _masked_trainer(model, tokenizer, arguments, rows, held)
    if getattr(tokenizer, "eos_token", None) is None and getattr(arguments, "eos_token", None) is None:
        raise UsageError("The tokenizer has no end-of-text token, so the model cannot learn to stop; set eos_token.")
    from .trainers import DistillationTrainer, PreferenceTrainer, SupervisedTrainer

    data: TrainerData = {
        "train_dataset": rows,
        "eval_dataset": held,
        "processing_class": cast("PreTrainedTokenizerBase", tokenizer),
    }
    if options.objective == DPO:
        return PreferenceTrainer(model, args=cast("DPOConfig", arguments), **data)
    supervised = cast("SFTConfig", arguments)
    with chat_template(tokenizer, marked=supervised.assistant_only_loss and supervised.chat_template_path is None):
        if options.objective == DISTILL:
            return DistillationTrainer(
                model, supervised, options.distill_ce_weight, options.distill_temperature, **data
            )
        return SupervisedTrainer(model, supervised, **data)


def _masked_trainer(
    model: PeftModel, tokenizer: Tokenizer, arguments: TrlConfig, rows: Dataset, held: Dataset | None
) -> Recorded:
    from transformers import DataCollatorForLanguageModeling

    from .trainers import MaskedTrainer

    if "text" not in rows.column_names:
        raise UsageError("A masked language model trains on plain text; give a dataset with a text column.")
    limit = min(arguments.max_length or 512, max_length(model))

    def tokenize(row: Mapping[str, str]) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(row["text"], truncation=True, max_length=limit)["input_ids"]}

    collator = DataCollatorForLanguageModeling(cast("PreTrainedTokenizerBase", tokenizer), mlm_probability=0.15)
    rows = rows.map(tokenize, remove_columns=rows.column_names)
    held = None if held is None else held.map(tokenize, remove_columns=held.column_names)
    given = cast("SFTConfig", arguments)
    return MaskedTrainer(model, given, data_collator=collator, train_dataset=rows, eval_dataset=held)
