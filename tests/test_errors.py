"""The tree of errors is the one that is drawn, and a message says what, where, allowed, remedy."""

from __future__ import annotations

import re

import pytest

from runner import errors
from runner.errors import InputError, RunnerError, did_you_mean


def test_the_tree_is_the_one_that_is_drawn_at_the_top_of_the_file() -> None:
    drawn = set(re.findall(r"\w+Error\b", errors.__doc__ or ""))
    defined = {name for name in vars(errors) if name.endswith("Error")}
    assert drawn == defined
    leaves = defined - {"RunnerError", "InputError"}
    assert {kind.__name__ for kind in InputError.__subclasses__()} >= leaves
    assert issubclass(InputError, RunnerError)


def test_a_message_says_what_where_what_is_allowed_and_the_remedy() -> None:
    error = InputError("it is wrong", where="a.toml:3", allowed="right ones", remedy="correct it")
    assert str(error).splitlines() == [
        "it is wrong",
        "  where:   a.toml:3",
        "  allowed: right ones",
        "  remedy:  correct it",
    ]
    assert str(InputError("it is wrong", remedy="correct it")).count("\n") == 1


@pytest.mark.parametrize(
    ("found", "hint"),
    [("forcs", 'did you mean "forces"?'), ("energy_", 'did you mean "energy"?'), ("xyz", "")],
)
def test_a_near_word_is_suggested_and_a_far_one_is_not(found: str, hint: str) -> None:
    assert did_you_mean(found, ["energy", "forces"]) == hint
