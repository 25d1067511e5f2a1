"""The engine against one forward per unit, and all one-pass metrics against a plain forward. Same run, interleaved.

python benchmarks/engine.py [MODEL TEXT] --out engine.json      a real model; by default the one of depthprune
python benchmarks/engine.py 8b --dtype bfloat16 --units block   a random Llama of the shape of an 8B model
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import depthprune
from depthprune import demo
from depthprune.data import Data, calibrate, digest
from depthprune.metrics.stream import stream_scores
from depthprune.model import Model, load, wrap
from depthprune.surgery import without
from depthprune.units import Unit
from depthprune.variants import losses


def random_llama(blocks: int = 32, hidden: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Model:
    """A Llama with random weights, by default of the shape of an 8B model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=8192,
    )
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        net = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return wrap(net.eval(), None, "random-8b")


@torch.no_grad()
def naive(model: Model, data: Data, rows: int) -> float:
    """The mean loss by plain forwards of the whole model, with cross-entropy over all logits of a batch in chunks."""
    total = 0.0
    for start in range(0, data.sequences, rows):
        tokens: Tensor = data.tokens[start : start + rows].to(model.device)
        logits = model.net(input_ids=tokens, use_cache=False).logits
        for row, ids in zip(logits, tokens, strict=True):
            total += torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:], reduction="sum").item()
    return total / data.predicted


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that some work takes, and its result."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(demo.unpack()))
    parser.add_argument("text", nargs="?", default=str(demo.CALIBRATION))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--units", default="any")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="sequences of one plain forward")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", default="engine.json")
    arguments = parser.parse_args()
    if arguments.model == "8b":
        model = random_llama()
        tokens = torch.randint(
            128256, (arguments.sequences, arguments.length), generator=torch.Generator().manual_seed(0)
        )
        mask = torch.ones_like(tokens, dtype=torch.bool)
        data = Data(tokens, mask, "random", digest(tokens, mask), 0, ())
    else:
        model = load(arguments.model, dtype=arguments.dtype)
        data = calibrate(arguments.text, model.tokenizer, sequences=arguments.sequences, length=arguments.length)
    variants: list[tuple[Unit, ...]] = [(unit,) for unit in model.layout.units(arguments.units)]
    naive(model, data.head(1), 1)
    losses(model, data.head(1), variants[:2])
    stream_scores(model, data.head(1))
    seconds: dict[str, list[float]] = {"engine": [], "naive": [], "forward": [], "one_pass": []}
    worst = 0.0
    for _ in range(arguments.repeats):
        spent, result = timed(lambda: losses(model, data, variants).mean())
        seconds["engine"].append(spent)

        def one_by_one() -> list[float]:
            found = []
            for units in variants:
                with without(model, units):
                    found.append(naive(model, data, arguments.rows))
            return found

        spent, plain = timed(one_by_one)
        seconds["naive"].append(spent)
        worst = max(worst, *(abs(float(a) - b) for a, b in zip(result, plain, strict=True)))
        seconds["forward"].append(timed(lambda: naive(model, data, arguments.rows))[0])
        seconds["one_pass"].append(timed(lambda: stream_scores(model, data))[0])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    report = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "depthprune": depthprune.__version__,
        "arguments": {
            key: Path(value).name if isinstance(value, str) else value for key, value in vars(arguments).items()
        },
        "variants": len(variants),
        "seconds": seconds,
        "engine_over_naive": middle["engine"] / middle["naive"],
        "one_pass_over_forward": middle["one_pass"] / middle["forward"],
        "largest_difference_nats": worst,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    print(json.dumps(report, indent=1))
    with open(arguments.out, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
