"""The main job: what a run leaves behind, and how one that was stopped at any moment goes on."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import SMALL, furnish, hold, interrupt, leftovers, run
from depthprune import oracle, planning, pruning, runtimes, stages
from depthprune.export import Proof, hf, nemotron_nas
from depthprune.plan import Plan
from depthprune.recover import closed

RUN = ("prune", "model", "--data", "text.txt", "--text", "test.txt", *SMALL)
FILES = {"bench.json", "check.json", "eval.json", "log.txt", "losses.jsonl", "model", "plan.json", "report.html"}
FILES |= {"run.json", "scores.json"}


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one complete run lies, proofs and all."""
    folder = furnish(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run(*RUN, "--out", "run", "--json")
        (folder / "out.txt").write_text(done.out, encoding="utf-8")
        (folder / "err.txt").write_text(done.err, encoding="utf-8")
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def there(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def test_a_run_leaves_its_files(there: Path) -> None:
    assert {path.name for path in (there / "run").iterdir()} == FILES and not leftovers(there)
    assert read("run/check.json")["passed"] and all(proof["passed"] for proof in read("run/check.json")["proofs"])
    dense, cut, pruned = read("run/eval.json")["models"]
    assert [dense["name"], cut["name"], pruned["name"]] == ["dense", "pruned", "recovered"]
    assert 0.5 < pruned["perplexity"] / dense["perplexity"] < 2 and pruned["perplexity"] != cut["perplexity"]
    assert read("run/model/recovery.json")["stages"][0]["how"] == "refit"
    weights = load_file("run/model/model.safetensors")
    assert pruned["parameters"] == sum(tensor.numel() for tensor in weights.values()) < dense["parameters"]
    plan = Plan.load("run/plan.json")
    assert dense["parameters"] - pruned["parameters"] == plan.frees["parameters"] >= 0.25 * 4 * 7744
    assert pruned["bytes"] == Path("run/model/model.safetensors").stat().st_size
    assert plan == Plan.load("run/model/plan.json")
    assert plan.why["evaluations"] == len(Path("run/losses.jsonl").read_text().splitlines()) - 1  # one is the header


def test_json_is_one_document_and_the_report_holds_its_numbers(there: Path) -> None:
    value = json.loads((there / "out.txt").read_text())
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert value["passed"] and value["report"] == "run/report.html"
    assert value["drop"] == [str(unit) for unit in Plan.load("run/plan.json").drop]
    for number in value["perplexity"]:
        assert f"{number:.4g}" in page or f"{number:.2f}" in page or f"{number:.1f}" in page
    assert all(unit in page for unit in value["drop"])


def test_the_log_holds_what_was_said(there: Path) -> None:
    log = [line[20:] for line in Path("run/log.txt").read_text(encoding="utf-8").splitlines()]
    said = (there / "err.txt").read_text(encoding="utf-8").splitlines()
    assert said[0] == "loading model" and log[: len(said)] == said


def test_replaying_the_plan_and_the_recovery_gives_the_same_weights(there: Path, tmp_path: Path) -> None:
    done = run("drop", "model", "run/plan.json", "--out", tmp_path / "cut")
    assert done.code == 0 and "FAIL" not in done.out
    mine, cut = load_file("run/model/model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in cut.items()}
    assert (tmp_path / "cut" / "config.json").read_text() == Path("run/model/config.json").read_text()
    assert any(not torch.equal(mine[name], cut[name]) for name in mine)
    words = ("recover", tmp_path / "cut", "--teacher", "model", "--data", "text.txt", "--out", tmp_path / "again")
    assert run(*words, *SMALL[2:]).code == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(mine[name], again[name]) for name in mine)


def test_resuming_a_finished_run_only_tells_its_result_again(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "load", None)  # it would be called
    done = run(*RUN, "--out", "run", "--resume", "--json")
    assert done.code == 0 and json.loads(done.out) == json.loads((there / "out.txt").read_text())


@pytest.mark.usefixtures("unproven")
def test_quiet_says_nothing_on_the_way(desk: Path) -> None:
    done = run(*RUN, "--out", "run", "--no-bench", "--quiet")
    assert done.code == 0 and not done.err
    assert "every one held" in done.out and not Path("run/bench.json").exists()
    assert "loading model" in Path("run/log.txt").read_text()


@pytest.mark.usefixtures("unproven")
def test_a_run_by_a_recipe(desk: Path) -> None:
    words = ("prune", "model", "--data", "text.txt", "--drop", "2 units", "--no-bench", "--sequences", "8")
    done = run(*words, "--recipe", "llm-drop-joint", "--out", "run")
    assert done.code == 0, done.err
    plan = Plan.load("run/plan.json")
    told = {name: plan.why[name] for name in ("recipe", "metric", "select", "unit")}
    assert told == {"recipe": "llm-drop-joint", "metric": "cosine", "select": "joint", "unit": "any"}
    assert plan.why["data"]["length"] == 128 and plan.why["data"]["sequences"] == 8  # as many as the model has
    settings = read("run/run.json")["settings"]
    assert settings["recipe"] == "llm-drop-joint" and settings["protect"] == "none"
    scores = {unit: entry["score"] for unit, entry in read("run/scores.json")["metrics"]["cosine"]["units"].items()}
    assert [str(unit) for unit in plan.drop] == sorted(scores, key=scores.__getitem__)[:2]
    again = run(*words, "--recipe", "llm-drop-joint", "--out", "run", "--resume")
    assert again.code == 0, again.err
    other = run(*words, "--recipe", "llm-drop-mlp", "--out", "run", "--resume")
    assert other.code == 2 and "run was started with other settings: " in other.error


@pytest.mark.usefixtures("unproven")
def test_without_a_text_the_evaluation_uses_rows_that_were_not_chosen_by(desk: Path) -> None:
    done = run("prune", "model", "--data", "text.txt", *SMALL, "--out", "run", "--no-bench")
    assert done.code == 0 and "evaluating on 4 other rows" in done.err
    assert read("run/eval.json")["text"]["tokens"] == 4 * 31
    assert read("run/eval.json")["text"]["digest"] != read("run/plan.json")["why"]["data"]["digest"]
    assert read("run/plan.json")["why"]["data"]["sequences"] == 8


def test_a_failed_proof_is_the_exit_code(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folders: dict[Path, Any], **_: Any) -> dict[Path, list[Proof]]:
        return {folder: [Proof("logits", False, "they differ by 3")] for folder in folders}

    monkeypatch.setattr(runtimes, "check_many", fail)
    done = run(*RUN, "--out", "run", "--no-bench")
    assert done.code == 1 and "FAILED, see the report" in done.out and "FAIL logits: they differ by 3" in done.err
    assert "they differ by 3" in Path("run/report.html").read_text()
    assert run(*RUN, "--out", "run", "--no-bench", "--resume").code == 1


@pytest.mark.usefixtures("unproven")
def test_overwriting_replaces_a_run_and_only_when_the_new_one_can_begin(desk: Path) -> None:
    words = (*RUN, "--out", "run", "--no-bench")
    assert run(*words).code == 0
    before = Path("run/plan.json").read_text()
    assert "--resume to finish it or --overwrite" in run(*words).error
    for wrong in (["--data", "none.txt"], ["--drop", "99%"], ["--dtype", "banana"], ["--length", "30000"]):
        assert run(*words, "--overwrite", *wrong).code in (1, 2)
        assert Path("run/plan.json").read_text() == before and Path("run/report.html").is_file()
    assert "choose one" in run(*words, "--overwrite", "--resume").error
    assert run(*words, "--overwrite", "--drop", "1 block").code == 0
    assert len(Plan.load("run/plan.json").drop) == 1


@pytest.mark.usefixtures("unproven")
def test_overwriting_never_deletes_what_it_is_to_read(desk: Path) -> None:
    words = (*RUN, "--out", "run", "--no-bench")
    assert run(*words).code == 0
    shutil.copy("text.txt", "run/text.txt")
    Path("link.txt").symlink_to(desk / "run" / "text.txt")
    Path("run/far.txt").symlink_to(desk / "text.txt")
    before = sorted(Path("run").rglob("*"))
    for option, given in (
        ("--data", "run/text.txt"),
        ("--data", "text.txt=0.5,run/text.txt=0.5"),
        ("--data", "link.txt"),
        ("--data", "run/far.txt"),
        ("--data", "./run"),
        ("--text", "run/../run/text.txt"),
        ("--recover-data", "run/text.txt"),
        ("--recover-data", "self:run/text.txt:prompt=4"),
        ("--tokenizer", "run/model"),
        ("--tokenizer", str(desk / "run" / "model")),
    ):
        done = run(*words, "--overwrite", option, given)
        assert done.code == 2 and done.error.startswith("--overwrite would delete ")
        assert sorted(Path("run").rglob("*")) == before
    again = run("prune", "run/model", *words[2:], "--overwrite")
    assert again.error == "--overwrite would delete run/model, which this run reads; name another --out"
    assert sorted(Path("run").rglob("*")) == before
    assert run("prune", "run/model", *words[2:], "--out", "second").code == 0
    Path("runs").mkdir()  # a name that only begins alike is another place
    shutil.copy("run/text.txt", "runs/text.txt")
    assert run(*words, "--overwrite", "--data", "runs/text.txt", "--tokenizer", "second/model").code == 0


@pytest.mark.usefixtures("unproven")
def test_how_a_run_is_done_may_change_when_it_is_resumed(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*RUN, "--out", "run", "--seed", "4")
    assert run(*words, "--no-bench", "--memory", "1GB").code == 0
    seeds: list[int] = []

    def bench(_: object, **options: Any) -> dict[str, Any]:
        seeds.append(options["seed"])
        return {"models": [{"name": "dense"}, {"name": "pruned"}]}

    monkeypatch.setattr(stages, "bench", bench)
    for name in ("expect", "expect_as_it_is", "recovered"):
        monkeypatch.setattr(pruning, name, None)  # nothing is proven or recovered again
    assert run(*words, "--resume", "--memory", "2GB", "--device", "cpu").code == 0
    assert seeds == [4] and Path("run/bench.json").is_file()


@pytest.mark.usefixtures("unproven")
def test_what_recovers_may_change_until_it_has_recovered(desk: Path) -> None:
    """A source that is not there is seen before the search; an option out of range after it, and can be put right."""
    words = (*RUN, "--no-bench", "--out", "run")
    done = run(*words, "--recover-data", "nowhere.txt")
    assert done.code == 1 and "nowhere.txt" in done.error and not Path("run").exists()
    assert run(*words, "--recover", "refit:sweeps=0").error == "refit:sweeps must be at least 1, not 0"
    losses = Path("run/losses.jsonl").read_text()
    assert run(*words, "--recover", "linear", "--resume").code == 0
    assert Path("run/losses.jsonl").read_text() == losses
    assert read("run/model/recovery.json")["stages"][0]["how"] == "linear"
    assert "recover was 'refit:sweeps=0'" in run(*words, "--resume", "--seed", "1").error


@pytest.mark.usefixtures("unproven")
def test_a_run_may_leave_the_weights(desk: Path) -> None:
    assert run(*RUN, "--no-bench", "--recover", "none", "--out", "run").code == 0
    assert not Path("run/model/recovery.json").exists()
    assert [entry["name"] for entry in read("run/eval.json")["models"]] == ["dense", "pruned"]


@pytest.mark.usefixtures("unproven")
def test_form_plain_goes_with_a_budget_of_blocks(desk: Path) -> None:
    words = (*RUN, "--no-bench", "--form", "plain", "--out", "run")
    assert run(*words, "--drop", "1 attention").error.startswith("--form plain holds whole blocks only")
    assert not Path("run").exists()
    assert run(*words, "--drop", "1 block").code == 0
    assert "auto_map" not in read("run/model/config.json")


@pytest.mark.usefixtures("unproven")
def test_a_form_that_lies_beside_the_model(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both folders are there, the one asked for is uploaded; a form that fails at the end gives way to another."""
    sent: list[Any] = []
    upload = importlib.import_module("depthprune.export.push")
    monkeypatch.setattr(upload, "push", lambda folder, *_, **__: sent.append(folder))
    words = (*RUN, "--no-bench", "--drop", "1 block", "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(nemotron_nas, "_config", interrupt)
        assert run(*words, "--form", "nemotron-nas").code == 1
    assert Path("run/model").is_dir() and not Path("run/nemotron-nas").exists()
    before = Path("run/losses.jsonl").read_bytes()
    assert "form was 'nemotron-nas', now 'plain'" in run(*words, "--form", "plain", "--resume").error
    done = run(*words, "--form", "zeroed", "--resume", "--push-to-hub", "shallow")
    assert done.code == 0, done.err
    assert Path("run/losses.jsonl").read_bytes() == before and sent == [Path("run/zeroed")]
    assert {proof["name"].partition(":")[0] for proof in read("run/check.json")["proofs"]} == {"model", "zeroed"}
    assert (
        read("run/zeroed/config.json")["num_hidden_layers"] == 4 != read("run/model/config.json")["num_hidden_layers"]
    )


def test_forms_that_cannot_be_are_refused_before_the_search(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "choose", lambda *_, **__: pytest.fail("searched"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    for form, says in (
        ("gguf:type=q4km", "unknown GGUF type 'q4km'"),
        ("gguf", "needs llama.cpp's convert_hf_to_gguf"),
    ):
        done = run(*RUN, "--no-bench", "--drop", "1 block", "--form", form, "--out", "run")
        assert done.code == 2 and says in done.error and not Path("run").exists()
    monkeypatch.setattr(nemotron_nas, "FAMILIES", ())
    done = run(*RUN, "--no-bench", "--drop", "1 block", "--form", "nemotron-nas", "--out", "run")
    assert done.code == 1 and "not shaped like Llama" in done.error and not Path("run").exists()


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("metric", ["angular:tokens=last", "l2", "loss"])
def test_the_scores_of_a_run_are_those_that_chose(metric: str, desk: Path) -> None:
    assert run(*RUN, "--no-bench", "--drop", "2 units", "--metric", metric, "--out", "run").code == 0
    metrics, plan = read("run/scores.json")["metrics"], Plan.load("run/plan.json")
    chose = {unit: entry["score"] for unit, entry in metrics[metric]["units"].items()}
    assert str(plan.drop[0]) == min(chose, key=chose.__getitem__)
    if metric == "loss":
        assert plan.why["select"] == planning.SEARCH and next(iter(metrics)) == "loss"
    else:
        assert plan.why["select"] == "lowest" and [str(unit) for unit in plan.drop] == sorted(chose, key=chose.get)[:2]
        assert "loss" not in metrics and not Path("run/losses.jsonl").exists()
    assert {"cosine", "angular"} <= set(metrics)
    named = "nats of loss" if metric == "loss" else f"score, {metric}"
    assert named in Path("run/report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("unproven")
def test_only_the_same_run_can_be_resumed(desk: Path) -> None:
    words = (*RUN, "--out", "run", "--no-bench")
    assert run(*words).code == 0
    done = run(*words, "--resume", "--seed", "3", "--protect", "none")
    assert done.code == 2
    assert done.error == (
        "--resume: run was started with other settings: protect was None, now 'none', seed was 0, now 3"
    )
    Path("run/eval.json").unlink()
    own = Path("text.txt").read_text()
    Path("text.txt").unlink()  # the link, not what it leads to
    Path("text.txt").write_text(own[: len(own) // 2])
    assert "is not what it was when run began" in run(*words, "--resume").error
    Path("text.txt").write_text(own)
    Path("run/run.json").write_text("[]")
    assert "run.json is not that of a run" in run(*words, "--resume").error
    Path("run/run.json").write_text("{")
    assert "is not JSON" in run(*words, "--resume").error


@pytest.mark.usefixtures("unproven")
def test_another_model_in_its_place_is_noticed(desk: Path) -> None:
    words = (*RUN, "--out", "run", "--no-bench")
    assert run(*words).code == 0
    Path("run/eval.json").unlink()
    Path("model").unlink()
    Path("model").symlink_to("other-model")
    assert "this plan is for model (fingerprint sha256:" in run(*words, "--resume").error


def third_call(real: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def called(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            interrupt()
        return real(*given, **options)

    return called


MOMENTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "loading": (pruning, "load", interrupt),
    "reading": (pruning, "calibrate", interrupt),
    "searching": (oracle, "losses", third_call(oracle.losses)),
    "cutting": (pruning, "drop", interrupt),
    "recovering": (closed, "fit_inner", interrupt),
    "writing": (hf, "_state", interrupt),
    "proving": (runtimes, "check_many", interrupt),
    "evaluating": (stages, "perplexity", interrupt),
    "timing": (stages, "bench", interrupt),
    "reporting": (pruning, "report", interrupt),
}


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_leaves_a_run_to_resume(
    moment: str, desk: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*RUN, "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS[moment])
        done = run(*words)
    assert done.code == 1 and done.error == "stopped; the same command with --resume finishes run"
    assert not leftovers(desk)
    early = moment in ("loading", "reading")
    assert Path("run").exists() != early
    kept = [] if early else Path("run/losses.jsonl").read_text().splitlines()
    assert early or len(kept) >= 2
    asked: list[Any] = []

    def counted(model: Any, data: Any, variants: Any, **options: Any) -> Any:
        asked.extend(variants)
        return real(model, data, variants, **options)

    real = oracle.losses
    monkeypatch.setattr(oracle, "losses", counted)
    assert run(*words, "--resume").code == 0
    undisturbed = (finished / "run" / "losses.jsonl").read_text().splitlines()
    lines = Path("run/losses.jsonl").read_text().splitlines()
    assert lines[: len(kept)] == kept and lines == undisturbed  # the search went on, and nothing is measured twice
    assert len(asked) == len(undisturbed) - max(1, len(kept))
    assert Path("run/plan.json").read_text() == (finished / "run" / "plan.json").read_text()
    mine, theirs = read("run/eval.json"), read(str(finished / "run" / "eval.json"))
    assert mine["recovery"].pop("seconds") > 0 < theirs["recovery"].pop("seconds") and mine == theirs
    assert {path.name for path in Path("run").iterdir()} == FILES


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_real_process_that_is_stopped_while_it_searches(
    sent: signal.Signals, code: int, desk: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "depthprune", *RUN, "--out", "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    memo, deadline = Path("run/losses.jsonl"), time.monotonic() + 60
    while not (memo.is_file() and memo.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and not out
    assert ("error: stopped; the same command with --resume finishes run\n" in err) == (sent == signal.SIGINT)
    assert not Path("run/check.json").exists()
    kept = memo.read_text().splitlines()[:2]
    monkeypatch.setattr(runtimes, "check_many", hold)
    assert run(*RUN, "--out", "run", "--resume").code == 0 and not leftovers(desk)
    assert memo.read_text().splitlines()[:2] == kept
    assert Path("run/plan.json").read_text() == (finished / "run" / "plan.json").read_text()


def test_an_interrupt_that_passes_through_exec_is_an_exit_code_too(tmp_path: Path) -> None:
    """Without an exception of its own, CPython would end a ``python -m`` by the signal."""
    (tmp_path / "driver.py").write_text(
        "import contextlib\nimport signal\nimport sys\nfrom depthprune import cli, options\n"
        "def load(*_):\n    exec('signal.raise_signal(signal.SIGINT)')\n"
        "options.load = load\nif sys.argv.pop() == 'plain':\n    cli.interruptible = contextlib.nullcontext\n"
        "sys.argv = ['depthprune', 'inspect', 'model']\ncli.main()\n"
    )
    ends = [
        subprocess.run([sys.executable, "-m", "driver", twin], capture_output=True, cwd=tmp_path)
        for twin in ("guarded", "plain")
    ]
    assert [end.stderr for end in ends] == [b"error: stopped\n"] * 2
    assert [end.returncode for end in ends] == [1, -signal.SIGINT]
