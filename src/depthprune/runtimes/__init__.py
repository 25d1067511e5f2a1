"""The runtimes that people deploy with, and the proof that a folder does in each of them what it is meant to do.

Each runtime has a script ``prove_NAME.py`` that imports nothing of depthprune and runs in the Python that has the
runtime: this one, or another (``--runtime vllm=PATH/TO/python``, or ``DEPTHPRUNE_VLLM=PATH/TO/python`` in the
environment), since their needs do not agree with each other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from depthprune.errors import OptionError, unknown
from depthprune.export.check import COARSE, TOLERANCE, Proof, probe
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.surgery import without

RUNTIMES = {"vllm": "vllm", "llama.cpp": "llama_cpp", "mlx": "mlx_lm"}  # the module that makes each one importable
INSTALL = {"vllm": "vllm", "llama.cpp": "llama-cpp", "mlx": "mlx"}  # the extra that installs it
PROMPT, NEW = 24, 64


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
    if found is None or subprocess.run([found, "-c", look], capture_output=True, check=False).returncode:
        there = "here" if chosen == sys.executable else f"for {chosen}"
        raise OptionError(
            f"{runtime} is not installed {there}: pip install 'depthprune[{INSTALL[runtime]}]', "
            f"or name a Python that has it: --runtime {runtime}=PATH"
        )
    return found


def installed() -> list[str]:
    """The runtimes that can be run."""
    found = []
    for runtime in RUNTIMES:
        try:
            python(runtime)
        except OptionError:
            continue
        found.append(runtime)
    return found


def prove(path: str | Path, runtime: str, reference: Reference, named: str | None = None) -> list[Proof]:
    """Run a folder in a runtime: the same log-probabilities, the same greedy text, and as many layers in the KV cache.

    Raises ``OptionError`` where the runtime is not installed.
    """
    [answer] = ask([path], runtime, [reference], named)
    return judge(answer, runtime, reference)


def ask(
    paths: Sequence[str | Path], runtime: str, references: Sequence[Reference], named: str | None = None
) -> list[dict[str, Any]]:
    """The answers of a runtime for several folders; each is run in a process of its own."""
    command = [python(runtime, named), "-P", str(Path(__file__).parent / f"prove_{RUNTIMES[runtime]}.py")]
    answers = []
    for path, reference in zip(paths, references, strict=True):
        with tempfile.TemporaryDirectory(prefix="depthprune-") as scratch:
            request = asdict(reference) | {"path": str(Path(path).absolute())}
            file = Path(scratch) / "request.json"
            file.write_text(json.dumps(request), encoding="utf-8")
            modules = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
            done = subprocess.run(
                [*command, str(file)], env={**os.environ, **modules}, capture_output=True, text=True, check=False
            )
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"depthprune"')]
        if lines:
            answers.append(json.loads(lines[-1])["depthprune"])
        else:
            last = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            answers.append({"error": f"it died (exit {done.returncode}): {last[-1][:300]}"})
    return answers


def judge(answer: Mapping[str, Any], runtime: str, reference: Reference) -> list[Proof]:
    """Compare a runtime's answer with the reference."""
    if "error" in answer:
        return [Proof(f"runs in {runtime}", False, str(answer["error"]))]
    name = str(answer.get("version") or runtime)
    proofs = [Proof(f"runs in {runtime}", True, name)]
    tolerance = TOLERANCE if answer.get("dtype", reference.dtype) == "float32" else COARSE
    gaps = [abs(a - b) for a, b in zip(answer["logprobs"], reference.logprobs, strict=True)]
    allowed = tolerance * max(1.0, *(-value for value in reference.logprobs)) if tolerance == COARSE else tolerance
    detail = f"largest gap {max(gaps):.2g} nats over {len(gaps)} tokens"
    proofs.append(Proof(f"log-probabilities ({runtime})", max(gaps) <= allowed, detail))
    proofs.append(_greedy(answer["generated"], runtime, reference, 2 * allowed))
    if reference.attentions is not None and answer.get("kv_layers") is not None:
        kept = answer["kv_layers"]
        detail = f"{kept} layers keep keys and values, {reference.attentions} attentions are left"
        proofs.append(Proof(f"KV cache ({runtime})", kept == reference.attentions, detail))
    return proofs


def _greedy(generated: Sequence[int], runtime: str, reference: Reference, tie: float) -> Proof:
    """Whether the greedy texts are equal, up to a token that wins by less than rounding."""
    want = reference.text[len(reference.prompt) :]
    equal = next((n for n, (a, b) in enumerate(zip(generated, want, strict=False)) if a != b), len(want))
    passed = len(generated) >= len(want) and (equal == len(want) or reference.margins[equal] <= tie)
    detail = f"{equal} of {len(want)} tokens equal"
    if passed and equal < len(want):
        detail += f", then a tie (won by {reference.margins[equal]:.1g} nats)"
    return Proof(f"greedy text ({runtime})", passed, detail)
