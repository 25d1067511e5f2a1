"""What is written loads in a fresh process, computes the same, decodes with its cache, and holds nothing else."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from depthprune.export import export
from depthprune.export.check import Expected, Proof, check_many, expect
from depthprune.model import Model
from depthprune.surgery import drop
from families import names

GROUPS = 4
ONE_STACK = names("decoder") + names("encoder")


def tensors(folder: Path) -> dict[str, int]:
    """The names on disk and how many numbers each holds."""
    found: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            found |= {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def numbers(net: nn.Module) -> int:
    """How many numbers a network saves, tied ones once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in net.state_dict().values()}.values())


def write(model: Model, sort: str, folder: Path) -> Expected:
    """Drop and write one of the plans, check what lies on disk, and measure what has to come back."""
    units = cases.plans(model.layout)[sort]
    plan = cases.plan(model, units)
    smaller = drop(model, plan)
    export(smaller, folder)
    found = tensors(folder)
    uneven = "depthprune" in json.loads((folder / "config.json").read_text())
    assert list(found.values()).count(0) == uneven, "one empty tensor marks a folder of uneven blocks"
    assert (folder / "modeling_depthprune.py").exists() == uneven
    assert sum(found.values()) == numbers(smaller.net) <= numbers(model.net) - model.layout.freed(units)
    return expect(model, plan)


def sorts(model: Model, everything: bool) -> list[str]:
    """The plans of a family: all of them, or two of the four main ones in turn, and what only hybrids have."""
    name = model.reference.id
    found = [sort for sort in cases.plans(model.layout) if (name, sort) not in cases.REFUSED]
    turn = ONE_STACK.index(name) % 2
    main = ("block", "mixed") if turn else ("attention", "mlp")
    chosen = [sort for sort in found if everything or sort in main or sort == "mixer"]
    return chosen or found[:1]


def come_back(families: list[str], place: Path, everything: bool) -> None:
    expected: dict[Path, Expected | None] = {}
    keys: dict[Path, tuple[str, str]] = {}
    for name in families:
        model = cases.model(name)
        for sort in sorts(model, everything):
            folder = place / f"{name}-{sort}"
            expected[folder], keys[folder] = write(model, sort, folder), (name, sort)
    for folder, proofs in check_many(expected).items():
        failed = [f"{proof.name}: {proof.detail}" for proof in proofs if not proof.passed]
        if keys[folder] in cases.FAILED_PROOF:
            assert failed and all(cases.FAILED_PROOF[keys[folder]] in line for line in failed)
        else:
            assert not failed, f"{folder.name}: {failed}"
            assert len(proofs) >= 3


@pytest.mark.parametrize("group", range(GROUPS))
def test_every_family_comes_back(group: int, tmp_path: Path) -> None:
    come_back(ONE_STACK[group::GROUPS], tmp_path, everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_every_plan_of_every_family_comes_back(group: int, tmp_path: Path) -> None:
    come_back(ONE_STACK[group::GROUPS], tmp_path, everything=True)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_sweep_is_wide(everything: bool) -> None:
    done = {(name, sort) for name in ONE_STACK for sort in sorts(cases.model(name), everything)}
    done -= set(cases.FAILED_PROOF)
    assert len({name for name, _ in done}) >= 60
    for sort in ("block", "attention", "mlp", "mixed"):
        assert sum(found == sort for _, found in done) >= (70 if everything else 22)


def test_bytes_go_with_the_weights(folders: tuple[Path, dict[str, Expected]], tmp_path: Path) -> None:
    place, expected = folders
    model = cases.model("llama")
    dense = size(export(model, tmp_path / "dense"))
    for sort, one in expected.items():
        assert one.parameters is not None
        gone = 4 * (model.parameters - one.parameters)
        assert 0.9 * gone < dense - size(place / sort) < 1.2 * gone


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    """Tiny Llama without a block, without attentions, and mixed."""
    place = tmp_path_factory.mktemp("llama")
    model = cases.model("llama")
    return place, {sort: write(model, sort, place / sort) for sort in ("block", "attention", "mixed")}


def damaged(place: Path, expected: dict[str, Expected], work: Path) -> dict[str, tuple[Path, Expected]]:
    """Copies of good folders, each with one defect."""

    def copy(sort: str, defect: str) -> Path:
        target = work / f"{sort}-{defect}"
        shutil.copytree(place / sort, target)
        return target

    def weights(folder: Path, change: Any) -> None:
        file = folder / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})

    def config(folder: Path, change: Any) -> None:
        fields = json.loads((folder / "config.json").read_text())
        change(fields)
        (folder / "config.json").write_text(json.dumps(fields))

    made: dict[str, tuple[Path, Expected]] = {}
    for sort in expected:
        for defect, change in {
            "corrupted": lambda state: state["model.layers.1.mlp.down_proj.weight"][0].mul_(1.5),
            "missing": lambda state: state.pop("model.layers.1.mlp.down_proj.weight"),
            "extra": lambda state: state.update(planted=state["model.norm.weight"].clone()),
        }.items():
            folder = copy(sort, defect)
            weights(folder, change)
            made[folder.name] = (folder, expected[sort])
    folder = copy("attention", "skips")
    config(folder, lambda fields: fields["depthprune"]["skip"].pop("1"))
    made[folder.name] = (folder, expected["attention"])
    folder = copy("block", "theta")
    config(folder, lambda fields: fields["rope_parameters"].update(rope_theta=100.0))
    made[folder.name] = (folder, expected["block"])
    return made


def test_good_folders_pass_and_damaged_ones_fail(folders: tuple[Path, dict[str, Expected]], tmp_path: Path) -> None:
    place, expected = folders
    cases_of = damaged(place, expected, tmp_path)
    sliding = cases.model("qwen2_sliding")
    made = write(sliding, "block", tmp_path / "sliding")
    fields = json.loads((tmp_path / "sliding" / "config.json").read_text())
    fields["layer_types"] = fields["layer_types"][::-1]
    good = {place / sort: one for sort, one in expected.items()}
    write(sliding, "block", tmp_path / "sliding-good")
    good[tmp_path / "sliding-good"] = made
    (tmp_path / "sliding" / "config.json").write_text(json.dumps(fields))
    bad = dict(cases_of.values()) | {tmp_path / "sliding": made}
    proofs = check_many({**good, **bad})
    for folder in good:
        assert all(proof.passed for proof in proofs[folder]), folder.name
    for folder in bad:
        assert any(not proof.passed for proof in proofs[folder]), folder.name
    assert "unexpected" in said(proofs[tmp_path / "block-extra"])
    assert "missing" in said(proofs[tmp_path / "block-missing"])
    assert "logits" in said(proofs[tmp_path / "block-corrupted"])
    assert "logits" in said(proofs[tmp_path / "sliding"])


def said(proofs: list[Proof]) -> str:
    return "; ".join(f"{proof.name} {proof.detail}" for proof in proofs if not proof.passed)


LOAD = """
import json, sys, warnings
import transformers
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
assert "depthprune" not in sys.modules
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        print(json.dumps("loaded"))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {' '.join(str(error).split())}"))
"""
UNEVEN = [
    "llama",
    "llama_tied",
    "gemma2",
    "gpt2",
    "opt",
    "mixtral",
    "qwen2_sliding",
    "olmo2",
    "falcon",
    "gptj",
    "jamba",
]


def stock(folders: list[Path]) -> list[str]:
    """What transformers without depthprune, and without trust in remote code, says to each folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", LOAD, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]


def refusals(chosen: list[str], tmp_path: Path) -> None:
    written: list[Path] = []
    for name in chosen:
        model = cases.model(name)
        for sort in ("attention", "mlp", "mixed", "mixer"):
            skip = (name, sort) in cases.REFUSED or sort not in cases.plans(model.layout)
            if not skip:
                written.append(tmp_path / f"{name}-{sort}")
                export(drop(model, cases.plan(model, cases.plans(model.layout)[sort])), written[-1])
    export(cases.model("llama"), tmp_path / "dense")
    answers = stock([*written, tmp_path / "dense"])
    assert len(answers) == len(written) + 1 and answers[-1] == "loaded"
    for folder, answer in zip(written, answers, strict=False):
        if (folder / "modeling_depthprune.py").exists():
            assert "size mismatch" in answer or "ignore_mismatched_sizes" in answer, (folder.name, answer)
        else:  # all sublayers of a block are the block: nothing is uneven
            assert answer == "loaded" and "mixer" in folder.name


def test_stock_transformers_refuses_an_uneven_folder(tmp_path: Path) -> None:
    refusals([name for name in UNEVEN if name in names()], tmp_path)


@pytest.mark.slow
def test_stock_transformers_refuses_every_uneven_folder(tmp_path: Path) -> None:
    refusals(names("decoder"), tmp_path)


def test_without_its_tombstone_stock_transformers_would_load_random_weights(tmp_path: Path) -> None:
    """The twin: this is what the empty tensor is for."""
    model = cases.model("llama")
    folder = export(drop(model, cases.plan(model, cases.plans(model.layout)["attention"])), tmp_path / "folder")
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if tensor.numel()}, folder / "model.safetensors")
    assert stock([folder]) == ["loaded"]
