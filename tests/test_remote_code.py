"""Programs that do not import lord_tune load factored checkpoints with trust_remote_code, and fail without."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import lord_tune
from lord_tune.integrations.models import load_dense_or_factored
from lord_tune.integrations.remote_code import add_remote_code, remove_remote_code
from lord_tune.integrations.transformers_quantizer import detach
from lord_tune.layers import densify


def test_entries_of_the_original_for_other_classes_stay(tmp_path):
    original = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M", "AutoTokenizer": "t.T"}
    config = SimpleNamespace(auto_map=original)
    add_remote_code(config, tmp_path)
    assert config.auto_map == {"AutoConfig": "configuration_lord_tune.LordTuneConfig", "AutoTokenizer": "t.T"}
    config.auto_map["AutoConfig"] = "someone/model--" + config.auto_map["AutoConfig"]  # as read from the Hub
    remove_remote_code(config)
    assert config.auto_map == {"AutoTokenizer": "t.T"}
    untouched = SimpleNamespace(auto_map=dict(original))
    remove_remote_code(untouched)
    assert untouched.auto_map == original


def test_a_model_that_is_saved_again_keeps_the_entry_and_a_dense_one_has_none(llama_dir, tmp_path):
    lord_tune.decompose(str(llama_dir), str(tmp_path / "out"), method="svd", rank=4, backbone="int8")
    model = load_dense_or_factored(str(tmp_path / "out"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    for name, saved in (("again", model), ("twin", twin)):
        saved.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert settings["auto_map"] == {"AutoConfig": "configuration_lord_tune.LordTuneConfig"}
        assert (tmp_path / name / "configuration_lord_tune.py").is_file() and not hasattr(saved.config, "auto_map")
    norms = [load_file(tmp_path / name / "model.safetensors")["model.norm.weight"] for name in ("again", "twin")]
    assert torch.equal(norms[1], 2 * norms[0])
    densify(model)
    detach(model)
    model.save_pretrained(tmp_path / "dense")
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not (tmp_path / "dense" / "configuration_lord_tune.py").exists()


_LOADING = """
import json, os, sys, transformers
from trl.trainer.utils import create_model_from_path
causal, masked = sys.argv[1:]

def auto(kind, name, **options):
    return lambda: getattr(transformers, kind).from_pretrained(name, **options)

def without():
    sys.modules["lord_tune"] = None
    return auto("AutoModelForCausalLM", causal, trust_remote_code=True)()

trust = {"trust_remote_code": True}
CASES = {
    "config": auto("AutoConfig", causal, **trust),
    "model": auto("AutoModel", causal, **trust),
    "causal": auto("AutoModelForCausalLM", causal, **trust),
    "saved again": lambda: auto("AutoModelForCausalLM", causal, **trust)().save_pretrained(causal + "-again"),
    "loaded again": auto("AutoModelForCausalLM", causal + "-again", **trust),
    "masked": auto("AutoModelForMaskedLM", masked, **trust),
    "trl": lambda: create_model_from_path(causal, **trust),
    "not asked": auto("AutoModelForCausalLM", causal),
    "not trusted": auto("AutoModelForMaskedLM", masked, trust_remote_code=False),
    "not installed": without,
}
assert "lord_tune" not in sys.modules
for case, load in CASES.items():
    sys.stdout.flush()
    child = os.fork()
    if not child:  # each starts from a process that never saw lord_tune
        try:
            found = load()
            if found is None:
                os._exit(0)
            modules = found.modules() if hasattr(found, "modules") else ()
            layers = sum(type(module).__name__ == "FactoredLinear" for module in modules)
            said = [type(found).__name__, layers, "auto_map" in found.to_dict() if not layers else
                    "auto_map" in found.config.to_dict()]
        except Exception as error:
            said = [type(error).__name__, str(error)]
        print(json.dumps([case, said]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_programs_that_do_not_import_lord_tune_load_with_trust_remote_code(llama_dir, bert_dir, tmp_path):
    for source in (llama_dir, bert_dir):
        lord_tune.decompose(str(source), str(tmp_path / source.name), method="svd", rank=4, backbone="int8")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "code"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", _LOADING, str(tmp_path / "llama"), str(tmp_path / "bert")]
    run = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    said = dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))
    assert run.returncode == 0, run.stderr
    refused = {case: said.pop(case) for case in list(said) if case.startswith("not ")}
    assert said == {
        "config": ["LlamaConfig", 0, True],
        "model": ["LlamaModel", 21, False],
        "causal": ["LlamaForCausalLM", 21, False],
        "loaded again": ["LlamaForCausalLM", 21, False],
        "masked": ["BertForMaskedLM", 18, False],
        "trl": ["LlamaForCausalLM", 21, False],
    }
    assert refused["not installed"] == [
        "ImportError", "This checkpoint is factored, and only lord_tune can read it: pip install lord-tune",
    ]  # fmt: skip
    for case in ("not asked", "not trusted"):
        assert refused[case][0] == "RuntimeError" and "mismatched" in refused[case][1]
