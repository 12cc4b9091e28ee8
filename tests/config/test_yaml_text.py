"""A key that a config gives twice is refused at every level, with both lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from featray.config import load
from featray.config.yaml_text import DuplicateKeyError, parse_yaml
from featray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "a: this key is given twice (lines 1 and 3); keep one, with all its values"),
        ("a:\n  b: 1\n  'b': 2\n", "a.b: this key is given twice (lines 2 and 3); keep one"),
        ("a:\n- {b: 1, b: 1}\n", "a.0.b: this key is given twice (line 2, twice)"),
        ('{"a": 1,\n "a": 2}', "a: this key is given twice (lines 1 and 2)"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}\n", "c.<<: this key is given twice"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_its_lines(text: str, problem: str) -> None:
    with pytest.raises(DuplicateKeyError) as caught:
        parse_yaml(text)
    (found,) = caught.value.problems
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1\n'1': 2\n1: 3\n", {"a": 1, "1": 2, 1: 3}),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: *x\n", {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 1}}),
        ("a: &x [*x]\n", None),
    ],
)
def test_other_texts_have_the_value_that_yaml_gives_them(text: str, value: object) -> None:
    parsed = parse_yaml(text)
    assert value is None or parsed == value


def test_a_config_names_every_key_that_it_gives_twice(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("source: {uri: a}\nmodel: {uri: b, uri: c}\nsource: {uri: d}\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["model.uri", "source"]
    with pytest.raises(ConfigError, match=r"--set source: .*\n.*uri: this key is given twice"):
        load({}, ["source={uri: a, uri: b}"])
