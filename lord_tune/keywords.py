"""What Python shows of a verb: its signature and its help list every option of its record in config.py."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, TypeVar

from .config import RunConfig
from .trl_keys import HEADING, TRL_KEYS

_INDENTED: dict[str, Any] = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}
_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def documented(record: type[RunConfig]) -> Callable[[_Verb], _Verb]:
    """Give a verb that takes `**options` the fields of `record` as its signature, and add them to its help."""

    def apply(verb: _Verb) -> _Verb:
        signature = inspect.signature(verb)
        own = [item for item in signature.parameters.values() if item.kind is not Parameter.VAR_KEYWORD]
        names = {item.name for item in own}
        added, lines = [], []
        for name, field in record.model_fields.items():
            key = field.alias or name
            required = field.is_required()
            default = Parameter.empty if required else field.get_default(call_default_factory=True)
            parameter = Parameter(key, Parameter.KEYWORD_ONLY, default=default, annotation=field.annotation)
            if key not in names:
                added.append(parameter)
            shown = str(parameter.replace(annotation=Parameter.empty)) + (" (required)" if required else "")
            lines += [f"    {shown}", *textwrap.wrap(field.description or "", 112, break_on_hyphens=False, **_INDENTED)]
        if record.model_config["extra"] == "allow":
            lines += ["", f"{HEADING}:", ""]
            for name, usual in TRL_KEYS.items():
                lines += [f"    {name}", *textwrap.wrap(usual.line(), 112, break_on_hyphens=False, **_INDENTED)]
            added.append(Parameter("trl_options", Parameter.VAR_KEYWORD, annotation=Any))
        vars(verb)["__signature__"] = Signature([*own, *added], return_annotation=signature.return_annotation)
        verb.__doc__ = f"{inspect.cleandoc(verb.__doc__ or '')}\n\nOptions:\n\n" + "\n".join(lines)
        return verb

    return apply
