"""Decoding with a random Llama of the shape of an 8B model on one GPU: dense and pruned, in transformers and llama.cpp.

python benchmarks/decode_8b.py --parts write,llama.cpp,transformers --files DIR [DIR …] --out decode_8b.json

``write`` makes GGUF files in the folders, in turn (LLAMA_CPP names a checkout); ``llama.cpp`` decodes with them, one
token at a time, all files in turn in one process (DEPTHPRUNE_LLAMA names a Python that has llama-cpp-python, built for
the GPU); ``transformers`` is ``depthprune bench`` on the same models. Weights are random: speed only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from engine import random_llama
from gguf_files import DENSE, decoding

import depthprune as dp
from depthprune.export import gguf
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.units import parse


def plans(blocks: int) -> dict[str, tuple[str, ...]]:
    """A quarter of the blocks; half of the attentions, that of block 0 too; a quarter of all sublayers."""
    spread = [1 + round(k * (blocks - 3) / (blocks // 4 - 1)) for k in range(blocks // 4)]
    return {
        DENSE: (),
        f"{len(spread)} blocks": tuple(map(str, spread)),
        f"{blocks // 2} attentions, that of block 0 too": tuple(f"{k}.self_attn" for k in range(0, blocks, 2)),
        f"{2 * len(spread)} sublayers": tuple(f"{k}.{'mlp' if k % 2 else 'self_attn'}" for k in range(2 * len(spread))),
    }


def cuts(dense: Model) -> dict[str, Model]:
    """The model and the smaller ones."""
    return {
        name: dp.drop(dense, Plan(dense.reference, parse(units))) if units else dense
        for name, units in plans(len(dense.layout.blocks)).items()
    }


def folders(homes: list[str], names: Mapping[str, Any]) -> dict[str, Path]:
    """A folder for each model, in one home after the other: together they need much room."""
    return {name: Path(homes[k % len(homes)]) / f"decode-8b-{k}" for k, name in enumerate(names)}


def main() -> None:
    """Write, measure, and write the JSON after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="write,llama.cpp,transformers")
    parser.add_argument("--files", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--gpu-layers", type=int, default=999)
    parser.add_argument("--out", default="decode_8b.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    where = folders(arguments.files, plans(arguments.blocks))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {
            "depthprune": dp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": " ".join(["python", "benchmarks/decode_8b.py", *(Path(word).name for word in sys.argv[1:])]),
        "plans": {name: list(units) for name, units in plans(arguments.blocks).items()},
    }
    if Path(arguments.out).is_file():
        result = json.loads(Path(arguments.out).read_text(encoding="utf-8")) | result
    for part in arguments.parts.split(","):
        if part == "llama.cpp":
            files = {name: folder / gguf.NAME for name, folder in where.items() if folder.is_dir()}
            result[part] = decoding(files, arguments, gpu_layers=arguments.gpu_layers)
        else:
            models = cuts(random_llama(arguments.blocks, arguments.hidden, torch.float16))
            if part == "write":
                result[part] = {}
                for name, model in models.items():
                    began = time.perf_counter()
                    gguf.write(model, where[name], type="f16")
                    result[part][name] = time.perf_counter() - began
                    print(f"{name}: written in {result[part][name]:.0f} s", flush=True)
            else:
                result[part] = dp.bench({name: model.net for name, model in models.items()}, new=64)
                for entry in result[part]["models"]:
                    print(entry, flush=True)
            del models
            torch.cuda.empty_cache()
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
