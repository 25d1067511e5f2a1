"""Options: sizes, early refusals, and groups that unfold into options of the command line."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from depthprune import options
from depthprune.console import Console
from depthprune.errors import BudgetError, OptionError
from depthprune.options import Calibration, Choice, Common, check, option, size


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
        (Choice(metric="cosin"), "25%", "unknown metric 'cosin'. Did you mean 'cosine'? Available: angular, cosine"),
        (Choice(metric="cosine:toke=last"), "25%", "cosine has no option 'toke'; it has: tokens"),
        (Choice(select="gredy"), "25%", "unknown selector 'gredy'. Did you mean 'greedy'? Available: contiguous"),
        (
            Choice(metric="cosine", select="greedy"),
            "25%",
            "greedy goes by the loss, not by cosine; choose --metric loss",
        ),
        (Choice(metric="l1:tokens=last", select="greedy:refresh=3"), "25%", "greedy goes by the loss, not by l1;"),
        (Choice(unit="atention"), "25%", "unknown unit 'atention'. Did you mean 'attention'? Available: any"),
    ],
)
def test_names_are_refused_before_a_model_is_loaded(choice: Choice, drop: str, fault: str) -> None:
    with pytest.raises(OptionError) as caught:
        check(choice, drop)
    assert str(caught.value).startswith(fault)


@pytest.mark.parametrize("drop", ["banana", "100%", "0%", "0", "0 blocks", "", "-5%", "8 bloks", "loss<=+5%"])
def test_budgets_that_no_model_meets_are_refused_before_a_model_is_loaded(drop: str) -> None:
    with pytest.raises(BudgetError, match="--drop"):
        check(Choice(), drop)


@pytest.mark.parametrize(
    "drop", ["25%", "99.9%", "9999 blocks", "1 unit", "params<=6e9", "kv<=50%", "kv<=0", "params<=70b"]
)
def test_budgets_that_some_model_meets_pass(drop: str) -> None:
    check(Choice(select="greedy:exact=true"), drop)
    check(Choice(metric="angular:tokens=last"), drop)  # no selector named: the metric decides
    check(Choice(metric="angular:tokens=last", select="contiguous"), drop)


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
