"""A finished result on the Hugging Face Hub: `push_to_hub`.

Whether an upload can be made at all is asked before any work. It begins when the result is complete, so that an upload
that fails loses nothing; the error names the command that uploads the folder again.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from fnmatch import fnmatch  # as the Hub's library matches: * is any characters, / included
from pathlib import Path

from ..console import human_bytes, is_main_process, note, say
from ..errors import LordError, UsageError
from ..storage import read_json
from .files import ADAPTER_FILE, first_line

CHECKPOINTS = "checkpoint-*"  # of a training run: what it continues from, no result
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def check_push(repo: str | None) -> None:
    """UsageError, without asking the network, if nothing can be uploaded to `repo`; None is no upload."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo is None:
        return
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"Got '{repo}' for a repository of the Hugging Face Hub; expected USER/NAME ({first_line(error)})"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "`push_to_hub` needs the network, which HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) turns off; unset it, or "
            "leave `push_to_hub` out and upload the result later with `hf upload`."
        )
    if get_token() is None:
        raise UsageError(
            "`push_to_hub` needs a token of the Hugging Face Hub, and there is none; log in with `hf auth login`, or "
            "set HF_TOKEN."
        )


def place_of(repo: str, private: bool) -> str:
    """Where a result would go, in words."""
    from huggingface_hub import constants

    kind = "private, if it is new" if private else "public, if it is new and your organization does not say otherwise"
    return f"{constants.ENDPOINT}/{repo} ({kind})"


def push(folder: Path, repo: str | None, private: bool, leave_out: Sequence[str] = ()) -> None:
    """Upload a finished folder to a repository, which is made if it does not exist; None is no upload. leave_out:
    patterns of files that stay here. Of several processes the first does it.

    LordError if that fails, if a repository that is to be private is public, and if it holds weights that would stay
    beside those of the folder, so that a loader could take them.
    """
    if repo is None or not is_main_process():
        return
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    sent = [path for name, path in names.items() if not any(fnmatch(name, pattern) for pattern in leave_out)]
    say(f"uploading {folder} ({human_bytes(sum(path.stat().st_size for path in sent))}) to {repo}")
    options = [word for pattern in leave_out for word in ("--exclude", pattern)] + ["--private"] * private
    again = shlex.join(["hf", "upload", repo, str(folder), ".", *options])
    try:
        url = _upload(folder, repo, private, leave_out, set(names), again)
    except LordError:
        raise
    except Exception as error:  # of the Hub, of the network, of the token: several libraries' own
        raise LordError(
            f"The upload to {repo} failed ({first_line(error)}); the result is whole in {folder}. Upload it again "
            f"with: {again}"
        ) from error
    say(f"uploaded {folder} to {url}")
    if (folder / ADAPTER_FILE).is_file():
        base = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
        if base is not None and Path(base).is_dir():
            note(f"the adapter's base is the folder {base}: others need that as well, or an export of the result")


def _upload(folder: Path, repo: str, private: bool, leave_out: Sequence[str], names: set[str], again: str) -> str:
    """The URL of the repository that holds the folder now. names: of the folder's files; again: see `push`."""
    from huggingface_hub import HfApi

    api = HfApi()
    made = api.create_repo(repo, private=True if private else None, exist_ok=True)
    found = api.model_info(made.repo_id)
    if private and not found.private:
        raise LordError(
            f"{made.repo_id} exists and is public, so nothing was uploaded; make it private in its settings, or choose "
            f"another repository. The result is whole in {folder}. Upload it then with: {again}"
        )
    held = [file.rfilename for file in found.siblings or []]
    stale = sorted(name for name in held if name not in names and any(fnmatch(name, one) for one in _WEIGHTS))
    if stale:
        delete = shlex.join([word for pattern in _WEIGHTS for word in ("--delete", pattern)])
        raise LordError(
            f"{made.repo_id} holds {len(stale)} files of other weights, like {stale[0]}, which a loader could take for "
            f"those of {folder}, so nothing was uploaded; choose another repository, or upload the result in their "
            f"place with: {again} {delete}"
        )
    api.upload_folder(repo_id=made.repo_id, folder_path=folder, ignore_patterns=[*leave_out])
    return str(made)
