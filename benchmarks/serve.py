"""Serving: five plans of one model in every form and every runtime that is named, and what the runtimes say.

python benchmarks/serve.py [MODEL] [--python vllm=PATH mlx=PATH llama.cpp=PATH] --out serve.json

Each folder is run in a process of its own: the same greedy 64 tokens, log-probabilities within 1e-4 nats of PyTorch in
float32, as many layers in the KV cache as attentions are left, and the time of a decoded token beside the dense
model's.
Without MODEL: the one that comes with depthprune. A runtime that is not named is looked for as ``check`` does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import depthprune as dp
from depthprune import demo, runtimes, standin
from depthprune.errors import DepthpruneError
from depthprune.export import check_many, expect_as_it_is
from depthprune.model import Model
from depthprune.plan import Plan, with_stand_ins
from depthprune.units import parse

FORMS = ("hf", "nemotron-nas", "gguf:type=f32", "zeroed")


def plans(model: Model) -> dict[str, tuple[str, ...]]:
    """Five plans, spread over the inner blocks: a quarter of the blocks, half of the attentions, and so on."""
    count = len(model.layout.blocks)
    inner = list(range(2, count - 1))
    spread = [inner[round(k * (len(inner) - 1) / (count // 4 - 1))] for k in range(count // 4)]
    half = [0, *(inner[round(k * (len(inner) - 1) / (count // 2 - 2))] for k in range(count // 2 - 1))]
    names = {sublayer.kind: sublayer.name for sublayer in model.layout.blocks[0].sublayers}
    attention, mlp = names["attention"], names["mlp"]
    mixed = [f"{index}.{attention if place % 2 else mlp}" for place, index in enumerate(half[1:])]
    return {
        "blocks": tuple(map(str, spread)),
        "attentions, 0 too": tuple(f"{index}.{attention}" for index in half),
        "mixed": (*mixed, f"{spread[0]}.{attention}", f"{spread[0]}.{mlp}")[-count // 2 :],
        "mlps": tuple(f"{index}.{mlp}" for index in spread),
        "bias stand-ins": tuple(map(str, spread)),
    }


def cut(model: Model, name: str, units: Sequence[str]) -> Model:
    """The model without some units; stand-ins are filled with noise, so that one that is lost shows."""
    plan = Plan(model.reference, tuple(dict.fromkeys(parse(units))))
    if name != "bias stand-ins":
        return dp.drop(model, plan)
    smaller = dp.drop(model, with_stand_ins(plan, "bias"))
    draw = torch.Generator().manual_seed(0)
    for parameter in standin.parameters(smaller):
        weight = smaller.net.get_parameter(parameter)
        with torch.no_grad():
            weight.copy_((0.05 * torch.randn(weight.shape, generator=draw)).to(model.dtype))  # as it is saved
    return smaller


def ran(
    folder: Path, runtime: str, reference: runtimes.Reference, arguments: argparse.Namespace, **options: str
) -> dict[str, Any]:
    """One folder in one runtime."""
    began = time.perf_counter()
    asked = asdict(reference) | {
        "trust_remote_code": True,
        "new": arguments.new,
        "repeats": arguments.repeats,
        "options": options,
    }
    answer = runtimes.ask(folder, runtime, asked, arguments.python.get(runtime))
    proofs = runtimes.judge(answer, runtime, reference)
    row: dict[str, Any] = {"passed": all(proof.passed for proof in proofs)}
    row |= {proof.name.partition(" (")[0]: proof.detail for proof in proofs}
    row |= {key: answer[key] for key in ("kv_layers", "kv_bytes", "seconds_per_token") if key in answer}
    if "logprobs" in answer:
        row["gap"] = max(abs(a - b) for a, b in zip(answer["logprobs"], reference.logprobs, strict=True))
    return row | {"attentions": reference.attentions, "wall": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Write, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--python", nargs="*", default=[], metavar="RUNTIME=PATH")
    parser.add_argument("--runtimes", nargs="+", default=list(runtimes.RUNTIMES), choices=list(runtimes.RUNTIMES))
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--plans", nargs="+", help="only these; dense is one")
    parser.add_argument("--new", type=int, default=128, help="tokens that are decoded for the time")
    parser.add_argument("--repeats", type=int, default=3, help="texts that are timed; the least counts")
    parser.add_argument("--out", default="serve.json")
    arguments = parser.parse_args()
    arguments.python = dict(text.split("=", 1) for text in arguments.python)
    model = dp.load(arguments.model or str(demo.unpack()), device="cpu", dtype="float32")
    known = [name for name in arguments.runtimes if _there(name, arguments.python.get(name))]
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/serve.py", *map(_short, sys.argv[1:])]),
        "versions": {
            "depthprune": dp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "plans": {name: list(units) for name, units in plans(model).items()},
        "rows": [],
    }
    scratch = Path(tempfile.mkdtemp())
    every: Mapping[str, Model] = {"dense": model} | {
        name: cut(model, name, units) for name, units in plans(model).items()
    }
    try:
        for name, smaller in every.items():
            if arguments.plans and name not in arguments.plans:
                continue
            reference = runtimes.refer(smaller)
            for form in arguments.forms:
                row: dict[str, Any] = {"plan": name, "form": form}
                folder = scratch / f"{name}-{form}".replace(":", "-")
                try:
                    dp.export(smaller, folder, form)
                except DepthpruneError as error:
                    _keep(result, row | {"refused": str(error)}, arguments.out)
                    continue
                readers = runtimes.readers(folder)
                if "transformers" in readers:
                    expected = expect_as_it_is(smaller)
                    proofs = check_many({folder: expected})[folder]
                    failed = [f"{proof.name}: {proof.detail}" for proof in proofs if not proof.passed]
                    failed = [line for line in failed if not line.startswith("parameters") or form == "hf"]
                    found = {"runtime": "transformers", "passed": not failed, "failed": failed}
                    _keep(result, row | found, arguments.out)
                for runtime in known:
                    if runtime in readers:
                        adjusted = runtimes.adjusted(reference, folder)
                        found = ran(folder, runtime, adjusted, arguments)
                        _keep(result, row | {"runtime": runtime} | found, arguments.out)
                        if (name, form, runtime) == ("dense", "hf", "vllm"):  # what vLLM runs uneven folders by
                            found = ran(folder, runtime, adjusted, arguments, model_impl="transformers")
                            _keep(result, row | {"runtime": "vllm, Transformers backend"} | found, arguments.out)
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _short(word: str) -> str:
    name, sign, path = word.partition("=")
    return f"{name}=…" if sign and "/" in path else Path(word).name


def _keep(result: dict[str, Any], row: dict[str, Any], out: str) -> None:
    result["rows"].append(row)
    Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in row.items() if key not in ("wall",)}, flush=True)


def _there(runtime: str, named: str | None) -> bool:
    try:
        runtimes.python(runtime, named)
    except DepthpruneError as error:
        print(f"left out: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
