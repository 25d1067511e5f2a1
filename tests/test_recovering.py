"""The recover command: from folder to folder, or several ways in one table; what it warns of and what it refuses."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from command import Done, copy, hold, interrupt, leftovers, run
from depthprune import recovering, runtimes
from depthprune.errors import OptionError
from depthprune.evaluate import windows
from depthprune.export import export, hf
from depthprune.model import load
from depthprune.plan import Plan
from depthprune.recover import closed
from depthprune.recovering import CARRIED, carried_over
from depthprune.surgery import drop
from depthprune.units import parse

WORDS = ("--teacher", "model", "--data", "text.txt", "--sequences", "24", "--length", "32")


@pytest.fixture(scope="module")
def cut_once(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workshop's model without a block and a sublayer, as ``drop`` writes it."""
    model = load(workshop / "model", device="cpu")
    folder = tmp_path_factory.mktemp("cut") / "cut"
    export(drop(model, Plan(model.reference, parse(["1", "2.mlp"]))), folder, "hf")
    return folder


@pytest.fixture
def here(desk: Path, cut_once: Path) -> Path:
    copy(cut_once, desk / "cut")
    return desk


@pytest.fixture
def assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the fresh process."""
    monkeypatch.setattr(runtimes, "check_many", hold)


@pytest.fixture
def approved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage makes the rows held out better by half a nat: of random words it would be undone."""
    from depthprune.recover import apply

    losses = iter([1.0, 9.0, *(8.5 - number / 2 for number in range(100))])
    monkeypatch.setattr(apply, "held_loss", lambda model, data: next(losses))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def recover(*words: object, out: str = "out") -> Done:
    return run("recover", "cut", *WORDS, "--out", out, *words)


def test_it_writes_a_folder_that_is_proven_and_passes_check(here: Path) -> None:
    before = [digests(folder.resolve()) for folder in (here / "cut", here / "model")]
    done = recover("--how", "refit:inner=2+scale", "--text", "test.txt", "--window", "32", "--json")
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert value["passed"] and value["path"] == "out" and all(proof["passed"] for proof in value["proofs"])
    assert len(value["proofs"]) >= 3
    assert [digests(folder.resolve()) for folder in (here / "cut", here / "model")] == before
    assert not leftovers(here)
    kept = json.loads(Path("out/recovery.json").read_text())
    assert (
        [stage["how"] for stage in kept["stages"]] == ["refit:inner=2", "scale"] == [s["how"] for s in value["stages"]]
    )
    assert kept["held_rows"] == 3 and kept["data"]["sequences"] == 24
    assert value["rows"][0]["loss"] == {
        "dense": kept["held_loss"]["dense"],
        "pruned": kept["held_loss"]["before"],
        "recovered": kept["held_loss"]["after"],
    }
    tokens = load("cut", device="cpu").tokenizer
    text = windows("test.txt", tokens, window=32, limit=128)
    from depthprune.evaluate import perplexity

    for which, folder in (("dense", "model"), ("pruned", "cut"), ("recovered", "out")):
        measured = perplexity(load(folder, device="cpu"), text).loss
        assert value["rows"][1]["loss"][which] == pytest.approx(measured, rel=1e-5)
    old, new = (load_file(f"{name}/model.safetensors") for name in ("cut", "out"))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in old.items()}
    assert Plan.load("out/plan.json") == Plan.load("cut/plan.json")
    config, first = (json.loads(Path(name, "config.json").read_text()) for name in ("out", "cut"))
    assert config == first
    # What was recovered can be recovered again, and says that it was.
    again = recovering.reopen(load("out", device="cpu"), Path("out"))
    assert again.recovery == kept and again.plan == Plan.load("cut/plan.json")


@pytest.mark.slow
@pytest.mark.usefixtures("assumed")
def test_what_it_writes_passes_check(here: Path) -> None:
    assert recover("--how", "refit:inner=0").code == 0
    assert run("check", "out").code == 0
    weights = load_file("out/model.safetensors")  # the twin
    save_file({k: v for k, v in weights.items() if "0.mlp.up" not in k}, "out/model.safetensors", {"format": "pt"})
    assert run("check", "out").code == 1


@pytest.mark.usefixtures("assumed", "approved")
def test_the_table_shows_what_was_won_and_a_warning_what_does_not_carry_over(here: Path) -> None:
    done = recover("--how", "linear", "--text", "test.txt", "--window", "32")
    assert done.code == 0, done.err
    assert "written to out" in done.out and "linear:" in done.out and "held out" in done.out
    warned = [line for line in done.err.splitlines() if "the gain does not carry over" in line]
    assert len(warned) == 1 and "0.500 nats on held-out rows of text.txt, but test.txt is" in warned[0]


def report(gain: float, **there: float) -> list[str]:
    recovery = {"held_loss": {"dense": 1.0, "before": 4.0, "after": 4.0 - gain}, "data": {"name": "own.txt"}}
    found = [{"text": name, "loss": {"dense": 1.0, "pruned": 5.0, "recovered": 5.0 - g}} for name, g in there.items()]
    return carried_over(recovery, found)


def test_half_of_the_gain_is_as_little_as_passes() -> None:
    assert CARRIED == 0.5
    assert report(1.0, same=1.0, half=0.5, more=2.0) == []
    less, none, worse = report(1.0, less=0.49, same=1.0, none=0.0, worse=-0.3)
    advice = "; recover on text like what the model is for"
    start = "the gain does not carry over: 1.000 nats on held-out rows of own.txt, but"
    assert less == f"{start} less is 0.490 nats better{advice}"
    assert none == f"{start} none is 0.000 nats better{advice}"
    assert worse == f"{start} worse is 0.300 nats worse{advice}"
    assert report(0.0, worse=-1.0) == [] and report(1.0) == []


@pytest.mark.usefixtures("assumed")
def test_text_that_was_recovered_on_is_warned_of(here: Path) -> None:
    done = recover("--how", "linear", "--text", "text.txt", "--window", "32")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "also occurs in" in line]
    assert "weights are recovered on" in line and "evaluate on other text" in line
    assert not [
        line
        for line in recover("--how", "linear", "--text", "test.txt", out="two").err.splitlines()
        if "occurs" in line
    ]


# Several ways in one table


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that are really gone."""
    done: list[str] = []
    real = recovering.recovered

    def count(model: Any, teacher: Any, data: Any, how: str, *rest: Any, **more: Any) -> Any:
        done.append(how)
        return real(model, teacher, data, how, *rest, **more)

    monkeypatch.setattr(recovering, "recovered", count)
    return done


def ways(*names: str) -> list[str]:
    return [word for name in names for word in ("--how", name)]


def test_several_ways_start_from_the_same_cut(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = counted(monkeypatch)
    told = ("--compare", "--text", "test.txt", "--window", "32", "--json")
    done = recover(*ways("refit:inner=0", "scale", "bias", "lowrank:4", "mean", "linear"), *told)
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert value == json.loads(Path("out/recover.json").read_text()) and not leftovers(here)
    assert sorted(path.name for path in Path("out").iterdir()) == ["recover.json"]
    rows = {row["how"]: row for row in value["rows"]}
    assert list(rows) == gone == ["refit:inner=0", "scale", "bias", "lowrank:4", "mean", "linear"]
    assert rows["mean"] == {"how": "mean", "error": rows["mean"]["error"], "loss": {}}
    assert "this cut has no stand-ins to fill" in rows["mean"]["error"]
    base = value["base"][0]["loss"]
    model, teacher = load("cut", device="cpu"), load("model", device="cpu")
    assert rows["linear"]["parameters"] == rows["scale"]["parameters"] == model.parameters
    assert model.parameters < rows["bias"]["parameters"] < teacher.parameters
    assert rows["lowrank:4"]["parameters"] == model.parameters + 2 * 2 * 4 * 32
    for row in value["rows"]:
        if "error" not in row:
            assert set(row["loss"]) == {"test.txt"} and row["seconds"] > 0
            assert row["held_loss"]["before"] == rows["scale"]["held_loss"]["before"] or "undone" in row
            if row["undone"]:
                assert row["loss"]["test.txt"] == pytest.approx(base["pruned"], rel=1e-6)
    # Each is what it is alone.
    alone = recover(*ways("refit:inner=0"), "--compare", "--text", "test.txt", "--window", "32", "--json", out="alone")
    (row,) = json.loads(alone.out)["rows"]
    assert row["loss"] == rows["refit:inner=0"]["loss"] and row["held_loss"] == rows["refit:inner=0"]["held_loss"]
    # The same command makes nothing again; another way is added; other text is refused.
    gone.clear()
    done = recover(*ways("refit:inner=0", "mean", "linear:"), *told)
    assert done.code == 0 and gone == ["mean", "linear:"]  # what failed is tried again
    assert {row["how"] for row in json.loads(done.out)["rows"]} == {*rows, "linear:"}
    kept = Path("out/recover.json").read_bytes()
    for other in (("--seed", "1"), ("--data", "test.txt"), ("--text", "wide.txt")):
        words = [*told[:-1], *other] if other[0] != "--text" else ["--compare", "--window", "32"]
        done = recover(*ways("linear"), *words)
        assert (done.code, gone) == (2, ["mean", "linear:"])
        assert "--out out holds a comparison of other models, texts or seeds" in done.error
    assert Path("out/recover.json").read_bytes() == kept
    shown = recover(*ways("refit:inner=0", "mean"), *told[:-1])
    assert "this cut has no stand-ins" in shown.out and shown.out.index("dense") < shown.out.index("refit:inner=0")


@pytest.mark.usefixtures("desk")
def test_a_comparison_that_was_stopped_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = (*ways("linear", "scale"), "--compare", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(closed, "fit_inner", interrupt)
        patch.setattr(importlib.import_module("depthprune.recover.scale"), "last_norm", interrupt)
        done = recover(*told)
    assert done.code == 1 and "Traceback" not in done.err
    assert [row["how"] for row in json.loads(Path("out/recover.json").read_text())["rows"]] == ["linear"]
    gone = counted(monkeypatch)
    done = recover(*told)
    assert done.code == 0 and gone == ["scale"] and not leftovers(here)
    assert [row["how"] for row in json.loads(done.out)["rows"]] == ["linear", "scale"]


# Stopped, or refused


STOPPED: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "reading": (recovering, "calibrate", interrupt),
    "recovering": (closed, "fit_inner", interrupt),
    "proving the cut's plan": (closed, "ends", interrupt),
    "writing": (hf, "_state", interrupt),
    "exporting": (recovering, "export", interrupt),
}


@pytest.mark.parametrize("moment", STOPPED)
def test_ctrl_c_leaves_nothing_half_written(moment: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, function = STOPPED[moment]
    before = digests((here / "cut").resolve())
    with monkeypatch.context() as patch:
        patch.setattr(module, name, function)
        patch.setattr(closed, "WORTH", 0.0)
        done = recover()
    assert done.code == 1 and done.error and "Traceback" not in done.err
    assert not Path("out").exists() and not leftovers(here)
    assert digests((here / "cut").resolve()) == before
    monkeypatch.setattr(runtimes, "check_many", hold)
    assert recover("--how", "linear").code == 0 and Path("out/config.json").is_file()


def test_mistakes_are_refused_before_a_model_is_loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from depthprune import options

    monkeypatch.setattr(options, "load", lambda *_: pytest.fail("loaded"))
    (here / "plain").mkdir()
    (here / "taken").mkdir()
    (here / "taken" / "thesis.tex").touch()
    (here / "file").touch()
    cases: list[tuple[tuple[str, ...], str]] = [
        (
            ("recover", "plain", *WORDS, "--out", "out"),
            "plain has no plan.json: recover takes a folder that depthprune",
        ),
        (("recover", "nowhere", *WORDS, "--out", "out"), "nowhere has no plan.json"),
        (("recover", "cut", *WORDS, "--out", "taken"), "cannot write taken: it holds files already"),
        (("recover", "cut", *WORDS, "--out", "file"), "cannot write file: it is a file"),
        (("recover", "cut", *WORDS, "--out", "out", "--how", "refitt"), "'refitt'"),
        (("recover", "cut", *WORDS, "--out", "out", "--how", "linear+refit:sweep=2"), "refit has no option 'sweep'"),
        (("recover", "cut", *WORDS, "--out", "out", *ways("refit", "linear")), "several --how need --compare"),
        (("recover", "cut", *WORDS, "--out", "out", "--how", "bias"), "'bias'"),
        (("recover", "cut", *WORDS, "--out", "out", "--form", "odd"), "'odd'"),
    ]
    before = sorted(here.rglob("*"))
    for words, message in cases:
        done = run(*words)
        assert done.code == 2 and message in done.error, (words, done)
    assert sorted(here.rglob("*")) == before


def test_mistakes_that_need_a_look_are_one_line(here: Path) -> None:
    (here / "short.txt").write_text("w1 w2 w3 w4 w5 " * 8)
    copy(here / "cut", here / "odd")
    shutil.copy(here / "model" / "config.json", here / "other.json")
    cases: list[tuple[list[str], int, str]] = [
        (["cut", "--teacher", "other-model"], 1, "plan"),
        (["cut", "--teacher", "nowhere/at-all"], 1, "no such model"),
        (["cut", "--data", "short.txt", "--length", "24"], 1, "too few to recover on"),
        (["cut", "--data", "wide.txt"], 1, "but the model has 96 embeddings"),
        (["cut", "--data", "gone.txt"], 1, "gone.txt"),
        (["cut", "--how", "mean"], 2, "no stand-ins to fill"),
    ]
    for (folder, *words), code, message in cases:
        given = dict(zip(WORDS[::2], WORDS[1::2], strict=True)) | dict(zip(words[::2], words[1::2], strict=True))
        done = run("recover", folder, *(word for pair in given.items() for word in pair), "--out", "out")
        assert done.code == code and message in done.error, (words, done)
        assert len(done.error) < 420 and not Path("out").exists()
    assert not leftovers(here)


def test_a_stand_in_starts_from_a_plain_cut(here: Path) -> None:
    model, teacher = load("cut", device="cpu"), load("model", device="cpu")
    model = recovering.reopen(model, Path("cut"))
    asked = recovering.Asked("text.txt", 8, 16)
    data = recovering.text_of(asked, teacher)
    from depthprune.console import Console

    quiet = Console(quiet=True)
    filled = recovering.recovered(model, teacher, data, "bias", asked, quiet)
    assert filled.plan is not None and set(filled.plan.stand_in.values()) == {"bias"}
    for started in (replace(model, recovery={"stages": []}), filled):
        with pytest.raises(
            OptionError, match=r"lowrank:2 starts from a plain cut, and .* was recovered or has stand-ins"
        ):
            recovering.recovered(started, teacher, data, "lowrank:2", asked, quiet)


def test_rows_are_as_many_as_were_asked_for_or_as_the_device_can_take(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("model", device="cpu")
    rows = recovering.text_of(recovering.Asked("text.txt", 7, 40), model)
    assert (rows.sequences, rows.length) == (7, 40)
    monkeypatch.setattr(recovering, "TOKENS", {"cpu": 1000})
    assert recovering.text_of(recovering.Asked("text.txt", None, 50), model).sequences == 20
    most = recovering.text_of(recovering.Asked("text.txt", None, 500), model)  # the model has 128 positions
    assert (most.length, most.sequences) == (128, 7)
