"""The runtimes that people deploy with, and the proof that a folder does in each of them what it is meant to do.

Each runtime has a script ``prove_NAME.py`` that imports nothing of depthprune and runs in the Python that has the
runtime: this one, or another (``--runtime vllm=PATH/TO/python``, or ``DEPTHPRUNE_VLLM=PATH/TO/python`` in the
environment), since their needs do not agree with each other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from depthprune.errors import CheckpointError, OptionError, unknown
from depthprune.export.check import (
    COARSE,
    TOLERANCE,
    Expected,
    Proof,
    check_many,
    fitted,
    plan_of,
    probe,
    quantized,
    same_cut,
    zeroed,
)
from depthprune.files import read_json
from depthprune.model import Model, auto_name, load
from depthprune.plan import Plan
from depthprune.surgery import without
from depthprune.units import parse

# The module that makes each one importable, and the extra that installs it.
RUNTIMES = {"vllm": "vllm", "llama.cpp": "llama_cpp", "mlx": "mlx_lm", "openvino": "openvino"}
INSTALL = {"vllm": "vllm", "llama.cpp": "llama-cpp", "mlx": "mlx", "openvino": "openvino"}
PROMPT, NEW = 24, 64
ROUNDED = 0.5  # nats that quantized weights may be off on the mean token


@dataclass(frozen=True)
class Reference:
    """What a runtime has to reproduce, computed by PyTorch.

    ``text`` is the prompt and its greedy continuation; ``logprobs`` are those of each token of the text but the first,
    given the ones before; ``margins`` those by which each greedy token wins; ``attentions`` counts the blocks that keep
    keys and values, None where that cannot be told.
    """

    prompt: tuple[int, ...]
    text: tuple[int, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    attentions: int | None
    dtype: str = "float32"


def refer(model: Model, plan: Plan | None = None) -> Reference:
    """Measure what a runtime has to reproduce: the model as it is, or the dense model without a plan's units."""
    drop = () if plan is None else plan.drop
    with without(model, drop):
        return _refer(model, drop)


@torch.no_grad()
def _refer(model: Model, drop: Sequence[Any]) -> Reference:
    tokens = probe(model, (1, PROMPT))
    new = min(NEW, (model.positions or PROMPT + NEW) - tokens.shape[1])
    prompt, margins = tokens.clone(), list[float]()
    for _ in range(new):
        last = model.net(tokens, use_cache=False).logits[0, -1].float().log_softmax(-1)
        best = last.topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        tokens = torch.cat([tokens, best.indices[:1].view(1, 1)], 1)
    every = model.net(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    logprobs = every.gather(-1, tokens[0, 1:, None])[:, 0].tolist()
    dtype = str(next(model.net.parameters()).dtype).removeprefix("torch.")
    given = (tuple(prompt[0].tolist()), tuple(tokens[0].tolist()), tuple(logprobs), tuple(margins))
    return Reference(*given, attentions(model, drop), dtype)


def attentions(model: Model, drop: Sequence[Any] = ()) -> int | None:
    """How many blocks keep keys and values once units are gone; None where other mixers keep states too."""
    layout, lost = model.layout, model.layout.cacheless(model.layout.gone(tuple(drop)))
    kinds = {sublayer.kind for block in layout.blocks for sublayer in block.sublayers}
    if "mixer" in kinds:
        return None
    return sum(block.kv_bytes_per_token > 0 and block.index not in lost for block in layout.blocks)


def python(runtime: str, named: str | None = None) -> str:
    """The Python that has a runtime: the one named, the environment's, or this one.

    Raises ``OptionError`` for an unknown runtime, or one that is not installed there.
    """
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, ["transformers", *RUNTIMES])
    variable = f"DEPTHPRUNE_{RUNTIMES[runtime].upper().removesuffix('_LM').removesuffix('_CPP')}"
    chosen = named or os.environ.get(variable) or sys.executable
    found = shutil.which(chosen)
    module = RUNTIMES[runtime]
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if found is None or subprocess.run([found, "-P", "-c", look], capture_output=True, check=False).returncode:
        there = "here" if chosen == sys.executable else f"for {chosen}"
        raise OptionError(
            f"{runtime} is not installed {there}: pip install 'depthprune[{INSTALL[runtime]}]', "
            f"or name a Python that has it: --runtime {runtime}=PATH"
        )
    return found


def readers(folder: str | Path) -> tuple[str, ...]:
    """The runtimes, ``transformers`` among them, that can read a folder of its form, whatever its family.

    Raises ``CheckpointError`` where the folder is no model.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" or (folder / "model.gguf").is_file():
        return ("llama.cpp",)
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.safetensors")):
            return ("transformers",)  # another tool's, which ``check`` has something to say of
        raise CheckpointError(f"{folder} is no model: it has no config.json and no file.gguf")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        return ("transformers",)  # which has something to say of that, too
    if not auto_name(config).endswith("ForCausalLM"):
        return ("transformers",)
    uneven = config.get("depthprune") or config.get("text_config", {}).get("depthprune")
    if uneven:
        return ("transformers", "vllm")
    plain = config.get("model_type") != "nemotron-nas"
    return ("transformers", "vllm", "mlx", "openvino") if plain else ("transformers", "vllm", "mlx")


def prove_written(folder: Path, model: Model, expected: Expected, say: Callable[[str], None]) -> list[Proof]:
    """Prove a folder that was just written: in transformers, in a fresh process, and in every runtime installed."""
    proofs = []
    if "transformers" in readers(folder):
        proofs = check_many({folder: fitted(expected, folder)}, device=str(model.device))[folder]
    return proofs + prove_installed(folder, model, say)


def prove_installed(folder: str | Path, model: Model, say: Callable[[str], None]) -> list[Proof]:
    """Prove a folder in every runtime that is installed and reads its form, against a model in memory.

    A runtime that does not take the model (another family, another platform) is told of with ``say``, not held against
    the folder, unless nothing else reads it; one that takes it and computes something else is.
    """
    proofs, reference = list[Proof](), None
    for runtime in [name for name in readers(folder) if name in RUNTIMES]:
        try:
            python(runtime)
        except OptionError:
            if readers(folder) == (runtime,):
                say(f"not proven: {runtime} reads this form, and is not installed here")
            continue
        reference = reference or refer(model)
        found = prove(folder, runtime, adjusted(reference, Path(folder)), trust_remote_code=True)
        if found[0].passed or readers(folder) == (runtime,):
            proofs += found
        else:
            say(f"{runtime} does not take it: {found[0].detail}")
    return proofs


def prove_asked(folder: str | Path, asked: Sequence[str], dense: Model | None, trust_remote_code: bool) -> list[Proof]:
    """Prove a folder in runtimes that were asked for by name, as ``vllm`` or ``vllm=PATH/TO/python``.

    The reference is the dense model without the units of the folder's plan, or, where ``dense`` has the same plan, the
    pruned model as it is; where weights were recovered, stand-ins filled, or no model is given, the folder itself as
    PyTorch runs it.
    Raises ``OptionError`` for a runtime that is unknown or not installed, or where there is nothing to compare with.
    """
    folder = Path(folder)
    parted = asked_for(folder, asked)
    reference = adjusted(_reference(folder, dense, trust_remote_code), folder)
    trust = trust_remote_code
    return [
        proof
        for runtime, named in parted
        for proof in prove(folder, runtime, reference, named or None, trust_remote_code=trust)
    ]


def asked_for(folder: Path, asked: Sequence[str]) -> list[tuple[str, str]]:
    """Runtimes and the Pythons that have them, as asked for; refuses, as ``prove_asked`` does, what cannot be run."""
    parted = [(runtime, named) for runtime, _, named in (text.partition("=") for text in asked)]
    for runtime, named in parted:
        python(runtime, named or None)
        if runtime not in readers(folder):
            raise OptionError(f"{runtime} does not read {folder}: {_forms(runtime)}")
    return parted


def _forms(runtime: str) -> str:
    can = {
        "llama.cpp": "it reads --form gguf",
        "mlx": "it reads --form nemotron-nas and whole-block plans",
        "openvino": "it reads whole-block plans and --form zeroed",
    }
    return can.get(runtime, "it reads --form hf and nemotron-nas of decoders")


def _reference(folder: Path, dense: Model | None, trust_remote_code: bool) -> Reference:
    home = folder.parent if folder.is_file() else folder
    plan = plan_of(home)
    changed = (plan is not None and plan.stand_in) or (home / "recovery.json").is_file()
    if dense is not None and same_cut(dense, plan):
        reference = refer(dense)
    elif dense is not None and plan is not None and not changed:
        reference = refer(dense, plan)
    elif "transformers" in readers(folder):
        given: dict[str, Any] = {"device": "cpu", "dtype": "float32", "trust_remote_code": trust_remote_code}
        reference = refer(load(folder, **given, dequantize=False))
    else:
        raise OptionError(
            f"nothing to compare {folder} with: give --against FOLDER, the pruned folder that it was made from"
            + ("" if changed else ", or the dense model")
        )
    return replace(reference, dtype="quantized") if quantized(home) else reference


def adjusted(reference: Reference, folder: Path) -> Reference:
    """The reference without the count of attentions where a form keeps some of them that the plan drops."""
    plan = plan_of(folder.parent if folder.is_file() else folder)
    held = plan is not None and any(parse([name])[0].block == 0 for name in plan.stand_in)
    parts = plan is not None and any(unit.block == 0 and unit.sublayer for unit in plan.drop)
    stub = parts and _first_attention(folder)
    kept = zeroed(plan) or stub or (held and "llama.cpp" in readers(folder))
    return replace(reference, attentions=None) if kept else reference


def _first_attention(folder: Path) -> bool:
    """Whether a folder of DeciLM has an attention in its first block."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    entries = config.get("block_configs") or [{}]
    return entries[0].get("attention", {}).get("no_op") is False


def prove(
    path: str | Path, runtime: str, reference: Reference, named: str | None = None, *, trust_remote_code: bool = False
) -> list[Proof]:
    """Run a folder in a runtime: the same log-probabilities, the same greedy text, and as many layers in the KV cache.

    Raises ``OptionError`` where the runtime is not installed.
    """
    answer = ask(path, runtime, asdict(reference) | {"trust_remote_code": trust_remote_code}, named)
    return judge(answer, runtime, reference)


def ask(path: str | Path, runtime: str, request: Mapping[str, Any], named: str | None = None) -> dict[str, Any]:
    """The answer of a runtime, in a process of its own, to a request (see its script); ``error`` where it fails."""
    command = [python(runtime, named), "-P", str(Path(__file__).parent / f"prove_{RUNTIMES[runtime]}.py")]
    with tempfile.TemporaryDirectory(prefix="depthprune-") as scratch:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps({**request, "path": str(Path(path).absolute())}), encoding="utf-8")
        fresh = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = subprocess.run(
            [*command, str(file)], env={**os.environ, **fresh}, capture_output=True, text=True, check=False
        )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"depthprune"'):
            answer: dict[str, Any] = json.loads(line)["depthprune"]
            return answer
    last = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
    return {"error": f"it died (exit {done.returncode}): {last[-1][:300]}"}


def judge(answer: Mapping[str, Any], runtime: str, reference: Reference) -> list[Proof]:
    """Compare a runtime's answer with the reference."""
    if "error" in answer:
        return [Proof(f"runs in {runtime}", False, str(answer["error"]))]
    name = str(answer.get("version") or runtime)
    proofs = [Proof(f"runs in {runtime}", True, name)]
    dtype = reference.dtype if reference.dtype == "quantized" else answer.get("dtype", reference.dtype)
    gaps = [abs(a - b) for a, b in zip(answer["logprobs"], reference.logprobs, strict=True)]
    if dtype == "quantized":
        return [*proofs, *_coarse(gaps, answer, runtime, reference)]
    tolerance = TOLERANCE if dtype == "float32" else COARSE
    allowed = tolerance * max(1.0, *(-value for value in reference.logprobs)) if tolerance == COARSE else tolerance
    worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap) else gap)
    detail = f"largest gap {worst:.2g} nats over {len(gaps)} tokens"
    proofs.append(Proof(f"log-probabilities ({runtime})", worst <= allowed, detail))
    proofs.append(_greedy(answer["generated"], runtime, reference, 2 * allowed))
    return [*proofs, *_cache(answer, runtime, reference)]


def _coarse(gaps: Sequence[float], answer: Mapping[str, Any], runtime: str, reference: Reference) -> list[Proof]:
    """What can be asked of quantized weights: numbers near enough that only rounding can be behind their gaps.

    The text need not be the same: a greedy one parts at the first token that rounding decides.
    """
    mean = sum(gaps) / len(gaps)
    detail = f"mean gap {mean:.2g} nats over {len(gaps)} tokens, quantized"
    proofs = [Proof(f"log-probabilities ({runtime})", mean <= ROUNDED, detail)]
    return [*proofs, *_cache(answer, runtime, reference)]


def _cache(answer: Mapping[str, Any], runtime: str, reference: Reference) -> list[Proof]:
    """Whether as many layers keep keys and values as attentions are left, where both can be told."""
    if reference.attentions is None or answer.get("kv_layers") is None:
        return []
    kept = answer["kv_layers"]
    detail = f"{kept} layers keep keys and values, {reference.attentions} attentions are left"
    return [Proof(f"KV cache ({runtime})", kept == reference.attentions, detail)]


def _greedy(generated: Sequence[int], runtime: str, reference: Reference, tie: float) -> Proof:
    """Whether the greedy texts are equal, up to a token that wins by less than rounding."""
    want = reference.text[len(reference.prompt) :]
    equal = next((n for n, (a, b) in enumerate(zip(generated, want, strict=False)) if a != b), len(want))
    passed = len(generated) >= len(want) and (equal == len(want) or reference.margins[equal] <= tie)
    detail = f"{equal} of {len(want)} tokens equal"
    if passed and equal < len(want):
        detail += f", then a tie (won by {reference.margins[equal]:.1g} nats)"
    return Proof(f"greedy text ({runtime})", passed, detail)
