"""`lord-tune`: parse, call the verb, print one clear sentence on failure.

The options are generated from the records in config.py, so flags, YAML keys and Python keywords cannot drift apart.
Heavy imports happen inside the verbs: `--help` needs neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
import sys
import typing
import warnings
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, Literal, TextIO

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape
from typer.core import TyperCommand

from . import __version__
from .config import RECORDS, DecomposeConfig, MethodConfig, PlanConfig, RunConfig
from .console import is_main_process
from .errors import LordError, LordWarning, UsageError
from .trl_keys import HEADING, TRL_KEYS

_RICH: Any = "rich" if sys.stdout.isatty() else None  # panels on a terminal, plain text elsewhere


class _Verb(TyperCommand):
    """A verb whose plain help has the headings of the panels, and whose examples are not wrapped.

    The help of train shows the usual keys of trl as well, which are no options of ours: `_extra_options` takes any key.
    """

    _helping = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._helping = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._helping = False

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)
        if not self._helping or self.name != "train":
            return found
        place = 1 + max(i for i, item in enumerate(found) if getattr(item, "rich_help_panel", None) == "Common")
        return [*found[:place], *_trl_options(), *found[place:]]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for line in EXAMPLES[str(self.name)]:
                formatter.write(f"  {line}\n")


app = typer.Typer(
    help="Low-rank fine-tuning of compressed language models: decompose, train, evaluate, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=_RICH,
)
_MANY = ("--calibration", "--text", "--mix", "--tasks", "--methods", "--learning-rate")
_POSITIONAL = ("quantized", "original", "model", "runs", "out", "action", "name", "dest")
_OUTPUT_KEYS = set(DecomposeConfig.model_fields) - set(MethodConfig.model_fields)


def _trl_options() -> list[Any]:
    """Lines of the help: the options of a command that is never called."""
    parameters = []
    for name, key in TRL_KEYS.items():
        shown: Any = {"help": _shown(key.line()), "metavar": f"<{key.kind.__name__}>", "show_default": False}
        value = typer.Option(None, f"--{name}", rich_help_panel=HEADING, **shown)
        kind = str if key.kind is bool else key.kind
        parameters.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=kind | None))

    def command(**values: object) -> None:
        """Never called."""

    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    holder = typer.Typer(add_completion=False)
    holder.command()(command)
    found: Any = typer.main.get_command(holder)
    return [item for item in found.params if item.name in TRL_KEYS]


def _flag(record: type[RunConfig], name: str) -> str:
    """train's flags are keys of trl's, which have underscores."""
    key = record.model_fields[name].alias or name
    return "--" + (key if record.model_config["extra"] == "allow" else key.replace("_", "-"))


# key -> flag; of the verbs that share a key train comes first, and each takes both spellings
_FLAGS = {
    _flag(record, name)[2:].replace("-", "_"): _flag(record, name)
    for record in sorted(RECORDS.values(), key=lambda record: record.model_config["extra"] != "allow")
    for name in record.model_fields
    if name not in ("model", "out", "action", "name", "dest")
}


def _flag_type(field: FieldInfo) -> tuple[Any, str]:
    """The type typer parses and the choices for the help; the record itself checks choices."""
    options = [a for a in typing.get_args(field.annotation) if a is not type(None)]
    annotation: Any = field.annotation
    if float in options and len(options) > 1:  # a number or a word; the record tells them apart
        return str, ""
    if typing.get_origin(annotation) is not Literal and len(options) == 1 and annotation != list[str]:
        annotation = options[0]
    if typing.get_origin(annotation) is Literal:
        return str, " | ".join(map(str, typing.get_args(annotation)))
    return annotation, ""


def _shown(text: str) -> str:
    """Text in which rich sees no markup."""
    return escape(text) if _RICH else text


def _parameter(record: type[RunConfig], name: str, positional: bool, group: str | None) -> Parameter:
    field, flag = record.model_fields[name], _flag(record, name)
    kind, choices = _flag_type(field)
    default = field.get_default(call_default_factory=True)
    shown = "" if default in (None, False, []) or field.is_required() else f" [default: {default}]"
    help_text = field.description or ""
    help_text += f" ({choices})" if choices and choices not in help_text else ""
    help_text = _shown(help_text + ("" if positional else shown))
    if positional:
        value = typer.Argument(None, help=help_text, show_default=False)
    elif kind is bool:
        value = typer.Option(None, f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False, rich_help_panel=group)
    else:
        value = typer.Option(None, flag, help=help_text, show_default=False, rich_help_panel=group)
    annotation = list[str] | None if kind == list[str] else kind | None
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=annotation)


def _add(verb: str, record: type[RunConfig], summary: str, call: Callable[[dict[str, object]], object]) -> None:
    """Register a verb whose options are the fields of `record`.

    `plan` takes the YAML file of a `decompose` run as it is: the keys out, overwrite, resume and dry_run of a file are
    left out there (on its command line they are unknown options).
    """
    fields = record.model_fields
    open_ended = record.model_config["extra"] == "allow"  # train: trl's names, with underscores
    positional = [name for name in _POSITIONAL if name in record.positional]
    groups = record.grouped()
    ordered = dict.fromkeys([*positional, *groups, *fields, "config"])
    text = "YAML file with any of these keys, or the name of a recipe; the command line wins"
    yaml = typer.Option(None, help=text, rich_help_panel=groups.get("config"))
    from_yaml = Parameter("config", Parameter.POSITIONAL_OR_KEYWORD, default=yaml, annotation=str | None)
    parameters = [
        from_yaml if name == "config" else _parameter(record, name, name in positional, groups.get(name))
        for name in ordered
    ]
    if open_ended:
        parameters.insert(0, Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context))

    def command(ctx: typer.Context | None = None, config: str | None = None, **values: object) -> None:
        given = {fields[k].alias or k: v for k, v in values.items() if v is not None and v != []}
        if ctx is not None:
            given |= _extra_options(ctx.args)
        if config is not None:
            from .recipe_files import config_file
            from .yaml_files import load_yaml

            found = load_yaml(config_file(config))
            if record is PlanConfig:  # a recipe of `decompose`: where it would write is of no interest to a plan
                found = {key: value for key, value in found.items() if key not in _OUTPUT_KEYS}
            given = found | given
        call(given)

    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = summary
    settings = {"allow_extra_args": True, "ignore_unknown_options": True} if open_ended else {}
    epilog = "\n\n".join(["Examples:", *(_shown(line) for line in EXAMPLES[verb])])
    app.command(verb, cls=_Verb, epilog=epilog, context_settings=settings)(command)


def _extra_options(words: list[str]) -> dict[str, str | list[str]]:
    """`--key value...` and `--key=value` of training options that are trl's; a flag alone means true."""
    found: dict[str, str | list[str]] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise UsageError(f"'{word}' does not follow an option; write --key value.")
        key, equals, value = word[2:].partition("=")
        position += 1
        values = [value] if equals else []
        while position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        found[key] = values if len(values) > 1 else values[0] if values else "true"
    return found


def _verb(name: str) -> Callable[[dict[str, object]], object]:
    def call(values: dict[str, object]) -> object:
        import lord_tune

        required = [k for k in (*_POSITIONAL, "text", "format") if k in RECORDS[name].model_fields]
        missing = [k for k in required if k not in values and RECORDS[name].model_fields[k].is_required()]
        if missing:
            shown = missing[0].upper() if missing[0] in _POSITIONAL else "--" + missing[0]
            raise UsageError(f"{shown} is missing; see lord-tune {name} --help.")
        return getattr(lord_tune, name)(**values)

    return call


_SUMMARIES = {
    "quickstart": "The whole story on SmolLM2-135M, offline, in minutes.",
    "plan": "Memory, time, size and ranks of a decomposition, foreseen.",
    "decompose": "Write a factored checkpoint: W = L R, or W = Q + L R.",
    "train": "Train L and R, or LoRA on them, with any option of trl.",
    "evaluate": "Perplexity, tasks, size, bits per weight and speed of a checkpoint.",
    "export": "Write a checkpoint in another form, for an engine or loader, and verify it.",
    "correct": "Fit L R to what a quantized checkpoint left out.",
    "chat": "Talk to a checkpoint.",
    "compare": "Several methods at the same bytes, in one table and one plot.",
    "inspect": "Per-layer table of a factored checkpoint.",
    "report": "One page about one or several results: tables and figures.",
    "recipes": "The recipes that come with lord_tune: list, show, or copy one.",
    "doctor": "Versions, devices, threads, and what is missing.",
}
EXAMPLES = {
    "quickstart": ["lord-tune quickstart", "lord-tune quickstart --out first_try --steps 64"],
    "plan": [
        "lord-tune plan demo --backbone nf4 --rank 16 --factor-format bf16",
        "lord-tune plan demo --kept-fraction 0.8 --json plan.json",
    ],
    "decompose": [
        "lord-tune decompose demo runs/nf4 --backbone nf4 --rank 16 --calibration text.jsonl",
        "lord-tune decompose demo runs/lord --kept-fraction 0.9 --calibration text.jsonl",
    ],
    "train": [
        "lord-tune train --model_name_or_path runs/nf4 --dataset_name text.jsonl --output_dir runs/sft --max_steps 32",
        "lord-tune train --config recipe.yaml --learning_rate 1e-4",
    ],
    "evaluate": [
        "lord-tune evaluate runs/sft --text prose.txt code.txt --original demo --json result.json",
        "lord-tune evaluate runs/sft --tasks piqa,humaneval --tasks-dir questions --confirm-run-unsafe-code",
    ],
    "export": [
        "lord-tune export runs/sft runs/peft --format peft",
        "lord-tune export runs/sft runs/dense --format dense --dtype bfloat16",
    ],
    "correct": [
        "lord-tune correct model-Q4_K_M.gguf ORIGINAL runs/corrected --rank 16 --calibration text.jsonl",
        "lord-tune correct nf4_folder ORIGINAL runs/corrected --calibration code.jsonl:0.75 prose.txt:0.25",
    ],
    "chat": ["lord-tune chat runs/sft", "lord-tune chat runs/sft --prompt 'Reverse a list in Python.' --temperature 0"],
    "compare": [
        "lord-tune compare demo runs/compare --bits-per-weight 4.5 --methods loftq whitened:backbone=lloyd3 rounding "
        "--calibration text.jsonl --text heldout.jsonl",
        "lord-tune compare demo runs/small --max-bytes 150MB --methods lord caldera:backbone=e8-2 mixed "
        "--calibration text.jsonl --text heldout.jsonl prose.txt --steps 32",
    ],
    "inspect": ["lord-tune inspect runs/nf4", "lord-tune inspect runs/nf4 --json layers.json"],
    "report": [
        "lord-tune report runs/nf4 --out nf4.html",
        "lord-tune report dense.json runs/lord runs/nf4 runs/sft --out report.html",
    ],
    "recipes": ["lord-tune recipes list 4-bit", "lord-tune recipes copy smollm2_135m/decompose/max_60mb mine.yaml"],
    "doctor": ["lord-tune doctor", "lord-tune doctor --json report.json"],
}
for _name, _record in RECORDS.items():
    _add(_name, _record, _SUMMARIES[_name], _verb(_name))


@app.command("version")
def _version() -> None:
    """The version of lord_tune."""
    typer.echo(__version__)


def _expand(words: list[str]) -> list[str]:
    """`--text a b` becomes `--text a --text b`; `--a_b` and `--a-b` are one option."""
    result: list[str] = []
    current: str | None = None
    old, new = ("-", "_") if words[:1] == ["train"] else ("_", "-")
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not (old == "-" and name.startswith("no-")):
                word = "--" + name.replace(old, new) + equals + value
        if word.startswith("-"):
            current = word if word in _MANY else None
            result.append(word)
        elif current is not None and result[-1] != current:
            result += [current, word]
        else:
            result.append(word)
    return result


def _with_flags(message: object) -> str:
    """Messages name an option by its key, `max_tokens`, as Python and YAML have it; here it is --max-tokens."""
    return re.sub(r"`(\w+)`", lambda found: _FLAGS.get(found[1], found[0]), str(message))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, LordWarning) and is_main_process():
        print(f"warning: {_with_flags(message)}", file=sys.stderr)


def _who() -> str:
    """Which of several processes an error is of."""
    return "" if is_main_process() else f"process {os.environ['RANK']}: "


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exit code 2 for a wrong call, 1 for work that failed, 130 for Ctrl-C. `--debug` shows tracebacks."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = ["version" if word == "--version" and not position else word for position, word in enumerate(words)]
    words = [word for word in words if word != "--debug"]
    if not debug:
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", LordWarning)
    try:
        # not standalone: typer's own complaints are reported below like ours; it returns 130 for Ctrl-C
        code = app(args=_expand(words) or ["--help"], prog_name="lord-tune", standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except LordError as error:
        if debug:
            raise
        print(f"{_who()}error: {_with_flags(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if debug:
            raise
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
        print(f"{_who()}error: {what} (check permissions and disk space)", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's: unknown option or command, a value of the wrong type
            print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
            sys.exit(2)
        # a defect of ours or of a library below: one line for the user, --debug for the report
        if debug:
            raise
        first = (str(error).strip().splitlines() or [""])[0][:300]
        print(f"{_who()}error: {type(error).__name__}: {first} (rerun with --debug for the traceback)", file=sys.stderr)
        sys.exit(1)
