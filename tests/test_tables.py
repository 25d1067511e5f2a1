"""Results as a person reads them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from depthprune import tables
from depthprune.scores import Scores
from depthprune.units import parse


def text(shown: object) -> list[list[str]]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    return [line.split() for line in capture.get().splitlines()]


class Kinds:
    """As much of a layout as a table of scores asks for."""

    def kind(self, unit: object) -> str:
        return f"kind-of-{unit}"


def test_scores_are_in_the_order_of_the_first_metric() -> None:
    first, second = parse(["0.mlp", "1.mlp"])
    loss = Scores("loss", {first: 2.0, second: -1.0}, {first: 0.5, second: 0.25})
    cosine = Scores("cosine", {first: 0.1, second: 0.2})
    shown = text(tables.scored({"loss": loss, "cosine": cosine}, Kinds(), "title"))  # type: ignore[arg-type]
    assert shown == [
        ["title"],
        ["unit", "kind", "loss", "cosine"],
        ["1.mlp", "kind-of-1.mlp", "-1.00000", "±", "0.25000", "0.20000"],
        ["0.mlp", "kind-of-0.mlp", "2.00000", "±", "0.50000", "0.10000"],
    ]


def test_models_are_compared_with_the_first() -> None:
    entry = {"parameters": 1_500_000, "bytes": 3_000_000, "kv_bytes_per_token": 512}
    models = [{"name": "a", "perplexity": 8.0, **entry}, {"name": "b", "perplexity": 10.0, **entry}]
    shown = text(tables.evaluated({"models": models, "text": {"name": "t.txt", "tokens": 12345}}))
    assert shown[0] == ["t.txt,", "12,345", "tokens"]
    assert shown[2:] == [
        ["a", "8.000", "1.000x", "1,500,000", "3.0M", "512"],
        ["b", "10.000", "1.250x", "1,500,000", "3.0M", "512"],
    ]


def test_what_was_not_timed_is_left_blank() -> None:
    models = [{"name": "a", "prefill_ms": 1.5, "decode_ms_per_token": None}, {"name": "b", "prefill_ms": 2.0}]
    assert text(tables.timed({"models": models}))[1:] == [["a", "1.500"], ["b", "2.000"]]


def test_the_conclusion_of_a_run() -> None:
    summary = {"drop": ["1", "2.mlp"], "perplexity": [10.0, 12.5], "parameters": [1000, 750]}
    summary |= {"kv_bytes_per_token": [0, 0], "prefill_ms": [2.0, 1.5]}
    shown = tables.conclusion(summary, Path("run"), Path("run/report.html"), passed=True)
    rows = [line.split() for line in shown.splitlines()]
    assert rows[1] == ["perplexity", "10.00", "12.50", "1.250x"]
    assert rows[2] == ["parameters", "1,000", "750", "0.750x"]
    assert rows[3] == ["KV", "cache", "bytes", "per", "token", "0", "0"]  # no ratio to nothing
    assert rows[4] == ["prefill,", "ms", "2.00", "1.50", "0.750x"]
    assert "dropped: 1 2.mlp\nproofs:  every one held" in shown
    assert "FAILED" in tables.conclusion(summary, Path("run"), Path("r"), passed=False)


def test_a_conclusion_about_a_model_that_gives_no_numbers() -> None:
    for pair, shown in (([10.0, None], ["10.00", "not", "finite"]), ([None, None], ["not", "finite"] * 2)):
        summary = {"drop": ["1"], "perplexity": pair}
        rows = tables.conclusion(summary, Path("run"), Path("r"), passed=False).splitlines()
        assert rows[1].split() == ["perplexity", *shown]
