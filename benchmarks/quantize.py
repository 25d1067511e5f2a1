"""Quantization: what it costs a dense model and pruned ones, and whether the order of the two matters.

python benchmarks/quantize.py MODEL CALIBRATION TEST --cuts benchmarks/2026-11-23-recover.json --out quantize.json

For the dense model and for each cut: the perplexity as it is and after each way of quantization, of the folder that was
written, loaded again; and that of the quantized dense model with the same units muted (quantized, then pruned).
``--vllm`` names a Python that has vLLM and depthprune, through which every folder is measured too. One environment
seldom has all libraries: ``--out`` keeps what it holds, and further runs add their ``--ways``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import depthprune as dp
from depthprune.data import Data, calibrate
from depthprune.export import hf
from depthprune.export.quantize import LLM_COMPRESSOR, WAYS, quantize
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.surgery import without
from depthprune.units import Unit, parse

CUTS = ("greedy blocks 25 %", "greedy any 25 %")
DENSE = "dense"
ALLOWED = 0.02  # what quantizing may cost a pruned model beyond what it costs the dense one


class Bench:
    """The model, the texts and the file of results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.dense = dp.load(arguments.model, dtype="float32", device=arguments.device)
        self.text = dp.windows(arguments.test, self.dense.tokenizer, window=arguments.length, limit=arguments.windows)
        rows = calibrate(
            arguments.calibration, self.dense.tokenizer, sequences=arguments.rows, length=arguments.row_length, seed=1
        )
        assert isinstance(rows, Data)
        self.rows = rows
        known = json.loads(Path(arguments.cuts).read_text(encoding="utf-8"))["runs"][0]["cuts"]
        self.cuts: dict[str, tuple[Unit, ...]] = {name: parse(known[name]["drop"]) for name in CUTS}
        self.path = Path(arguments.out)
        self.result: dict[str, Any] = {"runs": []}
        if self.path.is_file():
            self.result = json.loads(self.path.read_text(encoding="utf-8"))
        self.run: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {
                "depthprune": dp.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "command": " ".join(["python", "benchmarks/quantize.py", *(Path(word).name for word in sys.argv[1:])]),
            "text": {"digest": self.text.data.digest, "tokens": int(self.text.scored.sum())},
            "calibration": self.rows.describe(),
            "cuts": {name: [str(unit) for unit in units] for name, units in self.cuts.items()},
            "rows": [],
        }
        self.result["runs"].append(self.run)

    def measure(self, model: Model, /, **row: Any) -> float:
        """The loss of a model on the test text, kept as a row."""
        loss = dp.perplexity(model, self.text).loss
        self.run["rows"].append({**row, "perplexity": math.exp(loss), "loss": loss})
        self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        text = "  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print(f"{math.exp(loss):8.3f}  {text}", flush=True)
        return loss

    def by_vllm(self, folder: Path) -> float | None:
        """The loss of a folder in vLLM, on the same tokens; kept with the row before."""
        if self.arguments.vllm is None:
            return None
        tokens = self.text.data.tokens.tolist()
        assert int(self.text.scored.sum()) == sum(len(row) - 1 for row in tokens)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "request.json"
            file.write_text(json.dumps({"path": str(folder.absolute()), "windows": tokens, "dtype": "bfloat16"}))
            command = [self.arguments.vllm, str(Path(__file__).with_name("vllm_loss.py")), str(file)]
            done = subprocess.run(command, capture_output=True, text=True)
        row = self.run["rows"][-1]
        if done.returncode:
            row["vllm"] = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "failed")
            print(f"          vLLM: {row['vllm']}", flush=True)
            return None
        answer = json.loads(done.stdout.splitlines()[-1])
        row |= {"vllm": answer["version"], "vllm_perplexity": math.exp(answer["loss"])}
        print(f"{row['vllm_perplexity']:8.3f}  in vLLM", flush=True)
        return float(answer["loss"])

    def written(self, model: Model, name: str) -> float | None:
        """The loss of a model's unquantized folder in vLLM."""
        folder = Path(self.arguments.scratch) / name.replace(" ", "-").replace("%", "")
        shutil.rmtree(folder, ignore_errors=True)
        hf.write(model, folder)
        loss = self.by_vllm(folder)
        shutil.rmtree(folder)
        return loss

    def loaded(self, folder: Path, how: str) -> Any:
        """What transformers makes of a folder; it computes in float32 where the library can."""
        dtype: Any = torch.float32 if WAYS[how].library == LLM_COMPRESSOR else "auto"
        net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=self.arguments.device)
        return net.eval()

    def quantized(self, model: Model, name: str, how: str, dense: dict[str, float]) -> dict[str, float]:
        """Quantize a model, read the folder, measure it (the dense one also with the cuts muted); returns its costs."""
        folder = Path(self.arguments.scratch) / f"{name}-{how}".replace(" ", "-").replace("%", "")
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        quantize(model, folder, how, self.rows)
        seconds = time.perf_counter() - began
        record = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
        found = replace(model, net=self.loaded(folder, how))
        row: dict[str, Any] = {"model": name, "how": how, "order": "prune, quantize" if model.plan else ""}
        row |= {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")), "seconds": seconds}
        row |= {"group": record["group"], "logit_error": record["logit_error"], "library": record["made_by"]}
        cost = {"cost": math.exp(self.measure(found, **row) - self.plain[name])}
        inside = self.by_vllm(folder)
        if inside is not None and self.inside[name] is not None:
            cost["vllm_cost"] = math.exp(inside - self.inside[name])
        last = self.run["rows"][-1]
        last |= cost
        for key, value in dense.items():
            last |= {f"dense_{key}": value, f"{key}_within": key in cost and cost[key] <= value + ALLOWED}
        if name == DENSE:
            for cut, units in self.cuts.items():
                with without(found, units):
                    self.measure(found, model=cut, how=how, order="quantize, prune")
        shutil.rmtree(folder)
        return cost

    def all(self) -> None:
        """Every row: the dense model first, whose costs are the measure of the others."""
        models = {DENSE: self.dense}
        for name, units in self.cuts.items():
            models[name] = dp.drop(self.dense, Plan(self.dense.reference, units))
        bytes_per = 2 if self.dense.dtype.itemsize == 2 else 4
        self.plain: dict[str, float] = {}
        self.inside: dict[str, float | None] = {}
        for name, model in models.items():
            size = model.parameters * bytes_per
            self.plain[name] = self.measure(model, model=name, how="", order="", bytes=size)
            self.inside[name] = self.written(model, name) if self.arguments.vllm else None
        for how in self.arguments.ways.split(","):
            cost: dict[str, float] = {}
            for name, model in models.items():
                found = self.quantized(model, name, how, cost)
                cost = found if name == DENSE else cost
        self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--cuts", required=True, help="the JSON of benchmarks/recover.py, whose plans are used")
    parser.add_argument("--ways", default="w4a16,gptq,awq,w8a8", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM and depthprune")
    parser.add_argument("--scratch", default="quantized")
    parser.add_argument("--out", required=True)
    Bench(parser.parse_args()).all()


if __name__ == "__main__":
    main()
