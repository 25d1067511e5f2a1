"""Lazy against exhaustive greedy: evaluations, calibration loss, test perplexity.

python benchmarks/lazy_greedy.py [MODEL CALIBRATION TEST] --out lazy_greedy.json

Without MODEL: the model and the texts that come with depthprune.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import depthprune
from depthprune import demo
from depthprune.data import Data, calibrate
from depthprune.model import Model, load
from depthprune.oracle import ModelOracle
from depthprune.planning import candidates, choose, settle
from depthprune.units import parse
from depthprune.variants import losses


def run(model: Model, data: Data, test: Data, budget: str, unit: str, select: str, dense: float) -> dict[str, Any]:
    """Select once, with a fresh oracle, and measure what was chosen on the test text."""
    amount, unit = settle(budget, unit, model.layout)
    units = amount.candidates(model.layout, candidates(model.layout, unit))
    oracle = ModelOracle(model, data, units=units)
    start = time.perf_counter()
    plan = choose(oracle, amount, units, unit=unit, select=select)
    seconds = time.perf_counter() - start
    gone = frozenset(plan.drop)
    perplexity = math.exp(losses(model, test, [gone]).mean()[0])
    return {
        "select": select,
        "unit": unit,
        "evaluations": oracle.evaluations,
        "seconds": round(seconds, 2),
        "calibration_loss": float(oracle.losses([gone]).mean()[0]),
        "test_perplexity": perplexity,
        "ratio": perplexity / dense,
        "fraction": plan.frees["fraction"],
        "drop": [str(u) for u in plan.drop],
    }


def short(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments, with files by their names alone."""
    return {key: Path(value).name if isinstance(value, str) else value for key, value in vars(arguments).items()}


def main() -> None:
    """Run all selectors on one model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(demo.unpack()))
    parser.add_argument("calibration", nargs="?", default=str(demo.CALIBRATION))
    parser.add_argument("test", nargs="?", default=str(demo.TEST))
    parser.add_argument("--drop", default="25%")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--test-sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--select", nargs="+", default=["greedy", "greedy:exact=true"])
    parser.add_argument("--unit", nargs="+", default=["any"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="lazy_greedy.json")
    arguments = parser.parse_args()
    model = load(arguments.model, dtype="float32")
    test = calibrate(
        arguments.test, model.tokenizer, sequences=arguments.test_sequences, length=arguments.length, shuffle=False
    )
    dense = math.exp(losses(model, test, [parse(())]).mean()[0])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"device": name, "depthprune": depthprune.__version__, "torch": torch.__version__}
    result |= {"arguments": short(arguments), "dense_test_perplexity": dense, "rows": []}
    print(f"{name}; dense test perplexity {dense:.3f}")
    for seed in arguments.seeds:
        data = calibrate(
            arguments.calibration, model.tokenizer, sequences=arguments.sequences, length=arguments.length, seed=seed
        )
        for unit in arguments.unit:
            for select in arguments.select:
                row = {"seed": seed} | run(model, data, test, arguments.drop, unit, select, dense)
                result["rows"].append(row)
                print(
                    f"seed {seed} {unit:9} {select:20} evaluations {row['evaluations']:4} {row['seconds']:7.1f} s"
                    f"  calibration {row['calibration_loss']:.4f}"
                    f"  test {row['test_perplexity']:.2f} ({row['ratio']:.3f}x)"
                    f"  freed {row['fraction']:.3f}  {' '.join(row['drop'])}",
                    flush=True,
                )
    with open(arguments.out, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
