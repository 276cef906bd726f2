"""Rewards: verifiers, functions, what a wrong one is told."""

from __future__ import annotations

import json

import pytest

from mlxlm.alignment import Answered, reward_of
from mlxlm.alignment.rewards import checked, value_of
from mlxlm.errors import DataError, UsageError


def rewards(name, *pairs, **row):
    return checked(reward_of(name), [Answered(prompt, answer, row) for prompt, answer in pairs])


def test_arithmetic_reads_the_last_number_of_the_answer():
    asked = [
        ("12+30=", "42"),
        ("12+30=", "43"),
        ("What is 2 * (3 + 4)?", "That is 2 * 7 = 14."),
        ("7/2=", "3.50"),
        ("1+1=", ""),
    ]
    assert rewards("arithmetic", *asked) == [1, 0, 1, 1, 0]
    assert rewards("arithmetic", ("How many sheep?", "1,204 sheep"), answer=1204) == [1]
    assert rewards("arithmetic", ("How many sheep?", "-5"), answer="5") == [0]


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        ("3 - 10 =", -7),
        ("-3+1", -2),
        ("29+04=", 33),
        ("1.05 + 000.5", 1.55),
        ("17 // 5 and then 17 % 5 =", 2),
        ("Add 12 + 30 * 2, please.", 72),
        ("(1+2)*(3+4)=", 21),
    ],
)
def test_values_of_calculations(prompt, value):
    assert value_of(prompt) == value


@pytest.mark.parametrize("prompt", ["How are you?", "5", "1 / 0 =", "2 ** 9999999 ="])
def test_a_prompt_without_a_calculation_is_told(prompt):
    with pytest.raises(DataError, match="no calculation"):
        value_of(prompt)


def test_patterns():
    assert rewards(r"regex:^(yes|no)\.$", ("?", "yes."), ("?", "yes, well")) == [1, 0]
    assert rewards("regex:a:b", ("?", "a:b")) == [1]
    with pytest.raises(UsageError, match="no regular expression"):
        reward_of("regex:(")


def test_schemas(tmp_path):
    pytest.importorskip("jsonschema")
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}))
    answers = [("?", '{"age": 5}'), ("?", '{"age": "5"}'), ("?", "five"), ("?", "[]")]
    assert rewards(f"json-schema:{file}", *answers) == [1, 0, 0, 0]
    file.write_text('{"type": "objekt"}')
    with pytest.raises(UsageError, match="is no schema"):
        reward_of(f"json-schema:{file}")


def test_functions_of_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def length(answers):\n    return [len(one.answer) for one in answers]\n")
    monkeypatch.chdir(tmp_path)
    assert rewards("my_rewards:length", ("?", "abc"), ("?", "")) == [3, 0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("aritmetic", "expected arithmetic"),
        ("no_such_module:f", "can't be imported"),
        ("json:nothing_there", "can't be"),
    ],
)
def test_unknown_rewards(name, text):
    with pytest.raises(UsageError, match=text):
        reward_of(name)


@pytest.mark.parametrize(
    ("given", "text"), [([1.0], "1 rewards for 2 answers"), ([1.0, float("nan")], "gave nan"), ([1.0, "2"], "gave '2'")]
)
def test_what_a_function_gives_is_checked(given, text):
    with pytest.raises(UsageError, match=text):
        checked(lambda answered: given, [Answered("?", "a"), Answered("?", "b")])
