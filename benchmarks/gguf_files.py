"""GGUF files of pruned models in llama.cpp: equal to PyTorch, what quantizing costs them, and how fast they decode.

LLAMA_CPP=checkout DEPTHPRUNE_LLAMA=python python benchmarks/gguf_files.py MODEL CALIBRATION TEST --out gguf_files.json

Needs llama.cpp's converter and a Python with llama-cpp-python (docs/serving.md says how to get both). The plans are for
24 blocks; ``--plans FILE`` takes others, as ``{"name": ["4.mlp", …]}``. Three parts: ``equal`` (log-probabilities,
greedy text, layers of KV cache against PyTorch in float32), ``perplexity`` (through llama.cpp, of files of several
types) and ``speed`` (decoding one token at a time, the dense model and all plans in turn in one process).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import depthprune as dp
from depthprune import runtimes
from depthprune.data import calibrate
from depthprune.export import gguf, gguf_file
from depthprune.model import Model
from depthprune.plan import Plan, with_stand_ins
from depthprune.units import parse

PLANS = {
    "6 blocks": ["4", "11", "9", "6", "16", "10"],
    "12 attentions, that of block 0 too": [f"{i}.self_attn" for i in (4, 11, 9, 16, 2, 6, 1, 12, 20, 3, 23, 0)],
    "12 sublayers": [
        *("4.self_attn", "6.mlp", "4.mlp", "11.self_attn", "9.mlp", "9.self_attn", "15.mlp", "3.mlp"),
        *("16.self_attn", "11.mlp", "2.self_attn", "10.self_attn"),
    ],
    "6 MLPs": [f"{i}.mlp" for i in (4, 7, 9, 3, 11, 5)],
}
BIAS = "6 blocks, biases in their place"
DENSE = "dense"


def cuts(model: Model, arguments: argparse.Namespace) -> dict[str, Model]:
    """The dense model, the cut ones, and the first cut with a mean for each block that is gone."""
    plans = json.loads(Path(arguments.plans).read_text(encoding="utf-8")) if arguments.plans else PLANS
    found = {DENSE: model}
    for name, units in plans.items():
        plan = Plan(model.reference, model.layout.canonical(parse(units)))
        found[name] = dp.drop(model, plan)
        if name == "6 blocks":
            data = calibrate(arguments.calibration, model.tokenizer, sequences=arguments.sequences, length=512, seed=1)
            found[BIAS] = dp.recover(dp.drop(model, with_stand_ins(plan, "bias")), model, data, "mean")
    return found


def equal(models: dict[str, Model], files: dict[tuple[str, str], Path]) -> list[dict[str, Any]]:
    """What llama.cpp computes of the files in float32, against PyTorch."""
    rows = []
    for name, model in models.items():
        reference = runtimes.refer(model)
        answer = runtimes.ask(files[name, "f32"], "llama.cpp", vars(reference))
        gaps = [abs(a - b) for a, b in zip(answer["logprobs"], reference.logprobs, strict=True)]
        want = list(reference.text[len(reference.prompt) :])
        rows.append(
            {
                "plan": name,
                "parameters": model.parameters,
                "largest_gap": max(gaps),
                "tokens": len(gaps),
                "greedy_equal": sum(a == b for a, b in zip(answer["generated"], want, strict=True)),
                "greedy_of": len(want),
                "kv_layers": answer["kv_layers"],
                "attentions": reference.attentions,
                "kv_bytes_per_token_f32": answer["kv_bytes"],
                "proofs": {proof.name: proof.passed for proof in runtimes.judge(answer, "llama.cpp", reference)},
            }
        )
        print(rows[-1], flush=True)
    return rows


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Ask the script beside this one, in the Python that has llama.cpp."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        command = [runtimes.python("llama.cpp"), str(Path(__file__).with_name("gguf_runtime.py")), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def touched(path: Path) -> int:
    """The bytes of weights that decoding one token reads: all, but for a table of embeddings that is no head too."""
    tensors = gguf_file.read(path).tensors
    lookup = {"token_embd.weight"} if "output.weight" in tensors else set()
    return sum(tensor.data.nbytes for name, tensor in tensors.items() if name not in lookup)


def perplexity(
    files: dict[tuple[str, str], Path], windows: list[list[int]], asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """Perplexity of every file, and what each type costs a plan next to what it costs the dense model."""
    losses = {}
    for (name, kind), path in files.items():
        losses[name, kind] = run({"do": "loss", "file": str(path), "windows": windows, "threads": asked.threads})[
            "loss"
        ]
        print(f"{name}, {kind}: {math.exp(losses[name, kind]):.4f}", flush=True)
    rows = []
    for name, kind in files:
        dense_rise = losses[DENSE, kind] - losses[DENSE, "f32"]
        rise = losses[name, kind] - losses[name, "f32"]
        rows.append(
            {
                "plan": name,
                "type": kind,
                "bytes": files[name, kind].stat().st_size,
                "perplexity": math.exp(losses[name, kind]),
                "rise": math.exp(rise) - 1,
                "rise_of_dense": math.exp(dense_rise) - 1,
            }
        )
    return rows


def speed(files: dict[tuple[str, str], Path], asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Decoding on the processor with the files of every type."""
    rows = []
    for kind in asked.speed_types.split(","):
        chosen = {name: path for (name, its), path in files.items() if its == kind}
        rows += [row | {"type": kind} for row in decoding(chosen, asked)]
    return rows


def decoding(files: dict[str, Path], asked: argparse.Namespace, gpu_layers: int = 0) -> list[dict[str, Any]]:
    """Decoding, one token at a time: how much faster than the dense model, and what the bytes that are gone predict.

    By the clock, and by the processor's time, which other work on the machine moves less.
    """
    named = {name: str(path) for name, path in files.items()}
    settings = {"rounds": asked.rounds, "tokens": asked.tokens, "threads": asked.threads, "gpu_layers": gpu_layers}
    seconds = run({"do": "speed", "files": named, **settings})
    rows = []
    for name, path in files.items():
        predicted = touched(files[DENSE]) / touched(path)
        row: dict[str, Any] = {"plan": name, "bytes_per_token": touched(path), "predicted": predicted}
        for place, clock in enumerate(("clock", "processor")):
            own = [times[place] for times in seconds[name]]
            ratios = [dense[place] / mine for dense, mine in zip(seconds[DENSE], own, strict=True)]
            row[clock] = {
                "tokens_per_second": asked.tokens / statistics.median(own),
                "faster": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
                "of_predicted": statistics.median(ratios) / predicted,
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Write the files, measure, and write the figures after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", default="gguf_files.json")
    parser.add_argument("--plans")
    parser.add_argument("--files", help="a folder to keep the GGUF files in")
    parser.add_argument("--parts", default="equal,perplexity,speed")
    parser.add_argument("--types", default="f32,q8_0,q4_k_m,q4_0")
    parser.add_argument("--speed-types", default="f32,q8_0")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="of llama.cpp; 0: one for each core")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    model = dp.load(arguments.model, dtype="float32", device="cpu")
    text = calibrate(arguments.test, model.tokenizer, sequences=arguments.windows, length=512, seed=1)
    models = cuts(model, arguments)
    result: dict[str, Any] = {
        "device": f"cpu, {os.cpu_count()} cores",
        "versions": {
            "depthprune": dp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": " ".join(["python", "benchmarks/gguf_files.py", *(Path(word).name for word in sys.argv[1:])]),
        "model": model.reference.fingerprint,
        "text": {"digest": text.digest, "windows": arguments.windows, "tokens": arguments.windows * 511},
        "plans": {name: [str(u) for u in cut.plan.drop] if cut.plan else [] for name, cut in models.items()},
    }
    if Path(arguments.out).is_file():  # parts that were measured before
        result = json.loads(Path(arguments.out).read_text(encoding="utf-8")) | result
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(arguments.files or scratch)
        files, writing = {}, {}
        for name, cut in models.items():
            for kind in arguments.types.split(","):
                folder = home / f"{name.replace(' ', '-').replace(',', '')}-{kind}"
                began = time.perf_counter()
                if not folder.is_dir():
                    gguf.write(cut, folder, type=kind)
                    writing[f"{name}|{kind}"] = time.perf_counter() - began
                files[name, kind] = folder / gguf.NAME
        if writing:
            result["seconds_to_write"] = writing
        parts = {
            "equal": lambda: equal(models, files),
            "perplexity": lambda: perplexity(files, text.tokens.tolist(), arguments),
            "speed": lambda: speed(files, arguments),
        }
        for part in arguments.parts.split(","):
            result[part] = parts[part]()
            Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
