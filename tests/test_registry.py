"""Names to functions: options from signatures, wrong names, and outsiders that load when asked for."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from depthprune import recipes, registry
from depthprune.errors import OptionError
from depthprune.registry import MEASURED, SEARCHES, TABLES, agree, find, names


def sample(
    oracle: object, *, on: bool = False, many: int = 1, rate: float = 0.5, word: str = "", odd: Any = None
) -> None:
    """A function with an option of every type; ``odd`` has none that a command line could give."""


def evaluated(oracle: object, **options: object) -> None: ...


# As in a module without postponed annotations.
evaluated.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("oracle", inspect.Parameter.POSITIONAL_ONLY),
        inspect.Parameter("on", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
        inspect.Parameter("many", inspect.Parameter.KEYWORD_ONLY, default=1, annotation=int),
    ]
)


@pytest.fixture(autouse=True)
def samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES["metrics"], "sample", f"{__name__}:sample")
    monkeypatch.setitem(TABLES["metrics"], "evaluated", f"{__name__}:evaluated")


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("sample", {}),
        ("sample:", {}),
        ("sample:on=true", {"on": True}),
        ("sample:on=False", {"on": False}),
        ("sample:many=3,rate=3", {"many": 3, "rate": 3.0}),
        ("sample:rate=1e-3", {"rate": 1e-3}),
        ("sample:word=last,many=-2,", {"word": "last", "many": -2}),
        ("sample:word=a=b", {"word": "a=b"}),
        ("sample:word=3", {"word": "3"}),
        ("sample:word=", {"word": ""}),
        ("evaluated:on=true,many=2", {"on": True, "many": 2}),
    ],
)
def test_options_are_read_by_the_signature(spec: str, options: dict[str, object]) -> None:
    name, function, found = find("metrics", spec)
    assert name == spec.partition(":")[0]
    assert function is globals()[name]
    assert found == options
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in options.items()}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sample:exact=true", "sample has no option 'exact'; it has: many, on, rate, word"),
        ("sample:odd=1", "sample has no option 'odd'; it has: many, on, rate, word"),
        ("sample:oracle=1", "sample has no option 'oracle'; it has: many, on, rate, word"),
        ("loss:tokens=last", "loss has no option 'tokens'; it has: none"),
        ("sample:many", "option 'many' of sample needs a value: sample:many=…"),
        ("sample:on=1", "sample:on is true or false, not '1'"),
        ("sample:on=", "sample:on is true or false, not ''"),
        ("sample:many=1.5", "sample:many needs a number (int), not '1.5'"),
        ("sample:many=", "sample:many needs a number (int), not ''"),
        ("sample:rate=fast", "sample:rate needs a number (float), not 'fast'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(spec: str, says: str) -> None:
    with pytest.raises(OptionError) as caught:
        find("metrics", spec)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("table", "spec", "near"),
    [
        ("metrics", "cosin", "cosine"),
        ("metrics", "relative-l1:tokens=last", "relative_l1"),
        ("selectors", "greedi", "greedy"),
        ("selectors", "contigous", "contiguous"),
    ],
)
def test_a_wrong_name_is_told_the_nearest_first_and_then_all(table: str, spec: str, near: str) -> None:
    with pytest.raises(OptionError) as caught:
        find(table, spec)
    name = spec.partition(":")[0]
    listed = ", ".join(names(table))
    assert str(caught.value) == f"unknown {table[:-1]} {name!r}. Did you mean {near!r}? Available: {listed}"


def test_every_name_of_every_table_is_there_and_says_what_it_does() -> None:
    for table, entries in TABLES.items():
        assert set(names(table)) >= set(entries) and list(names(table)) == sorted(names(table))
        for name in entries:
            found, function, options = find(table, name)
            assert found == name and callable(function) and options == {}
            assert name == "evaluated" or inspect.getdoc(function)


def test_the_options_that_papers_ask_for() -> None:
    assert find("metrics", "angular:tokens=last")[2] == {"tokens": "last"}
    assert find("selectors", "greedy:exact=true")[2] == {"exact": True}
    assert find("selectors", "greedy:refresh=4")[2] == {"refresh": 4}


@pytest.mark.parametrize("selector", TABLES["selectors"])
def test_searches_by_whole_plans_need_a_metric_of_whole_plans(selector: str) -> None:
    metrics = [name for name in TABLES["metrics"] if name not in ("sample", "evaluated")]
    refused = []
    for metric in metrics:
        try:
            agree(selector, metric)
        except OptionError as error:
            says = f"{selector} goes by what whole plans cost ({', '.join(MEASURED)}), not by {metric}; "
            assert str(error).startswith(says) and "--select lowest or iterative" in str(error)
            refused.append(metric)
    assert refused == ([name for name in metrics if name not in MEASURED] if selector in SEARCHES else [])


def test_what_agrees_is_in_the_tables() -> None:
    assert set(MEASURED) <= set(TABLES["metrics"]) and set(SEARCHES) <= set(TABLES["selectors"])


def test_a_function_stands_for_itself() -> None:
    assert find("metrics", sample) == ("sample", sample, {})


OUTSIDER = "depthprune_outsider"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package, installed as pip would: a module, and metadata with entry points."""
    (tmp_path / f"{OUTSIDER}.py").write_text(
        "def mine(oracle, units, *, power: int = 2): 'Mine.'\n\ndef loss(oracle, units): 'Not the one.'\n"
    )
    info = tmp_path / f"{OUTSIDER}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {OUTSIDER}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[depthprune.metrics]\nmine = {OUTSIDER}:mine\nloss = {OUTSIDER}:loss\nbroken = {OUTSIDER}_missing:x\n"
        f"[depthprune.selectors]\nchooser = {OUTSIDER}:mine\n"
        f"[depthprune.exporters]\nwriter = {OUTSIDER}:mine\n[depthprune.forms]\nother = {OUTSIDER}:mine\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop(OUTSIDER, None)


@pytest.mark.usefixtures("installed")
def test_outsiders_are_listed_at_once_and_loaded_when_asked_for() -> None:
    assert {"mine", "broken", "loss", "cosine"} <= set(names("metrics"))
    assert "chooser" in names("selectors") and "chooser" not in names("metrics")
    find("metrics", "cosine")
    assert OUTSIDER not in sys.modules
    name, function, options = find("metrics", "mine:power=3")
    assert OUTSIDER in sys.modules
    assert (name, function, options) == ("mine", sys.modules[OUTSIDER].mine, {"power": 3})
    with pytest.raises(OptionError, match="mine has no option 'exponent'; it has: power"):
        find("metrics", "mine:exponent=3")
    with pytest.raises(OptionError, match="Did you mean 'mine'"):
        find("metrics", "mines")


@pytest.mark.usefixtures("installed")
def test_forms_come_from_the_group_of_exporters() -> None:
    assert {"writer", "hf", "plain"} <= set(names("forms")) and "other" not in names("forms")
    assert find("forms", "writer:power=4")[1:] == (sys.modules[OUTSIDER].mine, {"power": 4})
    with pytest.raises(OptionError, match="unknown form 'other'"):
        find("forms", "other")


@pytest.mark.usefixtures("installed")
def test_a_built_in_name_cannot_be_taken_over() -> None:
    assert find("metrics", "loss")[1].__module__ == "depthprune.metrics.loss"
    assert names("metrics").count("loss") == 1


def test_without_the_outsider_its_name_is_unknown() -> None:
    with pytest.raises(OptionError, match="unknown metric 'mine'"):
        find("metrics", "mine")
    assert "mine" not in registry.names("recoverers")


# Names in the documentation


def undocumented(text: str) -> list[str]:
    """The metrics, selectors, their options and the recipes that a page does not name."""
    missing = []
    for table in ("metrics", "selectors"):
        for name in TABLES[table]:
            if name in ("sample", "evaluated"):
                continue
            said = next((part for part in text.split("\n") if re.match(rf"(\| )?`{name}`( \||:)", part)), None)
            if said is None:
                missing.append(name)
                continue
            start = text.index(said)  # a row of a table, or a paragraph
            place = said if said.startswith("|") else text[start:].split("\n\n")[0]
            parameters = inspect.signature(find(table, name)[1]).parameters.values()
            options = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
            missing += [f"{name}:{option}" for option in options if f"`{option}=" not in place]
    return missing + [name for name in recipes.names() if f"`{name}`" not in text.partition("## Recipes")[2]]


def test_ways_one_after_the_other() -> None:
    assert registry.ways("refit+distill:tokens=2M,top=4+tail") == ["refit", "distill:tokens=2M,top=4", "tail"]
    assert registry.ways("lora:targets=gate_proj+up_proj,rank=2+refit") == [
        "lora:targets=gate_proj+up_proj,rank=2",
        "refit",
    ]
    assert registry.ways("refit+distil") == ["refit", "distil"]  # a slip is seen as one


def unsaid(text: str) -> list[str]:
    """The recoverers and their options that a page does not name; those that all trainings share are named once."""
    missing = []
    for name in TABLES["recoverers"]:
        if re.search(rf"^(\| )?`{name}( |`|:)", text, re.MULTILINE) is None:
            missing.append(name)
        parameters = inspect.signature(find("recoverers", name)[1]).parameters.values()
        options = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        missing += [f"{name}:{option}" for option in options if not re.search(rf"[`:]{option}[`=]", text)]
    return missing


def test_every_recoverer_and_option_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recovery.md").read_text(encoding="utf-8")
    assert unsaid(page) == []
    assert unsaid(page.replace("`inner", "inner")) == ["refit:inner"]  # and its twins
    assert unsaid(page.replace("| `tail` |", "| tail |")) == ["tail"]


def test_every_name_and_option_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert undocumented(page) == []
    assert undocumented(page.replace("`subsets=10`", "ten")) == ["banzhaf:subsets"]  # and its twins
    assert undocumented(page.replace("| `beam` |", "| beam |")) == ["beam"]
    assert undocumented(page.replace("`sleb`", "sleb")) == ["sleb"]
