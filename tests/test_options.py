"""Options: sizes, early refusals, and groups that unfold into options of the command line."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from depthprune import options, recipes
from depthprune.console import Console
from depthprune.errors import BudgetError, OptionError
from depthprune.options import Calibration, Choice, Common, check, clipped, option, settled, size


@pytest.mark.parametrize(
    ("written", "amount"),
    [(None, None), ("4GB", 4_000_000_000), ("500mb", 500_000_000), (" 2.5 k ", 2500), ("17", 17), ("1T", 10**12)],
)
def test_sizes(written: str | None, amount: int | None) -> None:
    assert size(written) == amount


@pytest.mark.parametrize("written", ["banana", "", "GB", "4 GiB", "0", "-1GB", "nan", "inf", "1e999"])
def test_what_is_no_size(written: str) -> None:
    with pytest.raises(OptionError, match="--memory"):
        size(written)
    with pytest.raises(OptionError, match="--memory"):
        Calibration(memory=written)  # before any work


@pytest.mark.parametrize(
    ("choice", "drop", "fault"),
    [
        (
            Choice(metric="cosin"),
            "25%",
            "unknown metric 'cosin'. Did you mean 'cosine'? Available: angular, banzhaf, cosine",
        ),
        (Choice(metric="cosine:toke=last"), "25%", "cosine has no option 'toke'; it has: tokens"),
        (
            Choice(select="gredy"),
            "25%",
            "unknown selector 'gredy'. Did you mean 'greedy'? Available: beam, contiguous, evolve",
        ),
        (
            Choice(metric="cosine", select="greedy"),
            "25%",
            "greedy goes by what whole plans cost (loss, kl, js, logit_distance, error), not by cosine; "
            "choose one of these as --metric, or --select lowest or iterative",
        ),
        (
            Choice(metric="l1:tokens=last", select="greedy:refresh=3"),
            "25%",
            "greedy goes by what whole plans cost (loss, kl, js, logit_distance, error), not by l1;",
        ),
        (Choice(unit="atention"), "25%", "unknown unit 'atention'. Did you mean 'attention'? Available: any"),
    ],
)
def test_names_are_refused_before_a_model_is_loaded(choice: Choice, drop: str, fault: str) -> None:
    with pytest.raises(OptionError) as caught:
        check(choice, drop)
    assert str(caught.value).startswith(fault)


@pytest.mark.parametrize(
    "drop", ["banana", "100%", "0%", "0", "0 blocks", "", "-5%", "8 bloks", "loss<=5%", "loss<=+5"]
)
def test_budgets_that_no_model_meets_are_refused_before_a_model_is_loaded(drop: str) -> None:
    with pytest.raises(BudgetError, match="--drop"):
        check(Choice(), drop)


@pytest.mark.parametrize(
    "drop",
    [
        "25%",
        "99.9%",
        "9999 blocks",
        "1 unit",
        "params<=6e9",
        "kv<=50%",
        "kv<=0",
        "params<=70b",
        "loss<=+5%",
        "loss<=2.5",
    ],
)
def test_budgets_that_some_model_meets_pass(drop: str) -> None:
    check(Choice(select="greedy:exact=true"), drop)
    check(Choice(metric="angular:tokens=last"), drop)  # no selector named: the metric decides
    check(Choice(metric="angular:tokens=last", select="contiguous"), drop)


# Recipes: given, else the recipe's, else the default


def test_without_a_recipe_the_defaults_hold() -> None:
    choice, calibration, common = settled(Choice(), Calibration(), Common())
    assert choice == Choice(unit="any", metric="loss", select=None, protect=None, recipe=None)
    assert calibration == Calibration(sequences=64, length=512) and common == Common(seed=0)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_fills_what_was_not_given(name: str) -> None:
    recipe = recipes.load(name)
    choice, calibration, common = settled(Choice(recipe=name), Calibration(), Common())
    assert choice == Choice(recipe.unit, recipe.metric, recipe.select, recipe.protect, name)
    assert calibration == Calibration(sequences=recipe.sequences or 64, length=recipe.length or 512)
    assert common == Common(seed=recipe.seed or 0, dtype=recipe.dtype)


def test_what_is_given_wins_over_the_recipe() -> None:
    given = Choice(unit="mlp", metric="kl", select="beam", protect="3", recipe="blockpruner", stability=2)
    mine = Calibration(sequences=5, length=16, field="body", memory="1GB")
    common = Common(seed=7, dtype="bfloat16", quiet=True)
    assert settled(given, mine, common) == (given, mine, common)
    for field in ("unit", "metric", "select", "protect"):  # each on its own
        choice, *_ = settled(replace(Choice(recipe="sleb"), **{field: getattr(given, field)}), mine, common)
        theirs = recipes.load("sleb")
        wanted = {name: getattr(theirs, name) for name in ("unit", "metric", "select", "protect")}
        assert vars(choice) == vars(Choice(recipe="sleb")) | wanted | {field: getattr(given, field)}


def test_the_code_of_a_paper_may_differ() -> None:
    paper, *_ = settled(Choice(recipe="shortened-llama-taylor"), Calibration(), Common())
    code, *_ = settled(Choice(recipe="shortened-llama-taylor:code=true"), Calibration(), Common())
    assert paper.metric is not None and code.metric is not None
    assert "accumulate=absolute" in paper.metric and "accumulate=signed" in code.metric


def test_a_recipe_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown recipe 'slep'\. Did you mean 'sleb'\?"):
        settled(Choice(recipe="slep"), Calibration(), Common())


@pytest.mark.parametrize(
    ("recipe", "length", "positions", "clip"),
    [
        ("sleb", 2048, 128, 128),
        ("sleb", 2048, 4096, 2048),
        ("sleb", 2048, None, 2048),
        ("sleb", None, 128, 128),  # what the default comes to
        ("sleb", None, 512, None),
        (None, 2048, 128, 2048),  # asked for: refused later, not changed in silence
    ],
)
def test_a_recipes_rows_fit_the_model(
    recipe: str | None, length: int | None, positions: int | None, clip: int | None
) -> None:
    model: Any = SimpleNamespace(positions=positions)
    given = Calibration(sequences=4, length=length)
    assert clipped(given, Choice(recipe=recipe), model) == replace(given, length=clip)


def made(seen: list[object]) -> typer.Typer:
    app = typer.Typer()

    @options.command(app)
    def work(
        console: Console,
        common: Common,
        calibration: Calibration,
        number: Annotated[int, option("--number", "A number.", least=1)] = 1,
    ) -> None:
        """Do something."""
        seen.extend([console, common, calibration, number])

    return app


def test_groups_unfold_and_fold_up_again() -> None:
    seen: list[object] = []
    words = ["--seed", "3", "--quiet", "--length", "16", "--number", "2", "--dtype", "bfloat16"]
    assert CliRunner().invoke(made(seen), words).exit_code == 0
    console, *rest = seen
    assert isinstance(console, Console) and console.quiet and not console.as_json
    assert rest == [Common(seed=3, dtype="bfloat16", quiet=True), Calibration(length=16), 2]


@pytest.mark.parametrize("words", [["--number", "0"], ["--length", "1"], ["--sequences", "0"], ["--length", "x"]])
def test_numbers_have_a_least_value(words: list[str]) -> None:
    seen: list[object] = []
    done = CliRunner().invoke(made(seen), words)
    assert done.exit_code == 2 and not seen and words[0] in done.output
