"""Recipes: every file parses, names what exists, says where paper and code differ; and wrong ones are refused."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from depthprune import recipes, registry, sources
from depthprune.errors import OptionError
from depthprune.planning import ENDS
from depthprune.recipes import TYPES, Recipe, load, names, read
from depthprune.units import UNITS, Unit

ROOT = Path(__file__).parents[1]
FOLDER = Path(recipes.__file__).parent
PROTECTIONS = ("none", *ENDS)  # what `protect` may be besides a list of units
OWN = ("depthprune", "random")  # of no paper
PAPERS = {
    "2403.03853": 1,  # ShortGPT
    "2403.17887": 2,  # Gromov et al., and their simple rule
    "2402.09025": 1,  # SLEB
    "2402.02834": 3,  # Shortened LLaMA
    "2406.10594": 1,  # BlockPruner
    "2406.15786": 4,  # LLM-Drop
    "2407.16286": 5,  # A deeper look at depth pruning of LLMs
}


# What the recipes say


def wrong_specs(recipe: Recipe) -> list[str]:
    """What a recipe names that does not exist: metrics, selectors, their options, units, sources."""
    found = []
    for table, spec in (("metrics", recipe.metric), ("selectors", recipe.select)):
        try:
            registry.find(table, spec)
        except OptionError as error:
            found.append(f"{spec}: {error}")
    if recipe.unit not in UNITS:
        found.append(f"no unit {recipe.unit}")
    if recipe.protect is not None and recipe.protect not in PROTECTIONS:
        for unit in recipe.protect.split(","):
            Unit.parse(unit)
    if recipe.data is not None:
        (source,) = sources.parse(recipe.data)
        if len(source.path.split(":")) not in (2, 4, 5):
            found.append(f"{recipe.data}: no hub:NAME:CONFIG:SPLIT")
    return found


def undocumented(recipe: Recipe) -> list[str]:
    """What a recipe of ours leaves unsaid."""
    own = recipe.name in OWN  # takes the text that it is given
    needed = ("title", "notes") if own else ("title", "paper", "notes")
    found = [f"no {name}" for name in needed if not getattr(recipe, name)]
    sentences = (*recipe.notes, *(difference.why for difference in recipe.differences))
    found += [f"no sentence: {text}" for text in sentences if not re.fullmatch(r"[A-Z\d].{20,}\.", text)]
    if not own and recipe.data is None and not any(word in " ".join(recipe.notes) for word in ("text", "data")):
        found.append("neither data nor a sentence about it")
    found += [f"code.{d.field} says what the paper does" for d in recipe.differences if _same(recipe, d)]
    return found


def _same(recipe: Recipe, difference: recipes.Difference) -> bool:
    return getattr(recipe, difference.field) == difference.value


def test_the_recipes_of_the_papers_are_there() -> None:
    deeper = [f"deeper-look-{what}" for what in ("cosine", "l2", "shapley-logits", "shapley-loss", "task")]
    drop = [f"llm-drop-{what}" for what in ("attn", "block", "joint", "mlp")]
    shortened = [f"shortened-llama-{what}" for what in ("mag", "ppl", "taylor")]
    ours = ("angular", "blockpruner", *deeper, "depthprune", "last", *drop, "random", *shortened, "shortgpt", "sleb")
    assert names() == tuple(sorted(ours))
    papers = [load(name).paper for name in names() if name not in OWN]
    assert {paper: papers.count(paper) for paper in papers} == PAPERS


@pytest.mark.parametrize("name", names())
def test_every_recipe_names_what_exists_and_says_why(name: str) -> None:
    recipe = load(name)
    assert recipe.name == recipe.spec == name and not recipe.code
    assert not wrong_specs(recipe) and not undocumented(recipe)
    assert load(f"{name}:code=false") == recipe
    if not recipe.differences:
        with pytest.raises(OptionError, match="leave out code=true"):
            load(f"{name}:code=true")
        return
    code = load(f"{name}:code=true")
    assert code.code and code.spec == f"{name}:code=true"
    assert not wrong_specs(code)
    changed = {field for field in TYPES if getattr(code, field) != getattr(recipe, field)}
    assert changed == {difference.field for difference in recipe.differences}
    assert code.settings == recipe.settings | {d.field: d.value for d in recipe.differences}


def test_wrong_specs_are_seen() -> None:
    recipe = load("sleb")
    for wrong in (
        {"metric": "losss"},
        {"select": "greedy:exact=perhaps"},
        {"select": "greedy:speed=1"},
        {"metric": "cosine:token=last"},
        {"unit": "layer"},
        {"data": "hub:tatsu-lab/alpaca:train"},
    ):
        assert len(wrong_specs(replace(recipe, **wrong))) == 1, wrong


def test_unsaid_things_are_seen() -> None:
    recipe = load("sleb")
    (difference,) = recipe.differences
    for wrong in (
        {"paper": None},
        {"notes": (*recipe.notes, "see the paper")},
        {"differences": (replace(difference, why="It does."),)},
        {"dtype": difference.value},
        {"data": None, "notes": ("Only this sentence is here to be read.",)},
    ):
        assert len(undocumented(replace(recipe, **wrong))) == 1, wrong
    ours = load("depthprune")
    assert undocumented(replace(ours, notes=())) == ["no notes"]
    assert undocumented(replace(ours, name="theirs")) == ["no paper", "neither data nor a sentence about it"]


def test_every_field_is_documented() -> None:
    said = set(re.findall(r"``(\w+)``", Recipe.__doc__ or ""))
    assert said == {field.name for field in fields(Recipe)}
    assert {field.name for field in fields(Recipe)} >= set(TYPES)


def test_where_papers_differ_from_each_other() -> None:
    """The few settings that make the methods what they are."""
    assert load("angular").settings["metric"] == "angular:tokens=last"
    assert load("sleb").protect == "ends"
    assert load("shortened-llama-ppl:code=true").protect == "plus"
    assert load("depthprune").protect is None  # block 0's attention stays
    for name in ("sleb", "blockpruner"):
        assert (load(name).metric, load(name).select) == ("loss", "greedy:exact=true")
    assert {load(name).unit for name in names() if load(name).select == "joint"} == {"any"}
    assert all("plus=true" in load(f"shortened-llama-{what}").metric for what in ("taylor", "mag"))
    taylor = load("shortened-llama-taylor"), load("shortened-llama-taylor:code=true")
    assert [recipe.metric.split(",")[0].partition("=")[2] for recipe in taylor] == ["absolute", "signed"]


# Files of one's own

MINE = 'title = "Mine"\nunit = "mlp"\nmetric = "l1"\nselect = "lowest"\n'


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE + 'seed = 3\n[code.metric]\nvalue = "l2"\nwhy = "So it is."\n')
    recipe = load(str(path))
    assert recipe.spec == recipe.name == str(path)
    assert recipe.settings == {"unit": "mlp", "metric": "l1", "select": "lowest", "seed": 3}
    code = load(f"{path}:code=true")
    assert (code.metric, code.spec) == ("l2", f"{path}:code=true")
    assert load(code.spec) == code
    colon = tmp_path / "a:b.toml"
    colon.write_text(MINE)
    assert load(str(colon)).unit == "mlp"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("shortgtp", r"^unknown recipe 'shortgtp'\. Did you mean 'shortgpt'\? Available: angular, blockpruner, "),
        ("", "^unknown recipe ''"),
        ("../recipes/sleb", "^unknown recipe"),
        ("sleb:paper=true", r"^'paper=true' is no option of recipe 'sleb'; write sleb:code=true"),
        ("sleb:code", "^'code' is no option"),
        ("slep:code=true", "Did you mean 'sleb'"),
        ("shortgpt:code=true", "knows no difference between paper and code"),
        ("nowhere.toml", r"^cannot read the recipe nowhere\.toml: No such file"),
    ],
)
def test_wrong_names_are_told_the_right_ones(spec: str, says: str) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title = ", "mine.toml is not TOML: "),
        (MINE.replace("title", "titel"), "mine.toml: unknown field 'titel'. Did you mean 'title'?"),
        (MINE.replace('unit = "mlp"\n', ""), "mine.toml: unit is missing; a recipe needs title, unit, metric, select"),
        (MINE.replace("mlp", "layer"), "mine.toml: unit: unknown unit 'layer'"),
        (MINE.replace('"l1"', "1"), "mine.toml: metric must be text, not 1"),
        (MINE.replace("Mine", " "), "mine.toml: title must be text, not ' '"),
        (MINE + "seed = true", "mine.toml: seed must be a whole number of at least 0, not True"),
        (MINE + 'sequences = "8"', "mine.toml: sequences must be a whole number of at least 1, not '8'"),
        (MINE + "length = 1", "mine.toml: length must be a whole number of at least 2, not 1"),
        (MINE + 'dtype = "float"', "mine.toml: dtype: unknown dtype 'float'"),
        (MINE + 'notes = "one"', "mine.toml: notes must be a list of sentences"),
        (MINE + "notes = [1]", "mine.toml: notes must be a list of sentences"),
        (MINE + "code = true", "mine.toml: code must be tables such as [code.metric]"),
        (MINE + '[code]\nmetric = "l2"', "mine.toml: [code.metric] needs a value and why, and nothing else"),
        (MINE + '[code.metric]\nvalue = "l2"', "mine.toml: [code.metric] needs a value and why, and nothing else"),
        (MINE + '[code.metrik]\nvalue = "l2"\nwhy = "So."', "mine.toml: unknown field 'code.metrik'. Did you mean"),
        (MINE + '[code.metric]\nvalue = "l1"\nwhy = "So."', "mine.toml: code.metric.value is 'l1' already"),
        (MINE + '[code.seed]\nvalue = -1\nwhy = "So."', "mine.toml: code.seed.value must be a whole number"),
        (MINE + '[code.metric]\nvalue = "l2"\nwhy = ""', "mine.toml: code.metric.why must be text"),
    ],
)
def test_a_malformed_file_is_refused_with_its_field(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        load(str(path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{says}") and "\n" not in message


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(MINE.encode("utf-16"))
    with pytest.raises(OptionError, match="is not TOML"):
        read(path)


# The files travel with the package


def test_recipes_lie_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/depthprune"]}  # all that git does not ignore
    assert FOLDER == ROOT / "src" / "depthprune" / "recipes"
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", *map(str, FOLDER.glob("*.toml"))], check=False)
    assert ignored.returncode == 1  # none is


def test_reading_recipes_takes_no_torch() -> None:
    code = "import sys; from depthprune import recipes; recipes.load('sleb'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
