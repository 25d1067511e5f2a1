"""The exception tree, and the message for a wrong name."""

from __future__ import annotations

import re

import pytest

from depthprune import errors
from depthprune.errors import DepthpruneError, OptionError, unknown

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def test_the_docstring_draws_the_tree_that_is_there() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in CLASSES if kind is not DepthpruneError)
    assert all(kind.__base__ is DepthpruneError for kind in CLASSES if kind is not DepthpruneError)
    assert DepthpruneError.__base__ is Exception


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_says_what_it_is(kind: type[Exception]) -> None:
    assert kind.__doc__ and "\n" not in kind.__doc__


def test_a_wrong_name_is_told_the_nearest_and_all() -> None:
    error = unknown("metric", "cosin", ["loss", "cosine", "angular"])
    assert isinstance(error, OptionError)
    assert str(error) == "unknown metric 'cosin'. Did you mean 'cosine'? Available: angular, cosine, loss"


def test_a_name_like_no_other_gets_no_hint() -> None:
    assert str(unknown("metric", "xyzzy", iter(["loss", "l1"]))) == "unknown metric 'xyzzy'. Available: l1, loss"
