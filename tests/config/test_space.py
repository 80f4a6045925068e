"""A key's values: what a file may say, what is refused, and what lies inside."""

from __future__ import annotations

from typing import Any

import pytest

from ray_dwm.config.building import build
from ray_dwm.config.space import Domain, by_key, described, parse_domain
from ray_dwm.errors import ConfigError


def made(given: Any) -> Domain:
    return build(Domain, parse_domain("k", given))


@pytest.mark.parametrize(
    ("given", "points", "ends", "words"),
    [
        ({"int": ["1", "4"]}, [1, 2, 3, 4], [1, 4], "int from 1 to 4"),
        ({"int": ["2", "9"], "step": "3"}, [2, 5, 8], [2, 9], "int from 2 to 9, step 3"),
        ({"int": "1, 3", "log": "true"}, [1, 2, 3], [1, 3], "int from 1 to 3, log"),
        ({"float": ["0.1", "0.4"], "step": "0.1"}, [0.1, 0.2, 0.3, 0.4], [0.1, 0.4], "float from 0.1 to 0.4, step 0.1"),
        ({"float": ["1e-4", "1e-1"], "log": "true"}, [], [1e-4, 0.1], "float from 0.0001 to 0.1, log"),
        ({"choice": ["xs", "l"]}, ["xs", "l"], ["xs", "l"], "one of xs, l"),
    ],
)
def test_what_a_domain_holds(given: Any, points: list[Any], ends: list[Any], words: str) -> None:
    domain = made(given)
    assert domain.points == pytest.approx(points) if given.get("float") else domain.points == points
    assert domain.ends == ends
    assert described(domain) == words
    assert all(domain.holds(value) for value in domain.points)
    assert all(type(value) is type(end) for value, end in zip(domain.points, ends, strict=False))


@pytest.mark.parametrize(
    ("given", "inside", "outside"),
    [
        ({"int": ["1", "9"], "step": "4"}, [1, 5, 9], [0, 2, 10]),
        ({"int": ["1", "5"]}, [1, 2.0, 5], [1.5]),
        ({"float": ["0.5", "2"]}, [0.5, 1.234, 2], [0.49, 2.01]),
        ({"choice": ["16", "32"]}, ["16"], [16, "64"]),
    ],
)
def test_what_lies_inside(given: Any, inside: list[Any], outside: list[Any]) -> None:
    assert all(made(given).holds(value) for value in inside)
    assert not any(made(given).holds(value) for value in outside)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("5", " is '5': name its values, as {int"),
        ({"int": ["1", "5"], "choice": ["1"]}, "must have one kind"),
        ({"int": ["1", "5"], "logg": "true"}, "must have one kind"),
        ({"int": ["1"]}, "int takes two bounds"),
        ({"int": ["5", "1"]}, r"int: \[5, 1\] is empty"),
        ({"float": ["2", "2"]}, "is empty"),
        ({"float": ["0", "inf"]}, "not finite"),
        ({"int": ["1", "many"]}, "high is 'many': it must be of type float"),
        ({"int": ["1.5", "3"]}, "whole numbers are needed"),
        ({"int": ["0", "9"], "log": "true"}, "must begin above 0"),
        ({"float": ["1", "9"], "log": "true", "step": "1"}, "log and step exclude"),
        ({"float": ["1", "2"], "step": "3"}, "step is 3, it must fit"),
        ({"int": ["1", "9"], "step": "1.5"}, "not whole"),
        ({"choice": ["one"]}, "name at least two"),
        ({"choice": ["a", "a"]}, "names one twice"),
        ({"choice": ["a", "b"], "log": "true"}, "choice takes neither"),
    ],
)
def test_what_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"space\.k.*{reason}"):
        made(given)


def test_keys_may_be_dotted_or_sections() -> None:
    one, two = {"int": ["1", "2"]}, {"choice": ["a", "b"]}
    assert by_key({"a.b": one, "c": {"d": two}}) == {"a.b": one, "c.d": two}
