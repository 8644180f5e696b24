"""`--push-to-hub`: refused before any work where it cannot be, and done when the result is whole, which it stays."""

from __future__ import annotations

import base64
import json
import shlex
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import lord_tune
from lord_tune.config import DecomposeConfig, TrainConfig
from lord_tune.provenance import command_line, lasting

REPO = "somebody/small"


class Hub(ThreadingHTTPServer):
    """The requests of an upload, as the Hub answers them, with every file inline."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.held: dict[str, bytes] = {".gitattributes": b""}  # files of the repository
        self.private, self.broken = False, ""  # the part of a path that is answered with an error


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        siblings = [{"rfilename": name} for name in self.server.held]
        self.answer({"id": REPO, "private": self.server.private, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        url = f"{self.server.url}/{REPO}"
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": url})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": f"{url}/commit/{'a' * 40}"})

    def answer(self, body: object) -> None:
        broken = bool(self.server.broken) and self.server.broken in self.path
        sent = json.dumps({"error": "the disk of the Hub is full"} if broken else body).encode()
        self.send_response(403 if broken else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *words: object) -> None:
        """Silent."""


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, with a token for it."""
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def factored(llama_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "nf4"
    lord_tune.decompose(llama_dir, out, method="svd", backbone="nf4", rank=4)
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_decomposition_and_an_export_arrive_whole(hub, llama_dir, factored, tmp_path, capsys):
    lord_tune.decompose(llama_dir, tmp_path / "lord", method="svd", rank=4, push_to_hub=REPO)
    assert hub.held == files_of(tmp_path / "lord") | {".gitattributes": b""}
    assert "visibility" not in hub.created[0] and "private" not in hub.created[0]  # as the organization says
    assert f"uploaded {tmp_path / 'lord'} to {hub.url}/{REPO}" in capsys.readouterr().out
    hub.held, hub.private = {}, True
    lord_tune.export(factored, tmp_path / "dense", "dense", push_to_hub=REPO, private=True)
    assert hub.held == files_of(tmp_path / "dense") and hub.created[1]["visibility"] == "private"
    record = json.loads((tmp_path / "dense" / "export.json").read_text())
    assert REPO not in record["command"] and "private" not in record["command"]


def test_of_a_training_run_the_checkpoints_stay(hub, factored, rows_file, tmp_path, capsys):
    words = {"push_to_hub": "true", "hub_model_id": REPO, "hub_private_repo": "true", "hub_strategy": "end"}
    hub.private = True
    given = {"model_name_or_path": factored, "dataset_name": rows_file, "output_dir": tmp_path / "sft"}
    lord_tune.train(**given, max_steps=1, max_length=32, report_to="none", **words)
    written = files_of(tmp_path / "sft")
    checkpoints = {name for name in written if name.startswith("checkpoint-")}
    assert checkpoints and set(hub.held) == set(written) - checkpoints | {".gitattributes"}
    assert {"adapter_model.safetensors", "train_results.json", "README.md"} <= set(hub.held)
    assert hub.created[0]["visibility"] == "private"
    assert f"the adapter's base is the folder {factored}" in capsys.readouterr().err


def test_a_failed_upload_names_the_command_that_does_it_again(hub, factored, tmp_path):
    hub.broken = "/commit/"
    out = tmp_path / "with space"
    with pytest.raises(lord_tune.LordError, match="the result is whole in .*. Upload it again with: ") as failed:
        lord_tune.export(factored, out, "dense", push_to_hub=REPO)
    assert shlex.split(str(failed.value).split("again with: ")[1]) == ["hf", "upload", REPO, str(out), "."]
    assert (out / "export.json").is_file()


@pytest.mark.parametrize(
    ("held", "private", "says"),
    [
        (["model.safetensors.index.json", "model-00009-of-00009.safetensors"], True, "holds 2 files of other weights"),
        ([], False, "exists and is public"),
    ],
)
def test_nothing_is_mixed_or_made_public(hub, factored, tmp_path, held, private, says):
    hub.held, hub.private = dict.fromkeys(held, b""), private
    before = dict(hub.held)
    with pytest.raises(lord_tune.LordError, match=says) as refused:
        lord_tune.export(factored, tmp_path / "dense", "dense", push_to_hub=REPO, private=True)
    assert hub.held == before and (tmp_path / "dense" / "export.json").is_file()
    assert f"hf upload {REPO} {tmp_path / 'dense'} . --private" in str(refused.value)


NEEDED: dict[str, Any] = {"model_name_or_path": "x", "dataset_name": "y", "output_dir": "runs/sft"}


def test_no_token_no_network_and_no_repository_are_refused_before_any_work(llama_dir, factored, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    def refused(says: str, repo: str = REPO) -> None:
        train = {"model_name_or_path": factored, "dataset_name": tmp_path / "none", "output_dir": tmp_path / "c"}
        calls = [
            partial(lord_tune.decompose, llama_dir, tmp_path / "a", method="svd", rank=4, push_to_hub=repo),
            partial(lord_tune.export, factored, tmp_path / "b", "dense", push_to_hub=repo),
        ]
        for call in calls:
            for more in ({}, {"dry_run": True}):
                with pytest.raises(lord_tune.UsageError, match=says):
                    call(**more)
        with pytest.raises(lord_tune.UsageError, match=says):
            lord_tune.train(**train, push_to_hub=True, hub_model_id=repo)
        assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused("log in with `hf auth login`")
    for wrong in ("a/b/c", "runs//nf4", "some body/x", "x.git"):
        refused("expected USER/NAME", wrong)


def test_a_dry_run_says_what_would_go_where(hub, llama_dir, factored, rows_file, tmp_path, capsys):
    lord_tune.decompose(llama_dir, tmp_path / "a", method="svd", rank=4, push_to_hub=REPO, dry_run=True)
    assert f"upload: {tmp_path / 'a'} to {hub.url}/{REPO} (public, if it is new" in capsys.readouterr().out
    given = {"model_name_or_path": factored, "dataset_name": rows_file, "output_dir": tmp_path / "sft"}
    lord_tune.train(**given, max_steps=1, push_to_hub=True, hub_private_repo=True, dry_run=True)
    assert f"sft without its checkpoints to {hub.url}/sft (private, if it is new)" in capsys.readouterr().out
    assert hub.created == []


def test_options_without_effect_are_refused():
    wrong = [
        ({"hub_model_id": REPO}, "hub_model_id has no effect without push_to_hub"),
        ({"push_to_hub": REPO}, "it is true or false and hub_model_id names the repository"),
        (
            {"push_to_hub": True, "hub_strategy": "every_save"},
            "hub_strategy has no effect: the adapter is",
        ),
        ({"push_to_hub": True, "hub_revision": "v1"}, "hub_revision has no effect"),
        ({"hub_token": "hf_secret"}, "would be written into the records"),
    ]
    for given, says in wrong:
        with pytest.raises(lord_tune.UsageError, match=says):
            TrainConfig.build(NEEDED | given)
    assert TrainConfig.build(NEEDED | {"push_to_hub": "false"}).upload() == (None, False)
    with pytest.raises(lord_tune.UsageError, match="`private` has no effect without `push_to_hub`"):
        DecomposeConfig.build({"model": "demo", "out": "o", "rank": 4, "method": "svd", "private": True})


def test_where_a_result_goes_is_no_part_of_what_it_is():
    """A stopped run continues with or without an upload, and its record does not upload again."""
    plain = {"model": "demo", "out": "o", "rank": 4, "method": "svd"}
    pushed = DecomposeConfig.build(plain | {"push_to_hub": REPO, "private": True})
    assert lasting(pushed) == lasting(DecomposeConfig.build(plain))
    assert command_line("decompose", pushed) == command_line("decompose", DecomposeConfig.build(plain))
    trained = TrainConfig.build(NEEDED | {"push_to_hub": True, "hub_model_id": REPO})
    assert "hub" not in command_line("train", trained) and set(trained.trainer_values()) == {"output_dir"}
    alone = {"model": "demo", "out": "o", "embeddings": "int4"}
    assert DecomposeConfig.build(alone | {"push_to_hub": REPO}).upload() == (REPO, False)
