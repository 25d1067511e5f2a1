"""Several processes: each has its rows, sums are over all, and what they recover is what one process recovers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cuts import cut, model_of, rows, weights
from depthprune import dist
from depthprune.errors import DataError, OptionError
from depthprune.model import Model
from depthprune.recover.apply import recover, split

TOLERANCE = {"scale": 1e-4, "mean": 1e-4}  # of how far a weight moved
WAYS = ("refit:inner=2", "linear", "scale", "mean", "lstsq")
PROGRAM = """
import sys
import torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_dist import WAYS, recovered, subject
from cuts import rows
from depthprune import dist
from depthprune.errors import DataError, OptionError
torch.set_num_threads(1)
assert dist.start("cpu") == "cpu" and dist.start("cpu") == "cpu"
rank, found = dist.rank(), {{}}
found["world"] = dist.world()
found["total"] = dist.total(torch.arange(3.0) + 10 * rank)
found["share"] = dist.share(rows(5, 4)).tokens
for name, refused in (("one row", lambda: dist.share(rows(1, 4))), ("mse", lambda: recovered("mse", 16))):
    try:
        refused()
    except (DataError, OptionError) as error:
        found[name] = str(error)
for how in WAYS:
    found[how] = recovered(how, 16)
torch.save(found, Path({out!r}) / f"{{rank}}.pt")
"""


def subject(how: str) -> tuple[Model, Model]:
    """A model and its cut, with stand-ins where the way fills them."""
    teacher = model_of("llama")
    form = {"mean": "bias", "lstsq": "lowrank:2", "mse": "bias"}.get(how, "")
    return teacher, cut(teacher, "1", "2.mlp", form=form)


def recovered(how: str, count: int) -> dict[str, Any]:
    """The weights and the record of a recovery that is never undone, on rows with padding of many lengths."""
    teacher, model = subject(how)
    text = rows(count, 20)
    for number in range(count):
        text.mask[number, 20 - number % 7 :] = False
    with pytest.MonkeyPatch.context() as patch:
        from depthprune.recover import apply

        real = apply.held_loss
        patch.setattr(apply, "held_loss", lambda model, data: real(model, data) * 0 + 1.0)
        found = recover(model, teacher, text, how)
        losses = [real(one, split(dist.share(text))[1]) for one in (teacher, model, found)]
    assert found.recovery is not None
    stage = {key: found.recovery["stages"][0].get(key) for key in ("tokens", "maps", "factors")}
    return {"weights": weights(found), "losses": losses, "held_rows": found.recovery["held_rows"], **stage}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    out = tmp_path_factory.mktemp("processes")
    (out / "program.py").write_text(PROGRAM.format(tests=str(Path(__file__).parent), out=str(out)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(out / "program.py")], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_alone_a_process_is_everything() -> None:
    tensor, data = torch.arange(3.0), rows(1, 4)
    assert (dist.rank(), dist.world(), dist.start("cpu")) == (0, 1, "cpu")
    assert dist.total(tensor) is tensor and dist.share(data) is data


def test_sums_and_rows_of_two_processes(processes: list[dict[str, Any]]) -> None:
    text = rows(5, 4).tokens
    for rank, found in enumerate(processes):
        assert found["world"] == 2 and torch.equal(found["total"], torch.tensor([10.0, 12.0, 14.0]))
        assert torch.equal(found["share"], text[rank::2])
        assert found["one row"] == "random: 1 rows cannot be shared among 2 processes; give more text"
        assert found["mse"].startswith("mse trains in one process")


@pytest.mark.parametrize("how", WAYS)
def test_two_processes_recover_what_one_does(how: str, processes: list[dict[str, Any]]) -> None:
    """16 rows: of the even ones the last is held out, and of the odd ones; of all the last two: the same rows."""
    first, second = (found[how] for found in processes)
    alone = recovered(how, 16)
    start = weights(subject(how)[1])
    assert first["tokens"] == pytest.approx(alone["tokens"], rel=0.1) and first["held_rows"] == alone["held_rows"] == 2
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    changed = 0
    for name, want in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        step = (want - start[name]).norm()
        assert (first["weights"][name] - want).norm() <= TOLERANCE.get(how, 1e-2) * step + 1e-6, name
        changed += bool(step > 1e-3)
    assert changed
    if how == "scale":
        assert first["factors"] == second["factors"]
        assert [one["factor"] for one in first["factors"]] == pytest.approx([f["factor"] for f in alone["factors"]])


@pytest.mark.parametrize("how", WAYS)
def test_half_of_the_text_is_not_enough(how: str) -> None:
    """The twin: one process on its own rows alone comes to something else."""
    alone, half, start = recovered(how, 16)["weights"], recovered(how, 8)["weights"], weights(subject(how)[1])
    gaps = [((half[n] - alone[n]).norm(), (alone[n] - start[n]).norm()) for n in alone]
    assert any(gap > 5 * (TOLERANCE.get(how, 1e-2) * step + 1e-6) for gap, step in gaps)


def test_too_few_rows_for_all_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from depthprune.recover import apply

    monkeypatch.setattr(apply, "world", lambda: 4)
    with pytest.raises(DataError, match="7 rows of 8 tokens are too few to recover on"):
        recover(subject("refit")[1], subject("refit")[0], rows(7, 8))
    with pytest.raises(OptionError, match="mse trains in one process"):
        from depthprune.recover import fill

        monkeypatch.setattr(fill, "world", lambda: 2)
        recovered("mse", 8)
