"""The real runtimes, where they are installed: every form of five plans does in them what PyTorch does. Slow.

``make runtimes`` installs them, each in an environment of its own, and ``make test-all`` finds them there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from cuts import cut
from depthprune import runtimes
from depthprune.errors import OptionError
from depthprune.export import export
from depthprune.model import Model, wrap
from families import FAMILIES, configuration, shake

pytestmark = pytest.mark.slow

PLANS = {
    "blocks": ("1", "2"),
    "attention 0": ("0.self_attn", "2.self_attn"),
    "mixed": ("1", "2.mlp", "3.self_attn"),
    "mlps": ("0.mlp", "3.mlp"),
    "bias": ("1", "2.mlp"),
}
PAIRS = [("hf", "vllm"), ("nemotron-nas", "vllm"), ("nemotron-nas", "mlx"), ("zeroed", "mlx"), ("zeroed", "openvino")]
# Where a form of an uneven plan does not run, though the runtime reads the form: what it says.
NOT = {
    ("nemotron-nas", "vllm", "attention 0"): "too many values to unpack",
}
# Families with an attention gone that vLLM serves by the plug-in, as the documentation says.
SERVED = ("qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "smollm3", "starcoder2", "mistral")


def there(runtime: str) -> None:
    try:
        runtimes.python(runtime)
    except OptionError as error:
        pytest.skip(str(error))


@cache
def model_of(name: str) -> Model:
    """A tiny model with heads of a width that the runtimes compute with."""
    family = FAMILIES[name]
    config = configuration(family)
    config.head_dim, config.hidden_size, config.vocab_size = 32, 128, 96
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(transformers, family.network)(config)
    shake(net, 0, family.gain)
    return wrap(net.float().eval(), None, name)


def smaller(name: str, plan: str) -> Model:
    made = cut(model_of(name), *PLANS[plan], form="bias" if plan == "bias" else "")
    if plan == "bias":
        with torch.no_grad():
            for key, parameter in made.net.named_parameters():
                if key.endswith("bias"):
                    parameter.copy_(torch.linspace(-0.2, 0.2, len(parameter)))
    return made


def failures(folder: Path, runtime: str, model: Model) -> list[str]:
    reference = runtimes.adjusted(runtimes.refer(model), folder)
    proofs = runtimes.prove(folder, runtime, reference, trust_remote_code=True)
    return [f"{proof.name}: {proof.detail}" for proof in proofs if not proof.passed]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("form", "runtime"), PAIRS)
def test_a_llama(form: str, runtime: str, plan: str, tmp_path: Path) -> None:
    there(runtime)
    model = smaller("llama", plan)
    if form == "zeroed":
        model_of("llama").net.config.save_pretrained(tmp_path / "dense")
        form = f"zeroed:dense={tmp_path / 'dense'}"
    found = failures(export(model, tmp_path / "out", form), runtime, model)
    if reason := NOT.get((form, runtime, plan)):
        assert len(found) == 1 and reason in found[0]
    else:
        assert not found


@pytest.mark.parametrize("family", SERVED)
def test_families_that_the_plug_in_serves(family: str, tmp_path: Path) -> None:
    there("vllm")
    model = smaller(family, "attention 0")
    assert not failures(export(model, tmp_path / "out"), "vllm", model)


def test_a_family_that_the_plug_in_would_get_wrong_is_refused(tmp_path: Path) -> None:
    """Granite scales its logits, and vLLM's Transformers backend does not know of it."""
    there("vllm")
    model = smaller("granite", "attention 0")
    [found] = failures(export(model, tmp_path / "out"), "vllm", model)
    assert found.startswith("runs in vllm: ") and "torch.Size([0])" in found


def test_vllm_without_the_plug_in_refuses_an_uneven_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And runs DeciLM all the same, by the configuration file in the folder."""
    there("vllm")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    model = smaller("llama", "mixed")
    [found] = failures(export(model, tmp_path / "out"), "vllm", model)
    assert found.startswith("runs in vllm: ") and "does not dispatch through" in found
    reference = asdict(runtimes.refer(model)) | {"trust_remote_code": False}
    assert "['DepthpruneForCausalLM'] are not supported" in runtimes.ask(tmp_path / "out", "vllm", reference)["error"]
    assert not failures(export(model, tmp_path / "deci", "nemotron-nas"), "vllm", model)


def test_a_runtime_that_computes_something_else_is_found_out(tmp_path: Path) -> None:
    """The twin: the configuration says that another block has no MLP."""
    there("mlx")
    model = smaller("llama", "mlps")
    folder = export(model, tmp_path / "out", "nemotron-nas")
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    assert failures(folder, "mlx", model)[0].startswith("log-probabilities (mlx)")


def test_stock_transformers_refuses_an_uneven_folder(subject: Callable[..., Model], tmp_path: Path) -> None:
    """In a process that has never heard of depthprune."""
    export(cut(subject("llama"), "1.self_attn"), tmp_path / "out")
    script = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode and "size mismatch" in done.stderr
