"""Does a folder load, run, and mean what its plan says? Proven in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from depthprune.errors import CheckpointError, DepthpruneError
from depthprune.export import hf, nemotron_nas, prove
from depthprune.export.diagnose import diagnose, inferred
from depthprune.export.proof import Proof as Proof
from depthprune.files import read_json
from depthprune.model import Model, auto_name
from depthprune.offload import all_on_disk, offloaded
from depthprune.plan import Plan
from depthprune.standin import planned
from depthprune.surgery import without

TOLERANCE = 1e-4  # of the largest logit, in float32
COARSE = 2e-2  # of the largest logit, in half precision
SHAPE = (2, 24)


@dataclass(frozen=True, eq=False)
class Expected:
    """What a folder has to reproduce: logits on a probe, and how exact the intact model's own cached decoding is."""

    tensors: Mapping[str, Tensor]  # tokens and logits, and for models with windows a long text and its late logits
    generation_gap: float
    stepping_gap: float
    parameters: int | None
    dtype: str = "float32"  # in which the reference was computed
    reference: str = "the dense model without those units"
    places: Mapping[str, Any] | None = None  # where a fresh process is to put the weights of a model too large for it


def expect(dense: Model, plan: Plan) -> Expected:
    """Measure the reference on the dense model with the plan's units muted."""
    with without(dense, plan.drop):
        tensors = _answers(dense)
    return _expected(dense, tensors, planned(dense, plan))


def expect_as_it_is(model: Model) -> Expected:
    """Measure the reference on a model as it is in memory: what its folder has to reproduce once weights changed."""
    return replace(_expected(model, _answers(model), model.parameters), reference="the model in memory")


@torch.no_grad()
def _answers(model: Model) -> dict[str, Tensor]:
    tokens, long = probe(model, SHAPE), longer(model)
    tensors = {"tokens": tokens.cpu(), "logits": model.net(tokens, use_cache=False).logits.float().cpu()}
    if long is not None:
        tensors |= {"long": long.cpu(), "late_logits": prove.late_logits(model.net, long)}
    return tensors


def _expected(model: Model, tensors: Mapping[str, Tensor], parameters: int) -> Expected:
    """The answers with how exact cached decoding of an intact model is."""
    tokens = probe(model, SHAPE)
    generated = prove.generation_gap(model.net, tokens) or 0.0
    stepped = prove.stepping_gap(model.net, tokens) or 0.0
    dtype = str(next(model.net.parameters()).dtype).removeprefix("torch.")
    return Expected(tensors, generated, stepped, parameters, dtype, places=_places(model))


def _places(model: Model) -> dict[str, Any] | None:
    """For a model whose weights wait elsewhere the device map with all blocks on disk, as this process has the memory.

    A smaller model has the same parts outside of the blocks, and no blocks that are not in the map.
    """
    return all_on_disk(model.net, model.layout.path, str(model.device)) if offloaded(model.net) else None


def probe(model: Model, shape: tuple[int, int]) -> Tensor:
    """Random tokens to compare logits on, no longer than half of the model's positions (generation takes the rest)."""
    shape = (shape[0], min(shape[1], (model.positions or 2 * shape[1]) // 2))
    return torch.randint(model.vocabulary, shape, generator=torch.Generator().manual_seed(3)).to(model.device)


def longer(model: Model) -> Tensor | None:
    """One text that is longer than the model's sliding windows, so that a window in the wrong block shows.

    None for models without windows, or with windows that reach over all positions.
    """
    text = model.net.config.get_text_config(decoder=True)
    sizes = [
        vars(text).get(name) for name in ("sliding_window", "attention_chunk_size", "local_attention", "window_size")
    ]
    window = max((size for size in sizes if isinstance(size, int)), default=0)
    if not window or (model.positions is not None and model.positions < window + prove.LATE):
        return None
    shape = (1, window + prove.LATE)
    return torch.randint(model.vocabulary, shape, generator=torch.Generator().manual_seed(4)).to(model.device)


def check(
    path: str | Path,
    against: Model | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[Proof]:
    """Prove a folder: names and shapes, logits against the dense model with the plan applied, cached generation.

    What its files say is wrong comes first (``diagnose.py``), so that folders of other tools can be looked at too; the
    plan of a folder without one is what its weights say. Plain folders are loaded by stock transformers without
    depthprune; uneven ones with ``trust_remote_code``, and again after ``import depthprune``; folders with code of
    their own run it only if ``trust_remote_code``. ``against`` is the dense model, or a pruned one with the same plan.
    Without it the logits are not compared, nor where weights were recovered since or are quantized.
    Raises ``CheckpointError`` where the folder is no model.
    """
    path = Path(path)
    found = diagnose(path, against)
    if not (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return found  # another tool's, and nothing can load it
    expected = None
    if against is not None:
        plan = plan_of(path) or inferred(path, against)
        if same_cut(against, plan):
            expected = fitted(expect_as_it_is(against), path)
        elif plan is not None:
            expected = fitted(expect(against, plan), path)
            if (path / "recovery.json").is_file():  # other weights, in the same structure
                expected = replace(expected, tensors={"tokens": expected.tensors["tokens"]})
        device = str(against.device)
    return found + check_many({path: expected}, device=device, trust_remote_code=trust_remote_code)[path]


def fitted(expected: Expected, path: Path) -> Expected:
    """What to expect of a folder that holds more parameters than the plan leaves, all zero, or quantized ones."""
    if quantized(path):
        return replace(expected, parameters=None, tensors={"tokens": expected.tensors["tokens"]})
    pads = _config(path).get("model_type") == "nemotron-nas"
    return replace(expected, parameters=None) if pads or zeroed(plan_of(path)) else expected


def plan_of(path: Path) -> Plan | None:
    """The plan that lies in a folder."""
    return Plan.load(path / "plan.json") if (path / "plan.json").is_file() else None


def zeroed(plan: Plan | None) -> bool:
    """Whether a plan is that of a folder in the dense shape."""
    return plan is not None and plan.why.get("form") == "zeroed"


def quantized(path: Path) -> bool:
    """Whether the weights in a folder are quantized, and so others by intention."""
    return (path / "config.json").is_file() and bool(_config(path).get("quantization_config"))


def same_cut(model: Model, plan: Plan | None) -> bool:
    """Whether a model is one that was pruned by this very plan already."""
    if model.plan is None or plan is None or plan.model.fingerprint == model.reference.fingerprint:
        return False
    return set(model.plan.drop) == set(plan.drop)


def check_many(
    folders: Mapping[Path, Expected | None], *, device: str = "cpu", trust_remote_code: bool = False
) -> dict[Path, list[Proof]]:
    """Prove several folders in one fresh process."""
    with tempfile.TemporaryDirectory(prefix="depthprune-") as scratch:
        request: list[dict[str, Any]] = []
        for number, (path, expected) in enumerate(folders.items()):
            config = _config(path)
            tensors = {"tokens": _tokens(config)} if expected is None else dict(expected.tensors)
            file = Path(scratch) / f"{number}.safetensors"
            try:
                save_file(tensors, file)
            except SafetensorError as error:
                raise DepthpruneError(f"cannot write a probe into {scratch}: {error}") from None
            for route in routes(config, trust_remote_code or own_code(path)):
                item = {"path": str(path), "auto": auto_name(config), "route": route, "probe": str(file)}
                dtype = expected.dtype if expected is not None else "float32" if device == "cpu" else _dtype(config)
                places = None if expected is None else expected.places
                request.append(item | {"device": device, "dtype": dtype, "places": places})
        # what teaches transformers about skips must come last: it cannot be unlearned
        request.sort(key=lambda item: item["route"] == "aware")
        results = _examine(request, Path(scratch))
    proofs: dict[Path, list[Proof]] = {path: [] for path in folders}
    for item, result in zip(request, results, strict=True):
        path = Path(item["path"])
        proofs[path] += _judge(item, result, folders[path])
    return proofs


def routes(config: Mapping[str, Any], trusted: bool = False) -> tuple[str, ...]:
    """How a folder is meant to be loaded: plainly, or (uneven ones) as remote code and with depthprune imported.

    Code that lies in a folder is run where it is trusted, and where depthprune wrote it.
    """
    text = config.get("text_config", config)
    if text.get("depthprune") or config.get("depthprune"):
        return ("remote", "aware") if trusted else ("aware",)
    return ("remote",) if trusted and config.get("auto_map") else ("plain",)


def own_code(path: Path) -> bool:
    """Whether all code that lies in a folder is, to the letter, what this version of depthprune writes."""
    files = sorted(path.rglob("*.py"))
    return bool(files) and all(
        (nemotron_nas.code() | hf.code(text)).get(file.name) == text
        for file, text in ((file, file.read_text("utf-8", "replace")) for file in files)
    )


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is no model: it has no config.json")
    config: dict[str, Any] = read_json(path / "config.json")
    return config


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _tokens(config: Mapping[str, Any]) -> Tensor:
    vocabulary = int(config.get("text_config", config).get("vocab_size", 100))
    return torch.randint(vocabulary, SHAPE, generator=torch.Generator().manual_seed(3))


def _examine(request: Sequence[Mapping[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    file = scratch / "request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    root = str(Path(prove.__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", str(prove.__file__), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(request):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DepthpruneError(f"the fresh process that reloads the model died (exit {done.returncode}): {last[:300]}")
    return lines


_HOW = {"plain": "plain transformers", "remote": "trust_remote_code", "aware": "import depthprune"}


def _judge(item: Mapping[str, Any], result: Mapping[str, Any], expected: Expected | None) -> list[Proof]:
    how = _HOW[item["route"]]
    if "error" in result and "stage" not in result:
        return [Proof(f"loads with {how}", False, str(result["error"]))]
    wrong = {key: result[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if result[key]}
    detail = "; ".join(f"{len(names)} {key.replace('_', ' ')}, such as {names[0]}" for key, names in wrong.items())
    proofs = [Proof(f"loads with {how}", not wrong, detail or "no missing, unexpected or mismatched keys")]
    if "error" in result:
        return [*proofs, Proof(f"{result['stage']} ({how})", False, str(result["error"]))]
    rate = TOLERANCE if item["dtype"] == "float32" else COARSE
    allowed = rate * max(result["scale"], 1.0)
    if expected is not None and expected.parameters is not None:
        same = result["parameters"] == expected.parameters
        proofs.append(
            Proof(f"parameters ({how})", same, f"{result['parameters']:,} of {expected.parameters:,} planned")
        )
    if "gap" in result:
        reference = expected.reference if expected is not None else "the reference"
        passed = result["gap"] <= allowed
        proofs.append(Proof(f"logits ({how})", passed, f"largest gap to {reference} {result['gap']:.2g}"))
    cached = [("cached generation", result["generation_gap"], expected.generation_gap if expected else 0.0)]
    if expected is not None:  # some intact models need positions in every step, so without one nothing can be said
        cached.append(("cached decoding, step by step", result["stepping_gap"], expected.stepping_gap))
    for what, gap, own in cached:
        if gap is not None:
            detail = f"largest gap to a full forward {gap:.2g}"
            proofs.append(Proof(f"{what} ({how})", gap <= max(allowed, 3 * own), detail))
    return proofs
