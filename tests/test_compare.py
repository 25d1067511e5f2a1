"""Methods side by side: the rows, what they cost, the pairs of losses, and a comparison that goes on where it was."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import naive
from command import furnish, run
from depthprune import oracle as asked
from depthprune import recipes, tables
from depthprune.console import Console
from depthprune.data import Data
from depthprune.errors import BudgetError, OptionError
from depthprune.evaluate import Windows, windows
from depthprune.export import hf
from depthprune.model import Model, load
from depthprune.plan import Plan
from depthprune.scores import Losses, Scores, paired
from depthprune.units import Unit, parse
from depthprune.variants import losses

module = importlib.import_module("depthprune.compare")

QUICK = ("sleb", "llm-drop-attn", "llm-drop-mlp", "shortgpt")
SMALL = {"sequences": 4, "length": 16}
SVG = "{http://www.w3.org/2000/svg}"
TASK = [
    {"prompt": f"w{n} w{n + 1} w{n + 2}", "choices": [f"w{3 * n}", f"w{2 * n + 1}"], "answer": n % 2} for n in range(8)
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, its texts, and a task."""
    folder = furnish(tmp_path_factory.mktemp("compare"))
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, TASK)), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _there(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop)


@pytest.fixture(scope="module")
def model(shop: Path) -> Model:
    return load(str(shop / "model"))


def text(model: Model, limit: int = 6) -> Windows:
    return windows("test.txt", model.tokenizer, window=24, limit=limit)


def compare(model: Model, out: Path, names: Sequence[str] = QUICK, budget: str = "25%", **options: Any) -> Any:
    given = {"data": ["text.txt"], "text": text(model), **SMALL, **options}
    return module.compare(model, budget, names, out=out, console=Console(quiet=True), **given)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many variants reach the engine, call by call."""
    calls: list[int] = []

    def counted(model: Model, data: Data, variants: Sequence[Iterable[Unit]], **options: Any) -> Losses:
        calls.append(len(variants))
        return losses(model, data, variants, **options)

    monkeypatch.setattr(asked, "losses", counted)
    return calls


def plainly(model: Model, rows: Windows, drop: Sequence[str]) -> np.ndarray:
    """The summed loss of each window without some units, from plain forwards."""
    with naive.removed(model.net, parse(drop)):
        logits = naive.logits(model.net, rows.data.tokens, rows.data.mask)[:, :-1].double()
    each = -logits.log_softmax(-1).gather(-1, rows.data.tokens[:, 1:, None])[..., 0]
    wanted = rows.scored[:, 1:] & rows.data.mask[:, 1:]
    return (each * wanted).sum(1).numpy()


# Rows


def test_every_recipe_has_a_row_with_its_losses(model: Model, tmp_path: Path) -> None:
    value = compare(model, tmp_path)
    rows = {row["recipe"]: row for row in value["rows"]}
    assert set(rows) == set(QUICK) and [row["loss"] for row in value["rows"]] == sorted(
        r["loss"] for r in value["rows"]
    )
    given = text(model)
    tokens = given.scored[:, 1:].sum(1).numpy()
    assert value["text"] == {"name": "test.txt", "tokens": tokens.sum(), "digest": given.data.digest}
    dense = plainly(model, given, [])
    assert value["dense"]["loss"] == pytest.approx(dense.sum() / tokens.sum(), rel=1e-5)
    best = plainly(model, given, value["rows"][0]["drop"])
    for place, row in enumerate(value["rows"]):
        nll = plainly(model, given, row["drop"])
        assert row["loss"] == pytest.approx(nll.sum() / tokens.sum(), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        gone = frozenset(parse(row["drop"]))
        assert row["fraction"] == pytest.approx(model.layout.freed(gone) / model.layout.parameters) and not row["note"]
        assert row["fraction"] >= 0.25 and row["parameters"] == model.parameters - model.layout.freed(gone)
        assert row["kv_bytes_per_token"] == model.layout.kv_bytes_per_token - model.layout.kv_freed(gone)
        assert (row["sequences"], row["length"]) == (4, 16) and row["seconds"] > 0
        if place:
            assert row["behind"] == pytest.approx(paired(nll, best, tokens), rel=1e-3, abs=1e-6)
        else:
            assert row["behind"] is None
    assert rows["shortgpt"]["evaluations"] == rows["shortgpt"]["work"] == 0  # a one-pass metric
    assert rows["sleb"]["evaluations"] == rows["sleb"]["work"] == 1 + 2  # blocks 1 and 2, and the dense model


def test_files_hold_what_was_found(model: Model, tmp_path: Path) -> None:
    value = compare(model, tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(value))
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.svg", "plans", "test.jsonl"}
    for row in value["rows"]:
        plan = Plan.load(tmp_path / "plans" / f"{row['recipe']}.json")
        assert [str(unit) for unit in plan.drop] == list(row["drop"])
        assert plan.why["recipe"] == row["recipe"] and plan.why["metric"] == row["metric"]
        assert (row["unit"], row["select"]) == (plan.why["unit"], plan.why["select"])
        plan.fits(model.reference)


def test_what_the_code_does_has_a_row_of_its_own(model: Model, tmp_path: Path) -> None:
    names = ["shortened-llama-ppl", "llm-drop-joint", "sleb:code=true"]
    value = compare(model, tmp_path, names)
    assert {row["recipe"] for row in value["rows"]} == set(names)
    assert {path.stem for path in (tmp_path / "plans").iterdir()} == {*names[:2], "sleb-code-true"}


def test_all_recipes_in_one_table(model: Model, tmp_path: Path) -> None:
    value = compare(model, tmp_path, recipes.names(), data=["text.txt", "task:task.jsonl"], sequences=2)
    assert {row["recipe"] for row in value["rows"]} == set(recipes.names())
    kept = [row for row in value["rows"] if row["loss"] is not None]
    assert len(kept) >= 15
    for row in value["rows"]:
        if row["loss"] is None:  # of four blocks, six must stay
            assert "infinite" in row["note"] and row["recipe"] in ("shortened-llama-mag", "shortened-llama-taylor")
            assert row["drop"] == () and row["behind"] is None
    assert bars(tmp_path / "compare.svg") == [row["title"] for row in kept]


# What is out of reach


def test_a_recipe_out_of_reach_takes_half_of_its_units_and_says_so(model: Model, tmp_path: Path) -> None:
    value = compare(model, tmp_path, budget="45%")  # all attention is 40 % of the blocks
    rows = {row["recipe"]: row for row in value["rows"]}
    row = rows["llm-drop-attn"]
    assert len(row["drop"]) == 2 and all(unit.endswith(".self_attn") for unit in row["drop"])
    assert re.match(r"^half of its units instead \(--drop '45%' asks for .* but the 4 units .* have .*\)$", row["note"])
    assert row["fraction"] < 0.45 and row["loss"] is not None
    assert value["rows"][-1] is row  # it cannot be compared with those that met the budget
    others = [row for name, row in rows.items() if name != "llm-drop-attn"]
    assert all(row["fraction"] >= 0.45 and not row["note"] for row in others)


@pytest.mark.parametrize("budget", ["42%", "2 mlp", "12 mlp"])
def test_half_is_taken_whatever_digits_the_budget_has(model: Model, tmp_path: Path, budget: str) -> None:
    (row,) = compare(model, tmp_path, ["llm-drop-attn"], budget=budget)["rows"]
    assert row["note"].startswith("half of its units instead (--drop ") and len(row["drop"]) == 2


def test_what_cannot_be_done_at_all_is_a_note(model: Model, tmp_path: Path) -> None:
    value = compare(model, tmp_path, ["deeper-look-task", "sleb", "shortened-llama-mag"])
    first, *rest = value["rows"]
    assert first["recipe"] == "sleb" and first["behind"] is None
    notes = {row["recipe"]: row["note"] for row in rest}
    assert notes["deeper-look-task"] == "needs a task: --data task:FILE"
    assert "4 units must stay, as their score is infinite" in notes["shortened-llama-mag"]
    assert all(row["loss"] is row["behind"] is None for row in rest)
    assert not [path for path in (tmp_path / "plans").iterdir() if path.stem != "sleb"]


def test_where_nothing_can_be_done_that_is_an_error(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        compare(model, tmp_path, ["deeper-look-task", "shortened-llama-mag"])
    assert str(caught.value).startswith("deeper-look-task: needs a task: --data task:FILE; shortened-llama-mag: --drop")
    assert not (tmp_path / "compare.svg").exists()


def test_recipes_for_tasks_take_the_task(model: Model, tmp_path: Path) -> None:
    names, data = ["deeper-look-task", "shortened-llama-ppl"], ["task:task.jsonl", "text.txt"]
    value = compare(model, tmp_path, names, data=data, sequences=8)
    assert {row["recipe"] for row in value["rows"]} == set(names)
    sources = {n: Plan.load(tmp_path / "plans" / f"{n}.json").why["data"]["sources"][0]["path"] for n in names}
    assert sources["shortened-llama-ppl"] == "text.txt" and sources["deeper-look-task"].endswith("task.jsonl")


def test_a_model_that_breaks_on_the_text_is_a_note(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Model, data: Data, variants: Sequence[Iterable[Unit]], **options: Any) -> Losses:
        found = losses(model, data, variants, **options)
        if data.name == "test.txt":
            for row, units in enumerate(variants):
                found.nll[row, 0] += math.inf if any(u.sublayer == "self_attn" for u in units) else 0
        return found

    monkeypatch.setattr(asked, "losses", broken)
    value = compare(model, tmp_path)
    last = value["rows"][-1]
    assert last["recipe"] == "llm-drop-attn" and last["loss"] is None and "no finite loss" in last["note"]
    assert len(bars(tmp_path / "compare.svg")) == 3


# Going on


def test_the_same_comparison_again_measures_nothing(model: Model, tmp_path: Path, measured: list[int]) -> None:
    first = compare(model, tmp_path)
    assert len(measured) > 5
    measured.clear()
    again = compare(model, tmp_path)
    assert not measured and json.dumps(again) == json.dumps(first)
    more = compare(model, tmp_path, [*QUICK, "last"])
    assert measured == [1]  # the last blocks need no scores, only the test
    assert len(more["rows"]) == 5
    assert [row["recipe"] for row in more["rows"] if row["behind"] is None] == [more["rows"][0]["recipe"]]


class Killed(BaseException):
    """No error that anybody catches."""


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_comparison_that_was_killed_goes_on(
    model: Model, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    whole = compare(model, tmp_path / "whole")
    made: list[str] = []
    own = module._choose

    def choose(model: Model, budget: str, recipe: Any, *rest: Any, **options: Any) -> Any:
        if len(made) == after:
            raise Killed
        made.append(recipe.spec)
        return own(model, budget, recipe, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_choose", choose)
        with pytest.raises(Killed):
            compare(model, tmp_path / "cut")
    before = json.loads((tmp_path / "cut" / "compare.json").read_text())
    assert [row["recipe"] for row in before["rows"]] == made == list(QUICK[:after])
    times = {row["recipe"]: row["seconds"] for row in before["rows"]}
    value = compare(model, tmp_path / "cut")
    for row, want in zip(value["rows"], whole["rows"], strict=True):
        assert row["recipe"] not in times or row["seconds"] == times[row["recipe"]]
        for name in set(row) - {"seconds"}:
            assert row[name] == want[name]


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"budget": "30%"}, "budget"),
        ({"data": ["test.txt"]}, "data"),
        ({"seed": 3}, "asked"),
        ({"sequences": 5}, "asked"),
        ({"budget": "30%", "length": 8}, "budget, asked"),
    ],
)
def test_another_comparison_in_the_folder_is_refused(
    model: Model, tmp_path: Path, options: dict[str, Any], differ: str
) -> None:
    compare(model, tmp_path, ["last"])
    before = (tmp_path / "compare.json").read_bytes()
    with pytest.raises(OptionError, match=rf"compare\.json is of another comparison \({differ} differ\); name another"):
        compare(model, tmp_path, ["last"], **options)
    with pytest.raises(OptionError, match=r"\(text differ\)"):
        compare(model, tmp_path, ["last"], text=text(model, 5))
    with pytest.raises(OptionError, match=r"\(model differ\)"):
        compare(load("other-model"), tmp_path, ["last"])
    assert (tmp_path / "compare.json").read_bytes() == before


# The plot


def bars(path: Path) -> list[str]:
    """The titles of the bars of a plot, from the top; it must be XML, and every bar inside."""
    root = ElementTree.parse(path).getroot()
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    found = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") in ("bar", "own")]
    for rect in found:
        x, y, wide, high = (float(rect.get(name, math.nan)) for name in ("x", "y", "width", "height"))
        assert 0 < x < x + wide < width and 0 < y < y + high < height and wide >= 1
    assert [float(rect.get("y", 0)) for rect in found] == sorted(float(rect.get("y", 0)) for rect in found)
    return [rect.findtext(f"{SVG}title") or "" for rect in found]


def test_the_plot_has_a_bar_for_each_row(model: Model, tmp_path: Path) -> None:
    value = compare(model, tmp_path)
    assert bars(tmp_path / "compare.svg") == [row["title"] for row in value["rows"]]


def drawn(perplexities: Sequence[float], **changed: Any) -> dict[str, Any]:
    rows = [
        {"recipe": f"r{n}", "title": f"R {n}", "loss": math.log(p), "perplexity": p, "fraction": 0.25}
        | {"evaluations": 10, "work": 3.0, "seconds": 1.5, "note": ""}
        for n, p in enumerate(perplexities)
    ]
    head = {"budget": "25%", "model": {"id": "a/b"}, "text": {"name": "t"}, "dense": {"perplexity": 10.0}}
    return {**head, "rows": rows, **changed}


@pytest.mark.parametrize(
    "perplexities", [[12.0, 15.0, 40.0], [10.0], [9.0, 9.5], [12.0, 13.0, 1e300], [10.0, 10.0]], ids=str
)
def test_plots_of_any_losses(perplexities: list[float], tmp_path: Path) -> None:
    (tmp_path / "p.svg").write_text(module.plot(drawn(perplexities)), encoding="utf-8")
    assert bars(tmp_path / "p.svg") == [f"R {n}" for n in range(len(perplexities))]


def test_names_are_safe_in_a_plot(tmp_path: Path) -> None:
    value = drawn([12.0], budget="kv<=50%", text={"name": "a&b <c>"}, model={"id": 'x/<"m">'})
    value["rows"][0] |= {"recipe": "<&>", "title": 'T & "U"'}
    (tmp_path / "p.svg").write_text(module.plot(value), encoding="utf-8")
    assert bars(tmp_path / "p.svg") == ['T & "U"']
    words = "".join(ElementTree.parse(tmp_path / "p.svg").getroot().itertext())
    assert "kv<=50%" in words and "a&b <c>" in words and "<&>" in words


# Importances


@dataclass
class Stub:
    """An oracle that knows the scores of a text by its name."""

    scores: Mapping[Unit, float]

    def scored(self) -> Scores:
        return Scores("loss", self.scores)


def agreed(
    model: Model, monkeypatch: pytest.MonkeyPatch, scores: Mapping[str, Mapping[Unit, float]], **options: Any
) -> Any:
    monkeypatch.setattr(module, "oracle", lambda model, rows, **_: Stub(scores[rows.name]))
    given = {"console": Console(quiet=True), "sequences": 2, "length": 8, **options}
    return module.importances(model, list(scores), "loss", **given)


def test_ranks_agree_and_disagree(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    units = model.layout.units("any")
    up = {unit: float(place) ** 3 for place, unit in enumerate(units)}
    down = {unit: -value for unit, value in up.items()}
    value = agreed(model, monkeypatch, {"text.txt": up, "test.txt": down, "wide.txt": up})
    np.testing.assert_allclose(value["spearman"], [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], atol=1e-12)
    assert value["sources"] == ["text.txt", "test.txt", "wide.txt"] and value["metric"] == "loss"
    first = value["units"][0]
    assert first == {
        "unit": str(units[0]), "kind": "attention", "ranks": [1, 8, 1], "scores": [0.0, 0.0, 0.0], "apart": 7
    }  # fmt: skip
    assert [unit["apart"] for unit in value["units"]] == [7, 7, 5, 5, 3, 3, 1, 1]


def test_a_unit_that_must_stay_ranks_last(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = model.layout.units("block")
    one = dict(zip(blocks, (math.inf, 1.0, 2.0, 3.0), strict=True))
    two = dict(zip(blocks, (0.0, 1.0, 2.0, 3.0), strict=True))
    value = agreed(model, monkeypatch, {"text.txt": one, "test.txt": two}, unit="block")
    assert value["units"][0]["unit"] == "0" and value["units"][0]["ranks"] == [4, 1]
    assert value["spearman"][0][1] == pytest.approx(1 - 6 * (9 + 1 + 1 + 1) / (4 * 15))


def test_importances_are_those_of_the_metric(model: Model) -> None:
    from depthprune.data import calibrate
    from depthprune.planning import score

    options = {"sequences": 4, "length": 16, "seed": 2}
    data = ["text.txt", "task:task.jsonl"]
    value = module.importances(model, data, "loss", unit="mlp", console=Console(quiet=True), **options)
    for place, source in enumerate(data):
        scores = score(model, calibrate(source, model.tokenizer, **options), "loss", unit="mlp")
        for entry in value["units"]:
            assert entry["scores"][place] == pytest.approx(scores.values[Unit.parse(entry["unit"])])
            assert entry["ranks"][place] == 1 + scores.ranked().index(Unit.parse(entry["unit"]))
    same = module.importances(model, ["text.txt", "text.txt"], "loss", console=Console(quiet=True), **options)
    np.testing.assert_allclose(same["spearman"], 1)


# The command line

CLI = (
    "compare",
    "model",
    "--text",
    "test.txt",
    "--window",
    "24",
    "--windows",
    "4",
    "--sequences",
    "4",
    "--length",
    "16",
)


def test_the_command_prints_one_table_and_goes_on(tmp_path: Path) -> None:
    words = (*CLI, "--data", "text.txt", "--recipes", "sleb,llm-drop-attn,shortgpt", "--drop", "45%", "--out")
    done = run(*words, tmp_path / "out")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("45% of model; test.txt; dense ")
    assert all(any(line.startswith(name) for line in lines) for name in ("sleb", "llm-drop-attn", "shortgpt"))
    assert any(line.startswith("llm-drop-attn: half of its units instead") for line in lines)
    assert "1 of 3: sleb" in done.err and (tmp_path / "out" / "compare.svg").is_file()
    again = run(*words, tmp_path / "out", "--json")
    assert again.code == 0 and "of 3:" not in again.err
    value = json.loads(again.out)
    assert value == json.loads((tmp_path / "out" / "compare.json").read_text()) and len(value["rows"]) == 3
    other = run(*words, tmp_path / "out", "--seed", "3")
    assert other.code == 2 and "is of another comparison (asked differ)" in other.error


def test_the_command_compares_importances(tmp_path: Path) -> None:
    words = (*CLI[:2], "--sequences", "4", "--length", "16", "--data", "text.txt", "--data", "task:task.jsonl")
    done = run(*words, "--recipes", "none", "--metric", "cosine", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "cosine: rank correlation" in done.out and "ranks of the units that differ most, of 8" in done.out
    kept = json.loads((tmp_path / "out" / "importances.json").read_text())
    assert kept["format"] == 1 and kept["metric"] == "cosine" and len(kept["units"]) == 8
    both = run(*CLI, *words[6:], "--recipes", "last", "--out", tmp_path / "both", "--json")
    value = json.loads(both.out)
    assert [row["recipe"] for row in value["rows"]] == ["last"] and len(value["importances"]["spearman"]) == 2
    assert {path.name for path in (tmp_path / "both").iterdir()} >= {"compare.json", "importances.json"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "text.txt", "--recipes", "none"), "--recipes none compares importances: give --data twice or more"),
        (("--data", "text.txt", "--recipes", "slebb"), "unknown recipe 'slebb'. Did you mean 'sleb'?"),
        (("--data", "text.txt", "--metric", "los"), "unknown metric 'los'. Did you mean 'loss'?"),
        (("--data", "nowhere.txt", "--recipes", "last"), "nowhere.txt"),
        (("--data", "text.txt", "--recipes", "deeper-look-task"), "deeper-look-task: needs a task: --data task:FILE"),
        (("--data", "text.txt", "--recipes", "last", "--drop", "200%"), "leaves nothing of the model"),
        (("--data", "text.txt", "--recipes", "last", "--drop", "a lot"), "--drop 'a lot' is no budget; write '25%'"),
        (("--data", "text.txt", "--recipes", "last", "--text", "gone.txt"), "gone.txt"),
        (("--data", "text.txt", "--recipes", "last", "--out", "text.txt"), "cannot write text.txt: it is a file"),
        (("--data", "text.txt", "--recipes", "last", "--out", "model"), "cannot write model: it holds files already"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = run(*CLI, "--out", tmp_path / "out", *words)
    assert done.code in (1, 2) and says in done.error
    assert not (tmp_path / "out" / "compare.svg").exists()


def test_recipes_need_a_text_to_be_tested_on(tmp_path: Path) -> None:
    done = run("compare", "model", "--data", "text.txt", "--out", tmp_path / "out")
    assert done.code == 2 and done.error.startswith("compare needs --text FILE, another text than --data")
    assert not (tmp_path / "out").exists()


# What an earlier run left


def test_rows_of_other_text_or_settings_are_made_again(
    model: Model, tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('title = "mine"\nunit = "block"\nmetric = "random:seed=1"\nselect = "lowest"\n', encoding="utf-8")
    compare(model, tmp_path / "out", (str(mine), "sleb"))
    mine.write_text('title = "mine"\nunit = "block"\nmetric = "cosine"\nselect = "lowest"\n', encoding="utf-8")
    measured.clear()
    value = compare(model, tmp_path / "out", (str(mine), "sleb"))
    assert [row["metric"] for row in value["rows"] if row["recipe"] == str(mine)] == ["cosine"]
    assert sum(measured) <= 1  # the new plan on the test text; sleb is not searched again
    moved = tmp_path / "text.txt"
    moved.write_text(Path("text.txt").read_text(encoding="utf-8"), encoding="utf-8")
    first = compare(model, tmp_path / "other", ("shortgpt",), data=[str(moved)])
    moved.write_text(Path("test.txt").read_text(encoding="utf-8"), encoding="utf-8")
    second = compare(model, tmp_path / "other", ("shortgpt",), data=[str(moved)])
    assert first["rows"][0]["digest"] != second["rows"][0]["digest"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"rows": 3}'])
def test_a_file_that_is_no_comparison_is_refused(content: str, model: Model, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match="is not that of a comparison"):
        compare(model, tmp_path)


def test_a_mixture_serves_recipes_for_text(model: Model, tmp_path: Path) -> None:
    value = compare(model, tmp_path, ("shortgpt", "deeper-look-task"), data=["text.txt=0.5,task:task.jsonl=0.5"])
    notes = {row["recipe"]: row["note"] for row in value["rows"]}
    assert notes == {"shortgpt": "", "deeper-look-task": "needs a task: --data task:FILE"}


# Quantized, before and after


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, Any]]:
    """Stand in for quantization: the weights shrink, those of pruned models less. Returns what it was asked."""
    asked: list[tuple[str, bool, Any]] = []

    def quantize(model: Model, path: Path, how: str, rows: Any) -> Path:
        asked.append((how, model.plan is not None, rows))
        folder = hf.write(model, path)
        weights = load_file(folder / "model.safetensors")
        shrunk = {name: w * (0.9 if model.plan else 0.8) if "layers" in name else w for name, w in weights.items()}
        save_file(shrunk, folder / "model.safetensors", {"format": "pt"})
        return folder

    monkeypatch.setattr(importlib.import_module("depthprune.orders"), "quantize", quantize)
    return asked


def shrunk(model: Model, by: float) -> Model:
    """The same model with smaller weights in its blocks, and so another network."""
    net = copy.deepcopy(model.net)
    with torch.no_grad():
        for weight in net.model.layers.parameters():
            weight.mul_(by)
    return replace(model, net=net)


def test_both_orders_of_quantizing_stand_beside_each_row(
    model: Model, tmp_path: Path, coarse: list[tuple[str, bool, Any]]
) -> None:
    value = compare(model, tmp_path, ("sleb", "llm-drop-attn"), quantize="w4a16")
    given = text(model)
    tokens = int(given.scored.sum())
    assert value["quantize"] == "w4a16"
    assert value["dense"]["quantized_loss"] == pytest.approx(plainly(shrunk(model, 0.8), given, []).sum() / tokens)
    for row in value["rows"]:
        then, first = (plainly(shrunk(model, by), given, row["drop"]).sum() / tokens for by in (0.9, 0.8))
        assert row["prune_quantize"] == pytest.approx(then, rel=1e-5) != pytest.approx(first, rel=1e-5)
        assert row["quantize_prune"] == pytest.approx(first, rel=1e-5)
        assert 0 < row["quantized_bytes"] < value["dense"]["quantized_bytes"]
    assert [(how, pruned) for how, pruned, _ in coarse] == [("w4a16", False), ("w4a16", True), ("w4a16", True)]
    assert all(rows.digest == value["rows"][0]["digest"] for _, _, rows in coarse), "the recipe's own rows"
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.svg", "plans", "test.jsonl"}
    coarse.clear()
    assert compare(model, tmp_path, ("sleb", "llm-drop-attn"), quantize="w4a16") == value
    assert len(coarse) == 1, "what is there is not made again, but for the dense model"
    with pytest.raises(OptionError, match="quantize differ"):
        compare(model, tmp_path, ("sleb", "llm-drop-attn"))


def test_the_command_shows_both_orders(tmp_path: Path, coarse: list[Any]) -> None:
    out = tmp_path / "side"
    words = ("compare", "model", "--data", "text.txt", "--text", "test.txt", "--recipes", "sleb", "--drop", "1 block")
    words += ("--sequences", "4", "--length", "16", "--window", "24", "--out", str(out), "--quantize")
    done = run(*words, "gptq")
    assert done.code == 0, done.err
    (row,) = json.loads((out / "compare.json").read_text())["rows"]
    assert "then gptq" in done.out and "gptq first" in done.out
    assert f"{math.exp(row['prune_quantize']):.2f}" in done.out and f"{math.exp(row['quantize_prune']):.2f}" in done.out
    done = run(*words[:-1], "--quantize", "w3")
    assert done.code == 2 and "unknown way to quantize 'w3'" in done.error


def test_what_cannot_be_quantized_is_a_note(model: Model, tmp_path: Path, coarse: list[Any]) -> None:
    """One recipe's trouble is no other's: the row stays, without figures for the orders."""
    orders = importlib.import_module("depthprune.orders").Orders
    real = orders.then
    tries: list[Plan] = []

    def fails(self: Any, plan: Plan, rows: Any) -> Any:
        tries.append(plan)
        if len(tries) == 1:
            raise OptionError("groups of 32 do not divide it")
        return real(self, plan, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "then", fails)
        value = compare(model, tmp_path, ("sleb", "llm-drop-attn"), quantize="w4a16")
    rows = {row["recipe"]: row for row in value["rows"]}
    assert rows["sleb"]["note"] == "groups of 32 do not divide it" and rows["sleb"]["prune_quantize"] is None
    assert rows["llm-drop-attn"]["prune_quantize"] > 0 and len(tries) == 2
    assert tables.compared(value)
