"""Answers of a form, and tool calls that are required."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from small_server import events

pytest.importorskip("llguidance", reason="the extra `constrain` isn't installed")
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "maximum": 99}, "y": {"enum": ["a", "b"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}


def chat(writer, **more):
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 90, "seed": 1, **more}
    return httpx.post(f"{writer.url}/v1/chat/completions", json=body, timeout=60)


def fits(value):
    assert set(value) == {"x", "y"}
    assert value["x"] <= 99
    assert value["y"] in ("a", "b")


def test_answers_are_json_of_the_schema_or_match_the_expression(writer):
    form = {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": SCHEMA}}
    for choice in chat(writer, response_format=form, n=3).json()["choices"]:
        assert choice["finish_reason"] == "stop"
        fits(json.loads(choice["message"]["content"]))
    found = chat(writer, response_format={"type": "regex", "pattern": "(ab|c){2,9}"}).json()["choices"][0]
    assert re.fullmatch("(ab|c){2,9}", found["message"]["content"])


def test_a_required_call_is_one_of_the_tools(writer):
    for choice, names in (
        ("required", {"look", "other"}),
        ({"type": "function", "function": {"name": "look"}}, {"look"}),
    ):
        answer = chat(writer, tools=[TOOL, OTHER], tool_choice=choice).json()["choices"][0]
        assert answer["finish_reason"] == "tool_calls", answer
        assert answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["function"]["name"] in names
        if call["function"]["name"] == "look":
            fits(json.loads(call["function"]["arguments"]))


def test_a_streamed_call_is_the_same(writer):
    ask = {"tools": [TOOL], "tool_choice": "required", "temperature": 0}
    whole = chat(writer, **ask).json()["choices"][0]["message"]["tool_calls"][0]["function"]
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 90, "stream": True, **ask}
    with httpx.stream("POST", f"{writer.url}/v1/chat/completions", json=body, timeout=60) as response:
        got = [chunk["choices"][0] for chunk in events(response)[:-1]]
    (call,) = [call for choice in got for call in choice["delta"].get("tool_calls", [])]
    assert call["function"] == whole
    assert call["index"] == 0
    assert got[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"response_format": {"type": "xml"}}, "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "not"),
        ({"response_format": {"type": "regex", "pattern": "("}}, "unclosed group"),
        ({"response_format": {"type": "regex", "pattern": "a" * 20_000}}, "16384"),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL], "tool_choice": "required"}, "does not go with"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "'look'"),
    ],
)
def test_forms_that_can_not_be_kept_to_are_refused(writer, more, message):
    response = chat(writer, **more)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_forms_that_the_vocabulary_can_not_begin_are_refused_at_once(service, client):
    body = {"model": "small", "prompt": "a", "response_format": {"type": "regex", "pattern": "7+"}}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert "can't" in response.json()["error"]["message"]


def test_penalties_change_the_answer(service, client):
    ask = {"model": "small", "prompt": "hello", "temperature": 0, "max_tokens": 20}
    plain = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
    held = client.post("/v1/completions", json={**ask, "frequency_penalty": 2}).json()["choices"][0]["text"]
    assert len(set(held)) > len(set(plain))
