"""Recovery: what is won back from five cuts, by which way, on how much text, and whether it carries over.

python benchmarks/recover.py [MODEL CALIBRATION TEST] [--other CALIBRATION TEST] --out recover.json

One run makes every figure: the plans, the table of ways from the same cuts, the best pipelines at three budgets,
training after the re-fit, and text of another kind. Without MODEL: the model and the texts that come with depthprune,
with little text. ``--parts`` picks parts, and their order; ``--plans FILE`` takes cuts that were chosen before, as
``{"greedy any 25 %": ["4.mlp", …]}``; results are written after every row.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import depthprune as dp
from depthprune import demo
from depthprune.console import Console
from depthprune.data import Data, calibrate
from depthprune.evaluate import Windows
from depthprune.model import Model
from depthprune.recover.settings import count
from depthprune.recovering import Asked, recovered
from depthprune.units import parse

CUTS: dict[str, dict[str, Any]] = {
    "greedy blocks 25 %": {"unit": "block", "budget": "25%", "select": "greedy"},
    "greedy any 25 %": {"unit": "any", "budget": "25%"},
    "contiguous blocks 25 %": {"unit": "block", "budget": "25%", "metric": "cosine", "select": "contiguous"},
    "attention 50 %": {"unit": "attention", "budget": "{half} attention", "select": "greedy"},
    "mlp 25 %": {"unit": "mlp", "budget": "25%", "select": "greedy"},
    "greedy any 37.5 %": {"unit": "any", "budget": "37.5%"},
    "greedy any 50 %": {"unit": "any", "budget": "50%"},
}
TABLE = tuple(CUTS)[:5]
WAYS = ("refit", "linear", "scale", "bias", "lowrank:16")
LARGE = ("greedy blocks 25 %", "contiguous blocks 25 %", "greedy any 25 %", "greedy any 37.5 %", "greedy any 50 %")
TRAINED = ("greedy any 25 %", "greedy blocks 25 %")
TRAINING = {
    "distill": "distill:rate=3e-4,patience=0",
    "lora": "lora:rate=1e-3,rank=32,alpha=32,patience=0",
    "tail": "tail:rate=3e-4,patience=0",
}
PARTS = ("large", "training", "table", "domain", "longer")


class Bench:
    """The model, the texts and the file of results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.console = arguments, Console(quiet=True)
        self.model = dp.load(arguments.model, dtype="float32", device=arguments.device)
        tokenizer, length = self.model.tokenizer, arguments.length
        self.texts: dict[str, Windows] = {}
        for path in (arguments.test, *(arguments.other or ())[1:]):
            self.texts[Path(path).name] = dp.windows(path, tokenizer, window=length, limit=arguments.windows)
        self.dense = {name: dp.perplexity(self.model, text).loss for name, text in self.texts.items()}
        self.rows: dict[tuple[str, int], Data] = {}
        self.cuts: dict[str, Model] = {}
        self.plans: dict[str, list[str]] = {}
        if arguments.plans:
            self.plans = json.loads(Path(arguments.plans).read_text(encoding="utf-8"))
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {
                "depthprune": dp.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "command": " ".join(["python", "benchmarks/recover.py", *(Path(word).name for word in sys.argv[1:])]),
            "texts": {
                name: {"digest": text.data.digest, "tokens": int(text.scored.sum())}
                for name, text in self.texts.items()
            },
            "dense": self._perplexities(self.dense),
            "cuts": {},
            "rows": [],
        }
        print(
            self.result["device"], {name: round(value, 3) for name, value in self.result["dense"].items()}, flush=True
        )

    def _perplexities(self, losses: dict[str, float]) -> dict[str, float]:
        return {name: math.exp(loss) for name, loss in losses.items()}

    def save(self) -> None:
        """Write what there is."""
        Path(self.arguments.out).write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")

    def text(self, path: str, tokens: str) -> Data:
        """Rows of a text to fit on."""
        number = max(2, count(tokens) // self.arguments.length)
        if (path, number) not in self.rows:
            options: dict[str, Any] = {"sequences": number, "length": self.arguments.length, "seed": 1}
            made = calibrate(path, self.model.tokenizer, **options)
            assert isinstance(made, Data)
            self.rows[path, number] = made
        return self.rows[path, number]

    def cut(self, name: str) -> Model:
        """The model without the units of a plan that is chosen on 64 rows."""
        if name not in self.cuts:
            known = self.plans.get(name)
            asked = dict(CUTS[name])
            budget = asked.pop("budget").format(half=len(self.model.layout.units("attention")) // 2)
            began = time.perf_counter()
            if known is None:
                options: dict[str, Any] = {"length": self.arguments.length, "seed": 1}
                rows = calibrate(
                    self.arguments.calibration, self.model.tokenizer, sequences=self.arguments.sequences, **options
                )
                plan = dp.select(self.model, budget, data=rows, **asked)
            else:
                units = parse(known)
                frees = {"fraction": self.model.layout.freed(units) / self.model.layout.parameters}
                plan = dp.Plan(self.model.reference, units, frees=frees)
            seconds = time.perf_counter() - began
            self.cuts[name] = dp.drop(self.model, plan)
            losses = {text: dp.perplexity(self.cuts[name], windows).loss for text, windows in self.texts.items()}
            self.result["cuts"][name] = {
                "drop": [str(unit) for unit in plan.drop],
                "fraction": plan.frees["fraction"],
                "seconds": round(seconds, 1),
                "evaluations": plan.why.get("evaluations"),
                "perplexity": self._perplexities(losses),
                "ratio": {text: math.exp(loss - self.dense[text]) for text, loss in losses.items()},
            }
            print(f"{name:24} cut {self.ratios(losses)} {seconds:6.1f} s  {' '.join(map(str, plan.drop))}", flush=True)
        return self.cuts[name]

    def ratios(self, losses: dict[str, float]) -> str:
        """Times the dense perplexity, text by text."""
        return "  ".join(f"{math.exp(loss - self.dense[name]):.4f}x" for name, loss in losses.items())

    def recover(self, part: str, name: str, start: Model, how: str, path: str, tokens: str) -> Model:
        """Recover once, measure, and keep the row."""
        data = self.text(path, tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        made = recovered(start, self.model, data, how, Asked(path, seed=0), self.console)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        assert made.recovery is not None
        stage = made.recovery["stages"][-1]
        losses = {text: dp.perplexity(made, windows).loss for text, windows in self.texts.items()}
        row = {
            "part": part,
            "cut": name,
            "how": how,
            "text": Path(path).name,
            "tokens": stage["tokens"],
            "seconds": round(seconds, 2),
            "perplexity": self._perplexities(losses),
            "ratio": {text: math.exp(loss - self.dense[text]) for text, loss in losses.items()},
            "held_loss": made.recovery["held_loss"],
            "undone": "undone" in stage,
            "gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
        }
        self.result["rows"].append(row)
        self.save()
        mark = " (undone)" if row["undone"] else ""
        print(
            f"{name:24} {how:40} {stage['tokens']:>9,} tokens {seconds:7.1f} s  {self.ratios(losses)}{mark}", flush=True
        )
        return made


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("calibration", nargs="?", default=str(demo.CALIBRATION))
    parser.add_argument("test", nargs="?", default=str(demo.TEST))
    parser.add_argument("--other", nargs=2, metavar=("CALIBRATION", "TEST"))
    parser.add_argument("--tokens", default=None, help="of text for the figures with much of it")
    parser.add_argument("--table-tokens", default=None, help="of text for the table of ways")
    parser.add_argument("--training", nargs="*", default=None, help="tokens to train on")
    parser.add_argument("--cuts", nargs="+", default=list(LARGE), help="cuts of the part `large`")
    parser.add_argument("--distill", default=TRAINING["distill"], help="how the part `training` distills")
    parser.add_argument("--plans", help="cuts that were chosen before, as JSON")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device")
    parser.add_argument("--out", default="recover.json")
    arguments = parser.parse_args()
    TRAINING["distill"] = arguments.distill
    small = arguments.model is None
    arguments.model = arguments.model or str(demo.unpack())
    arguments.tokens = arguments.tokens or ("32k" if small else "1M")
    arguments.table_tokens = arguments.table_tokens or ("16k" if small else "512k")
    arguments.training = arguments.training if arguments.training is not None else (["32k"] if small else ["2M", "8M"])
    bench = Bench(arguments)
    started: dict[str, Model] = {}
    for part in arguments.parts:
        {"large": large, "training": training, "table": table, "domain": domain, "longer": longer}[part](bench, started)
    bench.save()


def large(bench: Bench, started: dict[str, Model]) -> None:
    """The re-fit on much text."""
    for name in bench.arguments.cuts:
        started[name] = bench.recover(
            "large", name, bench.cut(name), "refit", bench.arguments.calibration, bench.arguments.tokens
        )


def training(bench: Bench, started: dict[str, Model]) -> None:
    """Training after the re-fit, each way on the same tokens: the first number of tokens that was asked for."""
    budgets = bench.arguments.training[:1]
    _train(bench, started, [(TRAINED[0], way, budget) for budget in budgets for way in TRAINING])
    _train(bench, started, [(TRAINED[1], "distill", budget) for budget in budgets])


def longer(bench: Bench, started: dict[str, Model]) -> None:
    """The same on more tokens."""
    budgets = bench.arguments.training[1:]
    _train(bench, started, [(name, "distill", budget) for budget in budgets for name in TRAINED])
    _train(bench, started, [(TRAINED[0], way, budget) for budget in budgets for way in ("lora", "tail")])


def _train(bench: Bench, started: dict[str, Model], jobs: Sequence[tuple[str, str, str]]) -> None:
    path, tokens = bench.arguments.calibration, bench.arguments.tokens
    for name, way, budget in jobs:
        if name not in started:
            started[name] = bench.recover("large", name, bench.cut(name), "refit", path, tokens)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            bench.recover("training", name, started[name], f"{TRAINING[way]},tokens={budget}", path, tokens)
        finally:
            torch.set_float32_matmul_precision(before)


def table(bench: Bench, started: dict[str, Model]) -> None:
    """Five ways without training from the same five cuts."""
    for name in TABLE:
        for how in WAYS:
            bench.recover(
                "table", name, bench.cut(name), how, bench.arguments.calibration, bench.arguments.table_tokens
            )


def domain(bench: Bench, started: dict[str, Model]) -> None:
    """Fitted on one kind of text, tested on another, and the reverse."""
    if bench.arguments.other is None:
        return
    for path in (bench.arguments.calibration, bench.arguments.other[0]):
        name = TRAINED[0]
        bench.recover("domain", name, bench.cut(name), "refit", path, bench.arguments.table_tokens)


if __name__ == "__main__":
    main()
