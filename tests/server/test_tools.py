"""Tool calls: what is offered, and how calls are told from text."""

from __future__ import annotations

import json

import pytest

from mlxlm.server.tools import ToolDialect, ToolReader

TAGGED = ToolDialect(begin="<tool_call>", end="</tool_call>")
LISTED = ToolDialect(begin="[TOOL_CALLS]", end="", listed=True)
BARE = ToolDialect(begin="", end="", arguments="parameters")
CALL = '{"name": "f", "arguments": {"x": "é"}}'

READ = {
    "text alone": (TAGGED, "no call < here <tool", "no call < here <tool", []),
    "a call": (TAGGED, f"<tool_call>\n{CALL}\n</tool_call>", "", ["f"]),
    "text and calls": (TAGGED, f"a <tool_call>{CALL}</tool_call>b<tool_call>{CALL}</tool_call>", "a b", ["f", "f"]),
    "no JSON": (TAGGED, "<tool_call>{x}</tool_call>.", "<tool_call>{x}</tool_call>.", []),
    "a call that isn't closed": (TAGGED, f"<tool_call>{CALL}", "", ["f"]),
    "half a call": (TAGGED, '<tool_call>{"name"', '<tool_call>{"name"', []),
    "a list": (LISTED, f"[TOOL_CALLS] [{CALL}, {CALL}]", "", ["f", "f"]),
    "text before a list": (LISTED, f"ok[TOOL_CALLS][{CALL}]", "ok", ["f"]),
    "a bare call": (BARE, '{"name": "f", "parameters": {"x": "é"}}', "", ["f"]),
    "JSON that is no call": (BARE, '{"a": 1}', '{"a": 1}', []),
    "text without a call": (BARE, 'so {"name"', 'so {"name"', []),
    "nothing": (BARE, "", "", []),
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("dialect", "answer", "text", "names"), READ.values(), ids=READ)
def test_calls_are_told_from_text_however_it_is_cut(dialect, answer, text, names, size):
    reader, out, calls = ToolReader(dialect), "", []
    for start in range(0, len(answer), size):
        passed, found = reader.add(answer[start : start + size])
        out, calls = out + passed, calls + found
    passed, found = reader.finish()
    out, calls = out + passed, calls + found
    assert out == text
    assert [call.body["function"]["name"] for call in calls] == names
    assert [call.number for call in calls] == list(range(len(names)))
    assert all(json.loads(call.body["function"]["arguments"]) == {"x": "é"} for call in calls)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_tools_reach_the_template(client, small):
    ask = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "temperature": 0}
    plain = client.post("/v1/chat/completions", json=ask).json()["usage"]["prompt_tokens"]
    shown = client.post("/v1/chat/completions", json={**ask, "tools": [TOOL]}).json()["usage"]["prompt_tokens"]
    assert shown == plain + len("look <tool_call>")
    hidden = client.post("/v1/chat/completions", json={**ask, "tools": [TOOL], "tool_choice": "none"}).json()
    assert hidden["usage"]["prompt_tokens"] == plain


def test_calls_of_the_past_and_their_results_reach_the_template(client):
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": "seen"}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "it"},
    ]
    body = {"model": "small", "messages": messages, "max_tokens": 2, "tools": [TOOL]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
