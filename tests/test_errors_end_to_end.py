"""Every mistake that a user can make: exit code 2 (usage) or 1, one clear line, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_text
from command import SMALL, Done, copy, leftovers, run
from depthprune import oracle, pruning
from families import tiny

PRUNE = ("prune", "model", "--data", "text.txt", "--drop", "25%", *SMALL, "--no-bench", "--out", "run")


@pytest.fixture(scope="module")
def ruins(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Broken models, texts and plans."""
    place = tmp_path_factory.mktemp("ruins")
    model = workshop / "model"
    for name, length in (("cut", 20_000), ("cut-header", 100), ("cut-to-nothing", 0)):
        weights = copy(model, place / name) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:length])
    weights = copy(model, place / "incomplete") / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if k != "model.layers.2.mlp.up_proj.weight"}
    save_file(kept, weights, {"format": "pt"})
    for name, file in (("no-config", "config.json"), ("no-weights", "model.safetensors")):
        (copy(model, place / name) / file).unlink()
    for file in copy(model, place / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (copy(model, place / "odd-tokenizer") / "tokenizer.json").write_text("{")
    config = json.loads((model / "config.json").read_text())
    for name, content in (
        ("no-json", "{ not json"),
        ("odd-type", json.dumps(config | {"hidden_size": "many"})),
        ("odd-size", json.dumps(config | {"hidden_size": 64})),
        ("odd-family", json.dumps(config | {"model_type": "unheard-of"})),
        ("odd-json", "3"),
        (
            "quantized",
            json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        ),
    ):
        (copy(model, place / name) / "config.json").write_text(content)
    tiny("t5").save_pretrained(place / "encoder-decoder")
    tiny_text.make_tokenizer().save_pretrained(place / "encoder-decoder")
    (place / "empty-folder").mkdir()
    (place / "thesis").mkdir()
    (place / "thesis" / "thesis.tex").write_text("years of work")
    (place / "file").write_text("x")
    (place / "empty.txt").write_text("")
    (place / "blank.txt").write_text(" \n\n ")
    (place / "short.txt").write_text("w1 w2 w3 w4 w5")
    (place / "rows.jsonl").write_text('{"body": "w1 w2"}\n')
    (place / "bad.jsonl").write_text('{"text": "w1 w2"}\n{"text": \n')
    (place / "binary.txt").write_bytes(bytes(range(256)) * 10)
    for name, value in {
        "no-unit.json": {"drop": ["9"]},
        "no-sublayer.json": {"drop": ["1.experts"]},
        "no-name.json": {"drop": ["one"]},
        "twice.json": {"drop": ["1", "1"]},
        "every-block.json": {"drop": ["0", "1", "2", "3"]},
        "every-attention.json": {"drop": [f"{index}.self_attn" for index in range(4)]},
        "other-blocks.json": {"drop": ["1"], "model": {"id": "some/model", "blocks": 9}},
        "other-weights.json": {"drop": ["1"], "model": {"id": "some/model", "fingerprint": "sha256:0123456789abcdef"}},
        "other-format.json": {"drop": ["1"], "format": 2},
        "no-list.json": {"drop": "1"},
        "stand-in.json": {"drop": ["1"], "stand_in": {"2": "bias"}},
        "good.json": {"drop": ["1"]},
    }.items():
        (place / name).write_text(json.dumps({"format": 1, "model": {"id": "model"}} | value))
    (place / "no-plan.json").write_text("{ not json")
    return place


@pytest.fixture
def here(desk: Path, ruins: Path) -> Path:
    for item in ruins.iterdir():
        (desk / item.name).symlink_to(item)
    return desk


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing may appear in a folder, nor go."""
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before and not leftovers(folder)


def refused(*words: object, code: int) -> str:
    with untouched(Path.cwd()):
        done = run(*words)
        assert done.code == code and not done.out, done
    assert len(done.error) < 420 and done.error == done.error.strip()
    return done.error


def test_what_these_tests_would_see(tmp_path: Path) -> None:
    """The twin: half-written files, more than one line of error, and tracebacks."""
    (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError), untouched(tmp_path):
        (tmp_path / "run" / "plan.json").touch()
    (tmp_path / "run" / ".model.part").mkdir()
    assert leftovers(tmp_path) == ["run/.model.part"]
    for shown in ("", "error: a\nerror: b\n", "error: a\nmore\n", "Traceback (most recent call last):\nerror: a\n"):
        with pytest.raises(AssertionError):
            _ = Done(1, "", shown).error
    assert Done(1, "", "loading\nerror: a\n").error == "a"


MODELS = {
    "nosuch": "no such model: there is no folder 'nosuch' here",
    "org/nosuch": "no such model: there is no folder 'org/nosuch' here, and no such model in the Hub's cache",
    "./nosuch": "no such model: ./nosuch is not there",
    "file": "no such model: file is no folder",
    "cut": "the weights of cut are damaged",
    "cut-header": "the weights of cut-header are damaged",
    "cut-to-nothing": "the weights of cut-to-nothing are damaged",
    "incomplete": "the checkpoint incomplete has no model.layers.2.mlp.up_proj.weight",
    "no-config": "no-config is no model: this folder has no config.json",
    "empty-folder": "empty-folder is no model: this folder has no config.json",
    "no-weights": "cannot load no-weights: Error no file named model.safetensors",
    "no-tokenizer": "cannot load a tokenizer from no-tokenizer; name another with --tokenizer",
    "odd-tokenizer": "cannot load a tokenizer from odd-tokenizer; name another with --tokenizer",
    "no-json": "cannot load no-json: ",
    "odd-type": "cannot load odd-type: Validation error for field 'hidden_size'",
    "odd-size": "the checkpoint odd-size has",
    "odd-family": "cannot load odd-family: The checkpoint you are trying to load has model type `unheard-of`",
    "odd-json": "cannot load odd-json: ",
    "quantized": "cannot load quantized: ",
    "encoder-decoder": "encoder-decoder models are not supported yet",
}


@pytest.mark.parametrize("model", MODELS)
def test_models(here: Path, model: str) -> None:
    words = ("prune", model, *PRUNE[2:])
    assert refused(*words, code=1).startswith(MODELS[model])


DATA = {
    "none.txt": "there is no file or folder 'none.txt'",
    "wide.txt": "the tokenizer produces id 402 but the model has 96 embeddings: tokenizer of another model?",
    "empty.txt": "empty.txt: the text is empty",
    "blank.txt": "blank.txt: the text is empty",
    "short.txt": "short.txt: 5 tokens of text, but one row needs 31; give more text, or --length 6 or less",
    "rows.jsonl": "rows.jsonl, line 1: there is no field 'text'; it has 'body'",
    "bad.jsonl": "bad.jsonl, line 2: not JSON",
    "binary.txt": "binary.txt: not UTF-8 at byte 128",
    "text.txt=many": "there is no file 'text.txt=many', and 'many' is no weight for 'text.txt'",
    "text.txt,": "an empty name in the data mixture",
    "self:text.txt": "'self:text.txt' is text that a model writes itself, only for `recover --data`",
    "hub:some/data:x:train": "hub:some/data:x:train: cannot be loaded (HF_HUB_OFFLINE is set)",
}


@pytest.mark.parametrize("data", DATA)
def test_texts(here: Path, data: str) -> None:
    assert refused(*PRUNE, "--data", data, code=1).startswith(DATA[data])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("none.txt", "there is no file or folder 'none.txt'"),
        ("wide.txt", "the tokenizer produces id 403"),  # before the search, not after it
        ("empty.txt", "empty.txt: nothing to predict in 0 tokens"),
        ("binary.txt", "binary.txt: not UTF-8"),
    ],
)
def test_evaluation_texts(here: Path, text: str, fault: str) -> None:
    assert refused(*PRUNE, "--text", text, code=1).startswith(fault)
    assert refused("eval", "model", "--text", text, "--out", "eval.json", code=1).startswith(fault)


WHOLE = "goes by what whole plans cost (loss, kl, js, logit_distance, error), not by"
USAGE = {
    "--drop 100%": "--drop '100%' leaves nothing of the model",
    "--drop 0": "--drop '0' drops nothing and has no measure; write '25%', '8 blocks'",
    "--drop 0%": "--drop '0%' drops nothing",
    "--drop banana": "--drop 'banana' is no budget; write '25%', '8 blocks'",
    "--drop 9999_blocks": "--drop '9999 blocks' asks for 9,999 units, but the 4 units",
    "--drop 4_attention": "--drop '4 attention' asks for 4 units, but the 3 units",
    "--drop params<=1": "--drop 'params<=1' asks for 37,151 parameters, but",
    "--drop 2_blocks --unit mlp": "--drop '2 blocks' counts units of kind block, but --unit is mlp",
    "--unit mixer": "this model has no unit of kind mixer",
    "--unit atention": "unknown unit 'atention'. Did you mean 'attention'?",
    "--metric cosin": "unknown metric 'cosin'. Did you mean 'cosine'?",
    "--metric cosine:toke=last": "cosine has no option 'toke'; it has: tokens",
    "--metric cosine --select greedy": f"greedy {WHOLE} cosine; "
    "choose one of these as --metric, or --select lowest or iterative",
    "--metric taylor:plus=true --select beam": f"beam {WHOLE} taylor; ",
    "--recipe shortgpt --select evolve": f"evolve {WHOLE} cosine; ",
    "--recipe slep": "unknown recipe 'slep'. Did you mean 'sleb'?",
    "--recipe sleb:paper=true": "'paper=true' is no option of recipe 'sleb'; write sleb:code=true",
    "--recipe shortgpt:code=true": "recipe 'shortgpt' knows no difference between paper and code",
    "--recipe mine.toml": "cannot read the recipe mine.toml: No such file",
    "--form plain": "--form plain holds whole blocks only: add --unit block",
    "--form plain --drop 1_mlp": "--form plain holds whole blocks only: add --unit block",
    "--select gredy": "unknown selector 'gredy'. Did you mean 'greedy'?",
    "--select greedy:exact=maybe": "greedy:exact is true or false, not 'maybe'",
    "--form ggml": "unknown form 'ggml'. Available: gguf, hf, nemotron-nas, plain, zeroed",
    "--recover lore": "unknown recoverer 'lore'. Did you mean 'lora'? Available: distill, full, linear, lm, lora, "
    "lstsq, mean, mse, refit, scale, tail",
    "--recover refit+mean": "--recover mean: this fills stand-ins, and prune makes none; use drop --stand-in bias",
    "--memory banana": "--memory 'banana' is no size; write 4GB or 500MB",
    "--dtype bfloat": "unknown dtype 'bfloat'. Did you mean 'bfloat16'?",
    "--device banana": "no device 'banana' that torch can use on this machine. Available: cpu",
    "--device cuda:99": "no device 'cuda:99' that torch can use on this machine. Available: cpu",
    "--sequences -3": "Invalid value for '--sequences'",
    "--sequences many": "Invalid value for '--sequences'",
    "--length 0": "Invalid value for '--length'",
    "--windows 0": "Invalid value for '--windows'",
    "--window 0": "Invalid value for '--window'",
    "--stride 0": "Invalid value for '--stride'",
    "--text test.txt --stride 900": "a window of 32 tokens takes a stride from 1 to 31, not 900",
    "--bogus": "No such option: --bogus",
    "--resume --overwrite": "--resume finishes a run, --overwrite begins it again: choose one",
    "--out thesis": "--out thesis holds something that is no run of depthprune; name another folder",
    "--out file": "cannot write file: it is a file; name a folder",
    "--out file/run": "cannot write file/run: ",
    "--out thesis --overwrite": "--out thesis holds something that is no run of depthprune",
    "--out thesis --resume": "--out thesis holds something that is no run of depthprune",
}


@pytest.mark.parametrize("words", USAGE)
def test_usage(here: Path, words: str) -> None:
    given = [word.replace("_", " ") for word in words.split()]
    assert refused(*PRUNE, *given, code=2).startswith(USAGE[words])


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--metric error", "the metric error needs questions with choices; text.txt has none"),
        ("--select joint --unit block", "joint ranks attention and MLP sublayers together, not blocks; use --unit any"),
        (
            "--metric angular --unit block --select contiguous:rule=first",
            "contiguous:rule is one of distance, last, not",
        ),
        ("--drop loss<=+5% --metric kl", "--drop 'loss<=+5%' is a share of the dense model's loss, which is 0 under"),
        ("--drop loss<=0.1", "--drop 'loss<=0.1' cannot be met: it allows a loss of 0.1000, the dense model has "),
        ("--drop loss<=+5% --select evolve", "--drop 'loss<=+5%': evolve compares plans that free the same"),
    ],
)
def test_what_only_a_search_can_refuse(here: Path, words: str, fault: str) -> None:
    plan = ("plan", "model", "--data", "text.txt", "--drop", "25%", *SMALL, "--out", "plan.json")
    assert refused(*plan, *words.split(), code=2).startswith(fault)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--protect nonsense", "'nonsense' is no unit; write a block as '12'"),
        ("--protect 99", "--protect: there is no unit 99: this model has blocks 0 to 3"),
        ("--length 1000 --text test.txt", "exceed the"),
        ("--window 1000 --text test.txt", "windows of 1000 tokens exceed the model's 128 positions; pass --window 128"),
        ("--tokenizer thesis", "cannot load a tokenizer from thesis; name another with --tokenizer"),
    ],
)
def test_what_does_not_fit_the_model(here: Path, words: str, fault: str) -> None:
    done = run(*PRUNE, *words.split())
    assert done.code == 1 and fault in done.error and not leftovers(here)
    assert not {"plan.json", "model"} & set(os.listdir("run") if Path("run").exists() else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says is not there")
def test_no_gpu(here: Path) -> None:
    for words in (PRUNE, ("inspect", "model"), ("check", "model")):
        fault = refused(*words, "--device", "cuda", code=2)
        assert fault.startswith("no device 'cuda' that torch can use on this machine. Available: cpu")


PLANS = {
    "no-unit.json": "there is no unit 9: this model has blocks 0 to 3",
    "no-sublayer.json": "block 1 has no droppable sublayer 'experts'; it has: self_attn, mlp",
    "no-name.json": "'one' is no unit; write a block as '12'",
    "twice.json": "the plan drops 1 twice",
    "every-block.json": "this plan drops every block, or every attention",
    "every-attention.json": "this plan drops every block, or every attention",
    "other-blocks.json": "this plan is for some/model (blocks 9), not for model (blocks 4)",
    "other-weights.json": "this plan is for some/model (fingerprint sha256:0123456789ab), not for model (fingerprint",
    "other-format.json": "other-format.json has format 2; this release reads format 1",
    "no-list.json": "no-list.json is not a plan",
    "stand-in.json": "the plan has a stand-in for 2, which it does not drop",
    "no-plan.json": "no-plan.json is not JSON",
    "nosuch.json": "cannot read the plan nosuch.json: No such file or directory",
    "thesis": "cannot read the plan thesis: Is a directory",
}


@pytest.mark.parametrize("plan", PLANS)
def test_plans(here: Path, plan: str) -> None:
    fault = refused("drop", "model", plan, "--out", "small", code=1)
    assert PLANS[plan] in fault or fault.startswith(PLANS[plan])


def test_nothing_of_the_users_is_written_over(here: Path) -> None:
    holds = "it holds files already; name a new folder"
    for words in (("drop", "model", "good.json"), ("export", "model")):
        for place in ("model", "thesis", "."):
            assert refused(*words, "--out", place, code=2) == f"cannot write {place}: {holds}"
        assert refused(*words, "--out", "file/small", code=2).endswith("file is a file")
    named = "cannot write thesis: it is a folder; name a file"
    data = ("--data", "text.txt")
    assert refused("plan", "model", "--drop", "25%", *data, "--out", "thesis", code=2) == named
    assert refused("score", "model", *data, "--out", "thesis", code=2) == named
    assert refused("eval", "model", "--text", "text.txt", "--out", "thesis", code=2) == named
    assert refused("bench", "model", "--out", "thesis", code=2) == named
    assert (here / "thesis" / "thesis.tex").read_text() == "years of work"


def test_a_place_without_permission(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # for the superuser, too
    assert refused(*PRUNE, code=2).endswith("is not writable")
    assert refused("drop", "model", "good.json", "--out", "small", code=2).endswith("is not writable")


OTHERS = {
    ("check", "nosuch"): "nosuch is no model: it has no config.json",
    ("check", "thesis"): "thesis is no model: it has no config.json",
    ("report", "thesis"): "thesis/plan.json does not exist; a run folder needs a plan",
    ("report", "nosuch"): "nosuch/plan.json does not exist; a run folder needs a plan",
    ("inspect", "nosuch"): "no such model: there is no folder 'nosuch' here",
    ("eval", "model", "nosuch", "--text", "test.txt", "--out", "e.json"): "no such model: there is no folder 'nosuch'",
}


@pytest.mark.parametrize("words", OTHERS)
def test_other_commands(here: Path, words: tuple[str, ...]) -> None:
    assert refused(*words, code=1).startswith(OTHERS[words])


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("bogus", "No such command 'bogus'."),
        ("prune", "no MODEL given."),
        ("prune model", "prune needs --data TEXT to choose by"),
        ("prune model --data text.txt", "prune needs --out RUN, a folder to write to"),
        ("plan model --drop 25%", "Missing option '--data'."),
        (
            "drop model good.json --out small --stand-in mean",
            "--stand-in: 'mean' is no stand-in; write bias, or lowrank",
        ),
        ("list metric", "unknown list 'metric'. Did you mean 'metrics'? Available: forms, metrics"),
        ("bench model --prompt 0 --out b.json", "Invalid value for '--prompt'"),
        (
            "bench model --prompt 200 --new 9 --out b.json",
            "prompt 200 + new 9 = 209 tokens, but model has 128 positions",
        ),
    ],
)
def test_usage_of_other_commands(here: Path, words: str, fault: str) -> None:
    with untouched(here):
        done = run(*words.split())
    assert done.code == 2 and done.err.startswith(f"error: {fault}") and done.err.count("error: ") == 1


def test_a_disk_without_room(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "no room for small: it takes" in refused("drop", "model", "good.json", "--out", "small", code=1)
    done = run(*PRUNE)
    assert done.code == 1 and done.error.startswith("no room for run/model: it takes ")
    assert not Path("run/model").exists() and not leftovers(here)


@pytest.mark.usefixtures("unproven")
@pytest.mark.parametrize("room", [0, 200, 1000, 6000, 60_000])
def test_a_disk_that_fills_up_while_writing(here: Path, room: int) -> None:
    """No file may grow beyond ``room``: the log, the losses, the plan, then the weights cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        done = run(*PRUNE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 1 and "cannot write" in done.error and "too large" in done.error.lower()
    assert not Path("run/model").exists() and not leftovers(here)
    assert run(*PRUNE, "--resume").code == 0  # once there is room


@pytest.mark.usefixtures("unproven")
def test_no_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(oracle, "losses", fail)
            done = run(*PRUNE, *(["--resume"] if Path("run").exists() else []))
            way = "try the same command with --resume and a smaller --memory, or --device cpu, to finish run"
            assert done.error == f"out of memory; {way}"
            score = run("score", "model", "--data", "text.txt", *SMALL, "--out", "scores.json")
            assert score.code == 1 and score.error.startswith("out of memory; try") and "--resume" not in score.error
    assert run(*PRUNE, "--resume", "--memory", "1GB", "--device", "cpu").code == 0  # what it says to try


def test_a_defect_of_our_own_is_no_mistake_of_the_user(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: what is not an error on purpose keeps its traceback."""

    def defect(*_: object, **__: object) -> None:
        raise RuntimeError("a broken invariant")

    monkeypatch.setattr(pruning, "load", defect)
    with pytest.raises(RuntimeError, match="a broken invariant"):
        run(*PRUNE)


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "depthprune", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_a_real_process(here: Path) -> None:
    """Transformers' own reports and progress bars stay away, too."""
    done = process("prune", "incomplete", *PRUNE[2:], HF_HUB_OFFLINE="1")
    fault = "the checkpoint incomplete has no model.layers.2.mlp.up_proj.weight"
    assert done.returncode == 1 and not done.stdout
    first, second = done.stderr.splitlines()
    assert first == "loading incomplete" and second.startswith(f"error: {fault}")


def test_without_a_network_the_answer_comes_within_seconds(here: Path) -> None:
    start = time.monotonic()
    done = process("inspect", "org/nosuch", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(here))
    assert done.returncode == 1 and time.monotonic() - start < 20  # retries alone would take 23 seconds
    assert done.stderr.splitlines() == [
        "error: no such model: there is no folder 'org/nosuch' here, and no such model in the Hub's cache "
        "(http://127.0.0.1:9 cannot be reached)"
    ]
