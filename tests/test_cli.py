"""The commands, each as a user meets it; what they refuse is in test_errors_end_to_end."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from command import SMALL, WORDS, copy, leftovers, run
from depthprune import __version__, options, oracle, recipes, registry
from depthprune.metrics import stream
from depthprune.plan import Plan
from depthprune.scores import Scores
from depthprune.units import Unit

COMMANDS = sorted(typer.main.get_command(options.app).commands)  # type: ignore[attr-defined]
OPTIONS = {
    "inspect": "--tokenizer --revision --allow-pickle --trust-remote-code --place",
    "score": "--data --metric --unit --sequences --length --field --memory --out",
    "plan": "--drop --data --unit --metric --select --protect --recipe --stability --sequences --length --out",
    "drop": "--stand-in --form --out",
    "check": "--against --runtime --tokenizer --revision --allow-pickle --trust-remote-code --place",
    "eval": "--text --window --stride --windows --field --out",
    "bench": "--batch --prompt --new --repeats --out",
    "bridges": "--blocks",
    "push": "--private --revision --message",
    "export": "--form --quantize --data --out --push-to-hub --private "
    "--tokenizer --revision --allow-pickle --trust-remote-code --place",
    "report": "--open",
    "prune": "--drop --data --out --demo --recover --recover-data --recover-sequences --text --form --no-bench "
    "--resume --overwrite --memory --protect --push-to-hub --private "
    "--recipe --stability",
    "recover": "--teacher --how --data --text --compare --form --resume --sequences --length --memory --out",
    "compare": "--data --recipes --drop --text --window --windows --metric --unit --quantize "
    "--sequences --length --memory --out",
    "list": "",
}
COMMON = "--seed --device --dtype --quiet --json --help"


def test_every_command_has_its_options_listed_here() -> None:
    assert sorted(OPTIONS) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run(command, "--help")
    assert done.code == 0 and not done.err
    words = set(done.out.split())
    assert {*OPTIONS[command].split(), *COMMON.split()} <= words


def test_help_of_every_command_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom depthprune.cli import main\n"
        f"for words in ([], ['--help'], ['--version'], *([c, '--help'] for c in {COMMANDS})):\n"
        "    sys.argv = ['depthprune', *words]\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'datasets'} & set(sys.modules)))\n"
        "import depthprune.layout\nprint('torch' in sys.modules)\n"  # what the check would see
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["HEAVY []", "True"]


def test_alone_it_shows_its_commands() -> None:
    done, asked = run(), run("--help")
    assert done.out.split() == asked.out.split() and asked.code == 0
    assert not done.err and set(COMMANDS) <= set(done.out.split())


def test_version() -> None:
    assert run("--version").out == f"depthprune {__version__}\n"


def test_lists() -> None:
    for what in registry.TABLES:
        shown, plain = run("list", what, "--json"), run("list", what)
        assert json.loads(shown.out) == list(registry.names(what)) and not shown.err
        assert plain.out.split() == json.loads(shown.out) or plain.out == f"no {what} in this release\n"


def test_recipes_are_listed_with_what_they_do() -> None:
    assert json.loads(run("list", "recipes", "--json").out) == list(recipes.names())
    lines = run("list", "recipes").out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[n, recipes.load(n).title] for n in recipes.names()]


def test_inspect_shows_every_unit(desk: Path) -> None:
    done = run("inspect", "model")
    units = [f"{index}{part}" for index in range(4) for part in ("", ".self_attn", ".mlp")]
    assert [word for word in done.out.split() if word[0] in "0123" and word in units] == units
    value = json.loads(run("inspect", "model", "--json").out)
    assert value["parameters"] == sum(t.numel() for t in load_file("model/model.safetensors").values())
    assert sum(block["kv_bytes_per_token"] for block in value["blocks"]) == value["kv_bytes_per_token"] == 512
    assert [unit["unit"] for block in value["blocks"] for unit in (block, *block["sublayers"])] == units


def test_score_and_plan_agree(desk: Path) -> None:
    done = run("score", "model", "--data", "text.txt", "--out", "scores.json", *SMALL, "--json", "--quiet")
    value = json.loads(done.out)
    assert done.code == 0 and value == json.loads(Path("scores.json").read_text())
    assert set(value["metrics"]) == {"loss", "cosine"} and not done.err
    scores = {unit: entry["score"] for unit, entry in value["metrics"]["loss"]["units"].items()}
    words = ("plan", "model", "--drop", "2 units", "--data", "text.txt", *SMALL, "--protect", "none")
    assert run(*words, "--select", "lowest", "--out", "lowest.json").code == 0
    assert [str(unit) for unit in Plan.load("lowest.json").drop] == sorted(scores, key=scores.__getitem__)[:2]
    done = run(*words, "--select", "greedy", "--out", "greedy.json", "--json")
    assert json.loads(done.out)["drop"] == [str(unit) for unit in Plan.load("greedy.json").drop]
    assert json.loads(done.out)["drop"][0] == min(scores, key=scores.__getitem__)


def test_several_metrics_share_their_walks(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[str] = []
    real = oracle.stream_scores

    def counted(*given: Any, **options: Any) -> Any:
        walks.append(options["tokens"])
        return real(*given, **options)

    monkeypatch.setattr(oracle, "stream_scores", counted)
    several = ("cosine", "l2", "loss", "angular:tokens=last", "cosine:tokens=last")
    words = ("score", "model", "--data", "text.txt", *SMALL, "--quiet", "--json")
    done = run(*words, *(word for name in several for word in ("--metric", name)), "--out", "scores.json")
    found = json.loads(done.out)["metrics"]
    assert tuple(found) == several and walks == ["all", "last"]
    for name in several:  # and each is what it is alone
        alone = json.loads(run(*words, "--metric", name, "--out", "alone.json").out)["metrics"]
        assert alone == {name: found[name]}


def test_a_score_that_is_no_number_is_refused(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object, units: Sequence[Unit]) -> Scores:
        return Scores("l1", dict.fromkeys(units, 1.0) | {units[2]: math.nan})

    monkeypatch.setattr(stream, "l1", broken)
    words = ("score", "model", "--data", "text.txt", *SMALL, "--metric", "cosine", "--metric", "l1")
    done = run(*words, "--out", "scores.json")
    assert done.code == 1 and done.error.startswith("l1 of 1.self_attn is not a number for model on text.txt")
    assert not Path("scores.json").exists()


def test_the_same_seed_gives_the_same_plan(desk: Path) -> None:
    words = ("plan", "model", "--drop", "25%", "--data", "text.txt", *SMALL, "--out")
    for name, seed in (("a.json", 7), ("b.json", 7), ("c.json", 8)):
        assert run(*words, name, "--seed", seed).code == 0
    a, b, c = (Path(name).read_text() for name in ("a.json", "b.json", "c.json"))
    assert a == b
    assert json.loads(a)["why"]["data"]["digest"] != json.loads(c)["why"]["data"]["digest"]


def test_a_recipe_chooses_as_its_paper_does(desk: Path) -> None:
    words = ("plan", "model", "--drop", "1 block", "--data", "text.txt", "--recipe", "sleb", "--out")
    assert run(*words, "sleb.json").code == 0
    plan = Plan.load("sleb.json")
    told = {name: plan.why[name] for name in ("recipe", "unit", "metric", "select", "seed")}
    assert told == {"recipe": "sleb", "unit": "block", "metric": "loss", "select": "greedy:exact=true", "seed": 0}
    assert (plan.why["data"]["sequences"], plan.why["data"]["length"]) == (4, 128)  # 2048 in the paper's models
    assert {plan.drop[0].block} <= {1, 2} and plan.why["evaluations"] == 3  # all but the ends, and the dense model
    spelt = ("plan", "model", "--drop", "1 block", "--data", "text.txt", "--select", "greedy:exact=true")
    assert run(*spelt, "--protect", "0,3", "--sequences", "4", "--length", "128", "--out", "spelt.json").code == 0
    by_hand = Plan.load("spelt.json")
    assert (by_hand.drop, by_hand.why["steps"]) == (plan.drop, plan.why["steps"])


def test_what_is_given_wins_over_the_recipe(desk: Path) -> None:
    words = ("plan", "model", "--drop", "1 unit", "--data", "text.txt", "--recipe", "blockpruner", *SMALL)
    assert run(*words, "--unit", "mlp", "--metric", "kl", "--seed", "7", "--out", "plan.json").code == 0
    why = Plan.load("plan.json").why
    told = {name: why[name] for name in ("recipe", "unit", "metric", "select", "seed")}
    assert told == {
        "recipe": "blockpruner",
        "unit": "mlp",
        "metric": "kl",
        "select": "greedy:exact=true",
        "seed": 7,
    }
    assert (why["data"]["sequences"], why["data"]["length"]) == (8, 32)


def test_a_recipe_of_ones_own(desk: Path) -> None:
    Path("mine.toml").write_text('title = "Mine"\nunit = "any"\nmetric = "l2"\nselect = "joint:per=parameters"\n')
    words = ("--drop", "2 units", "--data", "text.txt", *SMALL, "--out", "plan.json")
    assert run("plan", "model", "--recipe", "mine.toml", *words).code == 0
    why = Plan.load("plan.json").why
    assert (why["recipe"], why["metric"], why["select"]) == ("mine.toml", "l2", "joint:per=parameters")


@pytest.fixture
def quiz(desk: Path) -> str:
    """A task on the desk, by the name that ``--data`` takes."""
    draw = random.Random(1)

    def said(count: int) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(count))

    rows = [{"prompt": said(9), "choices": [said(2) for _ in "ABCD"], "answer": draw.randrange(4)} for _ in range(20)]
    Path("quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "task:quiz.jsonl"


def test_tasks_choose_alone_and_with_text(desk: Path, quiz: str) -> None:
    words = ("plan", "model", "--drop", "2 units", *SMALL, "--out", "plan.json", "--data")
    assert run(*words, quiz, "--metric", "error").code == 0
    why = Plan.load("plan.json").why
    assert (why["metric"], why["data"]["name"], why["data"]["sequences"]) == ("error", quiz, 8)
    assert {round(step["loss"] * 8, 9) % 1 for step in why["steps"]} == {0}  # shares of eight questions
    assert run(*words, f"text.txt=0.75,{quiz}=0.25").code == 0
    parts = Plan.load("plan.json").why["data"]["parts"]
    assert [(part["name"], part["weight"]) for part in parts] == [("text.txt", 0.75), (quiz, 0.25)]
    assert parts[0]["sequences"] == 6 and parts[1]["sequences"] % 2 == 0  # a quarter of the eight are questions


def test_compare_puts_recipes_and_importances_side_by_side(desk: Path, quiz: str) -> None:
    words = ("compare", "model", "--drop", "25%", "--data", "text.txt", "--data", quiz, *SMALL, "--out", "compared")
    names = ("depthprune", "sleb", "deeper-look-task")
    done = run(*words, "--recipes", ",".join(names), "--text", "test.txt", "--window", "32", "--json", "--quiet")
    assert done.code == 0 and not done.err, done.err
    value = json.loads(done.out)
    assert {row["recipe"] for row in value["rows"]} == set(names)
    assert all(row["fraction"] >= 0.25 and row["perplexity"] > 1 for row in value["rows"])
    for name in names:
        plan = Plan.load(f"compared/plans/{name}.json")
        assert plan.why["recipe"] == name
        assert plan.why["data"]["name"] == (quiz if name == "deeper-look-task" else "text.txt")
    assert {"compare.json", "compare.svg", "importances.json"} <= {path.name for path in Path("compared").iterdir()}
    agreement = json.loads(Path("compared/importances.json").read_text())
    assert agreement["sources"] == ["text.txt", quiz] and agreement["spearman"][0][0] == pytest.approx(1)
    assert len(agreement["units"]) == 8 and {rank for unit in agreement["units"] for rank in unit["ranks"]} <= set(
        range(1, 9)
    )
    again = run(*words, "--recipes", "none")
    assert again.code == 0 and "rank correlation" in again.out
    for missing, fault in (
        (("--recipes", "none"), "--recipes none compares importances"),
        ((), "compare needs --text"),
    ):
        bare = run("compare", "model", "--data", "text.txt", "--out", "other", *missing)
        assert bare.code == 2 and bare.error.startswith(fault) and not Path("other").exists()


def test_eval_and_bench_put_models_side_by_side(desk: Path) -> None:
    words = ("eval", "model", "other-model", "--text", "test.txt", "--window", "64", "--stride", "32")
    done = run(*words, "--out", "eval.json", "--json", "--quiet")
    value = json.loads(done.out)
    assert [entry["name"] for entry in value["models"]] == ["model", "other-model"] and not done.err
    assert value["text"]["tokens"] == 1500 and value == json.loads(Path("eval.json").read_text())
    shown = run(*words, "--out", "eval.json").out
    assert all(f"{entry['perplexity']:.3f}" in shown for entry in value["models"])
    words = ("bench", "model", "other-model", "--prompt", "8", "--new", "2", "--repeats", "1", "--out", "bench.json")
    value = json.loads(run(*words, "--json").out)
    assert [entry["name"] for entry in value["models"]] == ["model", "other-model"]
    assert all(entry["prefill_ms"] > 0 for entry in value["models"])


def test_drop_and_check_and_export(desk: Path) -> None:
    """A hand-written plan; then the damage that a check has to find."""
    plan = {"format": 1, "model": {"id": "model"}, "drop": ["1", "2"]}
    Path("plan.json").write_text(json.dumps(plan))
    done = run("drop", "model", "plan.json", "--out", "small", "--json", "--quiet")
    assert done.code == 0 and not done.err and json.loads(done.out)["passed"]
    assert json.loads(Path("small/config.json").read_text())["num_hidden_layers"] == 2 and not leftovers(desk)
    assert run("export", "small", "--out", "again").out.startswith("written to again\n  ok   loads with plain")
    assert Plan.load("again/plan.json") == Plan.load("small/plan.json")
    written, known = Plan.load("plan.json"), Plan.load("small/plan.json")
    assert known.drop == written.drop and (known.model.id, known.model.blocks) == ("model", 4), "what was left open"
    assert run("check", "again", "--against", "model").code == 0
    first, again = (load_file(f"{name}/model.safetensors") for name in ("small", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)

    for words, says in (
        (("--data", "text.txt"), "--data is what --quantize gptq, awq and autoround look at"),
        (("--quantize", "gptq"), "--quantize gptq looks at text: give --data FILE"),
        (("--quantize", "w4a16", "--form", "gguf"), "--quantize is for --form hf, not gguf"),
    ):
        refused = run("export", "small", "--out", "odd", *words)
        assert refused.code == 2 and refused.error.startswith(says) and not Path("odd").exists()

    changed, lacking = copy(Path("small"), Path("changed")), copy(Path("small"), Path("lacking"))
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(first | {name: first[name] * 1.5}, changed / "model.safetensors", {"format": "pt"})
    save_file({k: v for k, v in first.items() if k != name}, lacking / "model.safetensors", {"format": "pt"})
    found = run("check", "changed", "--against", "model")
    assert found.code == 1 and "FAIL logits (plain transformers)" in found.out and not found.err
    found = run("check", "lacking", "--json")
    assert found.code == 1 and name in found.out and json.loads(found.out)["passed"] is False


def test_other_users_can_read_what_was_exported(desk: Path) -> None:
    assert run("export", "model", "--out", "again").code == 0 and not Path("again/plan.json").exists()
    modes = {file.stat().st_mode & 0o777 for file in Path("again").iterdir()}
    written = desk / "mine"
    written.write_text("")
    assert modes == {written.stat().st_mode & 0o777}
