"""Every family, plan and form: proven by the runtime that reads the form, or refused with a reason. Slow.

``DEPTHPRUNE_MATRIX=table.json`` keeps the table. Files for llama.cpp need ``LLAMA_CPP`` and ``DEPTHPRUNE_LLAMA``.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from cuts import cut
from depthprune import runtimes
from depthprune.errors import DepthpruneError, OptionError
from depthprune.export import check_many, expect, export
from depthprune.export.check import fitted
from depthprune.export.hf import stock
from depthprune.model import Model, wrap
from depthprune.plan import Plan
from depthprune.units import parse
from families import tiny

pytestmark = pytest.mark.slow

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite", "starcoder2",
    "gpt2", "gpt_neox", "opt", "mixtral", "cohere",
)  # fmt: skip
FORMS = ("hf", "nemotron-nas", "zeroed", "gguf")


def plans(model: Model) -> dict[str, tuple[str, ...]]:
    """Five plans: blocks, attentions, attentions with that of block 0, MLPs, and some of each."""
    names = {sublayer.kind: sublayer.name for sublayer in model.layout.blocks[0].sublayers}
    attention, mlp = names.get("attention", "attention"), names.get("mlp", "mlp")
    return {
        "blocks": ("1", "2"),
        "attentions": (f"1.{attention}", f"3.{attention}"),
        "attention 0": (f"0.{attention}", f"2.{attention}"),
        "mlps": (f"0.{mlp}", f"2.{mlp}"),
        "mixed": ("1", f"2.{mlp}", f"3.{attention}"),
    }


def llama_cpp() -> bool:
    try:
        runtimes.python("llama.cpp")
    except OptionError:
        return False
    return "LLAMA_CPP" in os.environ


@pytest.mark.parametrize("family", FAMILIES)
def test_no_cell_is_silently_wrong(family: str, tmp_path: Path) -> None:
    model = wrap(tiny(family), None, family)
    stock(model.net)
    model.net.config.save_pretrained(tmp_path / "dense")
    table: dict[str, dict[str, str]] = {}
    wanted, files = {}, {}
    for name, units in plans(model).items():
        row = table.setdefault(name, {})
        try:
            smaller = cut(model, *units)
        except DepthpruneError as error:
            row |= dict.fromkeys(FORMS, f"refused: {error}")
            continue
        for form in FORMS:
            spec = {"zeroed": f"zeroed:dense={tmp_path / 'dense'}", "gguf": "gguf:type=f32"}.get(form, form)
            if form == "gguf" and not llama_cpp():
                row[form] = "not tried"
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    folder = export(smaller, tmp_path / f"{name}-{form}", spec)
            except DepthpruneError as error:
                row[form] = f"refused: {error}"
                continue
            if form == "gguf":
                files[name] = (folder, runtimes.refer(smaller))
            else:
                wanted[folder] = (name, form, fitted(expect(model, Plan(model.reference, parse(units))), folder))
    proofs = check_many({folder: expected for folder, (_, _, expected) in wanted.items()})
    for folder, (name, form, _) in wanted.items():
        failed = [f"{proof.name}: {proof.detail}" for proof in proofs[folder] if not proof.passed]
        table[name][form] = f"FAILED {failed}" if failed else "proven"
    for name, (folder, reference) in files.items():
        failed = [
            f"{proof.name}: {proof.detail}"
            for proof in runtimes.prove(folder, "llama.cpp", reference)
            if not proof.passed
        ]
        table[name]["gguf"] = f"FAILED {failed}" if failed else "proven"
    if place := os.environ.get("DEPTHPRUNE_MATRIX"):
        every = json.loads(Path(place).read_text()) if Path(place).exists() else {}
        Path(place).write_text(json.dumps(every | {family: table}, indent=1) + "\n")
    cells = [text for row in table.values() for text in row.values()]
    assert len(cells) == 20 and all(text.startswith(("proven", "refused: ", "not tried")) for text in cells), table
