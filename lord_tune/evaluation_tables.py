"""What `evaluate` prints."""

from __future__ import annotations

from typing import Any

from .console import human_bytes, say, show_table

_BESIDE = ("items", "cut_items", "chat")  # numbers of a task that are no scores


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def show_texts(title: str, texts: dict[str, dict[str, Any]]) -> None:
    """Perplexity and loss of each text, ± one standard error over its windows."""
    rows = [
        [
            name.rpartition("/")[2],
            _with_error(entry["perplexity"], entry["perplexity_standard_error"], 3),
            _with_error(entry["loss"], entry["loss_standard_error"], 4),
            f"{entry['tokens']:,}",
            str(entry["windows"]),
        ]
        for name, entry in texts.items()
    ]
    show_table(f"{title} (± standard error over windows)", ["text", "perplexity", "loss", "tokens", "windows"], rows)


def show_agreement(found: dict[str, Any]) -> None:
    """With the original, over all texts."""

    def told(name: str, digits: int, scale: float = 1) -> str:
        error = found[f"{name}_standard_error"]
        return _with_error(scale * found[name], None if error is None else scale * error, digits)

    say(
        f"beside {found['model']} (perplexity {found['perplexity']:.3f}): KL {told('kl', 4)} nats per token, the same "
        f"likeliest token at {told('top1_agreement', 2, 100)} %, loss higher by {told('loss_difference', 4)}"
    )


def show_scores(tasks: dict[str, dict[str, Any]], lm_eval: str) -> None:
    """One line per task and score."""
    rows = []
    for name, entry in tasks.items():
        for key in entry:
            if isinstance(entry[key], int | float) and key not in _BESIDE and "_stderr" not in key:
                metric, dot, filtered = key.partition(".")
                error = entry.get(f"{metric}_stderr{dot}{filtered}")
                rows.append(
                    [name, key, f"{entry[key]:.4g}", "" if error is None else f"{error:.2g}", str(entry["items"])]
                )
    chat = ", through the chat template" if any(entry["chat"] for entry in tasks.values()) else ""
    title = f"tasks without examples{chat}, by lm-eval {lm_eval}"
    show_table(title, ["task", "score", "value", "standard error", "questions"], rows)
    given = [name for name, entry in tasks.items() if entry["rows_are"] == "as given"]
    if given:
        say(f"{', '.join(given)}: the query as it stands, then a space and each choice; no task of lm-eval")


def show_sizes(result: dict[str, Any]) -> None:
    """What the checkpoint holds, and the speed where there was text."""
    timed = f"; {result['tokens_per_second']:.1f} tokens/s" if "tokens_per_second" in result else ""
    memory = f", peak memory {human_bytes(result['peak_memory_bytes'])}" if "peak_memory_bytes" in result else ""
    say(
        f"{result['parameters']:,} stored numbers, {human_bytes(result['model_bytes'])}, linears at "
        f"{result['linear_bits_per_weight']:.2f} bits per weight{timed}{memory}"
    )


def show_solved(name: str, entry: dict[str, Any]) -> None:
    """One programming task."""
    low_high = {key: entry[f"{key}_interval"] for key in entry if key.startswith("pass@") and "_" not in key}
    told = [
        f"{key} {100 * entry[key]:.1f} % (95 %: {100 * a:.1f} to {100 * b:.1f})" for key, (a, b) in low_high.items()
    ]
    way = "chat" if entry["chat"] else "completion"
    samples = entry["samples_per_problem"]
    count = f"{entry['solved_problems']} of {entry['problems']} problems solved"
    more = f", {entry['passed_samples']} of {samples * entry['problems']} samples passed" if samples > 1 else ""
    kept = f"; {entry['reused_samples']} samples were there already" if entry["reused_samples"] else ""
    say(f"{name} ({way}): {count}{more}: {', '.join(told)}{kept}")


def show_speeds(found: dict[str, Any]) -> None:
    """Of a prompt and of generating, by batch."""
    rows = [
        [
            size,
            f"{entry['prefill_tokens_per_second']:.1f}",
            f"{entry['decode_tokens_per_second']:.1f}",
            human_bytes(entry["peak_memory_bytes"]),
        ]
        for size, entry in found["batches"].items()
    ]
    title = f"tokens per second, prompts of {found['prompt_tokens']} tokens, {found['generated_tokens']} generated"
    show_table(title, ["prompts at once", "reading", "generating", "peak memory"], rows)


def show_written(samples: list[dict[str, str]]) -> None:
    """How the models go on after a beginning."""
    for number, row in enumerate(samples, 1):
        say(f"sample {number}")
        for name, text in row.items():
            say(f"  {name}: {text!r}")
