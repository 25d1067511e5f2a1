"""The package's face: its names, how little importing it loads, and functions that submodules do not displace."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import depthprune as dp

HEAVY = {"torch", "transformers", "numpy", "datasets", "matplotlib", "pyarrow", "accelerate", "rich", "typer"}


def run(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(code: str) -> set[str]:
    return HEAVY & set(run(f"{code}\nimport sys\nprint(*sys.modules)").split())


def test_the_names_are_sorted_and_each_is_there() -> None:
    assert dp.__all__ == sorted(dp.__all__) and len(set(dp.__all__)) == len(dp.__all__)
    for name in dp.__all__:
        value = getattr(dp, name)
        assert not isinstance(value, ModuleType)
        if name != "__version__":
            assert value.__name__ == name and value.__module__.startswith("depthprune.")
            assert inspect.getdoc(value)


def test_a_star_gives_the_names() -> None:
    space: dict[str, object] = {}
    exec("from depthprune import *", space)
    assert set(dp.__all__) <= set(space)


def test_dir_lists_the_names() -> None:
    assert dir(dp) == dp.__all__
    assert (
        run("import depthprune as dp; print(dir(dp) == dp.__all__, 'torch' in __import__('sys').modules)")
        == "True False"
    )


def test_every_error_has_a_public_name() -> None:
    errors = importlib.import_module("depthprune.errors")
    assert {name for name in vars(errors) if name.endswith("Error")} <= set(dp.__all__)


@pytest.mark.parametrize("name", ["lod", "Model2", "torch", "_missing"])
def test_other_names_are_no_attributes(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'depthprune' has no attribute {name!r}"):
        getattr(dp, name)
    assert not hasattr(dp, name)


def test_importing_it_loads_nothing_heavy() -> None:
    assert loaded_after("import depthprune") == set()
    assert loaded_after("import depthprune as dp; dp.Plan; dp.Unit; dp.PlanError; dir(dp)") == set()
    assert loaded_after("import depthprune as dp; dp.Scores") == {"numpy"}  # what the check would see


NAMESAKES = sorted({module.name for module in pkgutil.iter_modules(dp.__path__)} & set(dp.__all__))


def test_there_are_submodules_named_like_functions() -> None:
    assert {"bench", "export", "report", "select"} <= set(NAMESAKES)


def test_a_submodule_that_comes_second_leaves_the_function() -> None:
    functions = [getattr(dp, name) for name in NAMESAKES]
    modules = [importlib.import_module(f"depthprune.{name}") for name in NAMESAKES]
    assert all(inspect.isfunction(function) for function in functions)
    assert [getattr(dp, name) for name in NAMESAKES] == functions
    assert [module.__name__ for module in modules] == [f"depthprune.{name}" for name in NAMESAKES]


def test_a_submodule_that_comes_first_does_not_take_the_functions_place() -> None:
    printed = run(
        f"import importlib\nimport depthprune as dp\nnames = {NAMESAKES}\n"
        "modules = [importlib.import_module('depthprune.' + name) for name in names]\n"
        "print(*(type(getattr(dp, name)).__name__ for name in names))\nprint(*(module.__name__ for module in modules))"
    )
    kinds, names = printed.splitlines()[-2:]
    assert set(kinds.split()) == {"function"}
    assert names.split() == [f"depthprune.{name}" for name in NAMESAKES]


def test_without_the_guard_a_submodule_would() -> None:
    """The twin: a plain module lets the import system put ``depthprune.report`` over the function."""
    unguarded = "import sys, types\nimport depthprune as dp\nsys.modules['depthprune'].__class__ = types.ModuleType\n"
    assert run(unguarded + "import depthprune.report\nprint(type(dp.report).__name__)") == "module"
    assert run("import depthprune as dp\nimport depthprune.report\nprint(type(dp.report).__name__)") == "function"


def test_other_attributes_can_still_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp, "report", print)
    assert dp.report is print
    monkeypatch.setattr(dp, "extra", 1, raising=False)
    assert vars(dp)["extra"] == 1
    assert isinstance(vars(dp)["units"], ModuleType)  # a submodule that shares no function's name
