"""The endpoints: what they give is what the library gives, and what they can't do they say."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from small_server import events

from mlxlm.generation import embed, generate, stream_generate


def complete(client, **body):
    return client.post("/v1/completions", json={"model": "small", "temperature": 0, **body})


def chat(client, text="hello", **body):
    messages = body.pop("messages", [{"role": "user", "content": text}])
    return client.post(
        "/v1/chat/completions", json={"model": "small", "messages": messages, "temperature": 0, "max_tokens": 9, **body}
    )


def test_a_completion_is_what_generate_gives(client, small):
    body = complete(client, prompt="hello", max_tokens=12).json()
    assert body["choices"][0]["text"] == generate(*small, "hello", max_tokens=12)
    assert body["object"] == "text_completion"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert body["choices"][0]["finish_reason"] == "length"


def test_several_prompts_and_answers_come_in_order(client, small):
    prompts = ["one", [20, 21, 22]]
    body = complete(client, prompt=prompts, max_tokens=5, n=2).json()
    wanted = [generate(*small, prompt, max_tokens=5) for prompt in prompts for _ in range(2)]
    assert [choice["text"] for choice in body["choices"]] == wanted
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]


def test_seeds_repeat_and_count_on(client):
    def ask(**more):
        body = complete(client, prompt="a", max_tokens=12, temperature=1, **more).json()
        return [choice["text"] for choice in body["choices"]]

    both = ask(seed=7, n=2)
    assert both == ask(seed=7, n=2)
    assert both == [*ask(seed=7), *ask(seed=8)]
    assert both[0] != both[1]
    assert ask(seed=-3) == ask(seed=-3)


def test_a_stream_gives_the_same_text_in_pieces(client, small):
    with client.stream(
        "POST",
        "/v1/completions",
        json={
            "model": "small",
            "prompt": "hello",
            "max_tokens": 12,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        got = events(response)
    assert got[-1] == "DONE"
    assert got[-2]["usage"]["completion_tokens"] == 12
    assert got[-2]["choices"] == []
    texts = [chunk["choices"][0]["text"] for chunk in got[:-2]]
    assert len(texts) > 3
    assert "".join(texts) == generate(*small, "hello", max_tokens=12)
    assert [chunk["choices"][0]["finish_reason"] for chunk in got[:-2]] == [None] * (len(texts) - 1) + ["length"]


def test_a_chat_is_rendered_by_the_template(client, small):
    model, tokenizer = small
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = chat(client, messages=messages).json()
    plain = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    tokens = tokenizer.encode_chat(plain)
    assert body["choices"][0]["message"]["content"] == generate(model, tokenizer, tokens, max_tokens=9)
    assert body["usage"]["prompt_tokens"] == len(tokens)
    assert body["object"] == "chat.completion"


def test_a_chat_stream_opens_with_the_role(client):
    whole = chat(client).json()["choices"][0]["message"]["content"]
    body = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json={**body, "max_completion_tokens": 9}) as response:
        got = events(response)
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in got[1:-1]) == whole
    assert {chunk["object"] for chunk in got[:-1]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in got[:-1]}) == 1


def test_stop_strings_end_the_answer_and_free_its_row(client, small):
    whole = generate(*small, "hello", max_tokens=30)
    stop = whole[7:9]
    body = complete(client, prompt="hello", max_tokens=30, stop=[stop, "never there"]).json()
    assert body["choices"][0]["text"] == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_the_model(client, small):
    pieces = list(stream_generate(*small, "hello", max_tokens=6, likelihoods=2))
    wanted = [piece.log_probability for piece in pieces]
    found = complete(client, prompt="hello", max_tokens=6, logprobs=2).json()["choices"][0]["logprobs"]
    assert np.allclose(found["token_logprobs"], wanted, atol=1e-5)
    tokenizer = small[1]
    assert found["tokens"] == [tokenizer.decode([piece.token]) for piece in pieces]
    assert [set(one) for one in found["top_logprobs"]] == [
        {tokenizer.decode([token], skip_special_tokens=False) for token, _ in piece.likeliest} for piece in pieces
    ]
    assert found["text_offset"] == list(range(6))
    content = chat(client, logprobs=True, top_logprobs=3).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 9
    assert all(len(one["top_logprobs"]) == 3 for one in content)
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in content)
    assert all(bytes(one["bytes"]).decode() == one["token"] for one in content)


def test_embeddings_are_those_of_embed(client, small):
    texts = ["one", "a longer text", "three"] * 4
    wanted = embed(*small, texts)
    for form in ("float", "base64"):
        body = client.post("/v1/embeddings", json={"model": "small", "input": texts, "encoding_format": form}).json()
        vectors = [
            np.frombuffer(base64.b64decode(row["embedding"]), "<f4") if form == "base64" else row["embedding"]
            for row in body["data"]
        ]
        assert np.allclose(vectors, wanted, atol=1e-6)
        assert body["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_models_health_and_metrics(client):
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "small"
    assert client.get("/v1/models/small").json() == entry
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    complete(client, prompt="hello", max_tokens=3)
    text = client.get("/metrics").text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(samples["mlxlm_engine_generated_tokens_total"]) >= 3
    assert float(samples['mlxlm_http_responses_total{route="/v1/completions",status="200"}']) >= 1
    classes = [float(value) for name, value in samples.items() if name.startswith("mlxlm_first_token_seconds_bucket")]
    assert classes == sorted(classes)
    assert classes[-1] == float(samples["mlxlm_first_token_seconds_count"]) >= 1
    typed = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(any(name.startswith(one) for one in typed) for name in samples)


WRONG = {
    "unknown field": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "nested unknown field": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    "unsupported field": ({"suffix": "x"}, "suffix", "not supported"),
    "text for a number": ({"temperature": "1"}, "temperature", "a number of 0 to 2"),
    "true for a number": ({"max_tokens": True}, "max_tokens", "whole number"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "1 or more"),
    "too many tokens": ({"max_tokens": 5000}, "max_tokens", "4096"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    "too many answers": ({"n": 17}, "n", "1 to 16"),
    "too many prompts": ({"prompt": ["a"] * 9, "n": 2}, "n", "16"),
    "empty prompt": ({"prompt": ""}, "prompt", "not empty"),
    "a number for a prompt": ({"prompt": 3}, "prompt", "list of token ids"),
    "no prompts": ({"prompt": []}, "prompt", "empty list"),
    "no prompt": ({"prompt": None}, "prompt", "missing"),
    "foreign token": ({"prompt": [99]}, None, "token id 99"),
    "huge token": ({"prompt": [2**70]}, None, "token id"),
    "long prompt": ({"prompt": "a" * 5000}, None, "context is 4096"),
    "empty stop": ({"stop": ""}, "stop", "not empty"),
    "top_p of 0": ({"top_p": 0}, None, "top_p is 0"),
    "foreign bias": ({"logit_bias": {"99": 1}}, None, "token 99"),
    "bias of a word": ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    "best_of": ({"best_of": 3}, "best_of", "must be 1"),
    "stream options alone": ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
}


@pytest.mark.parametrize(("body", "param", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_completion_is_said(client, body, param, message):
    response = complete(client, **{"prompt": "a", "max_tokens": 2, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


WRONG_CHATS = {
    "no messages": ({"messages": []}, "at least one"),
    "a role": ({"messages": [{"role": "boss", "content": "x"}]}, "'system' or 'developer'"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "text only",
    ),
    "a field of a message": ({"messages": [{"role": "user", "content": "x", "y": 1}]}, "messages[0].y"),
    "top_logprobs alone": ({"top_logprobs": 2}, "logprobs=true"),
    "a template": ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "can't be set"),
    "a tool choice without tools": ({"tool_choice": "required"}, "needs tools"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "name is missing"),
    "a name with spaces": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "letters"),
    "arguments that are none": (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]},
            ]
        },
        "not a JSON object",
    ),
}


@pytest.mark.parametrize(("body", "message"), WRONG_CHATS.values(), ids=WRONG_CHATS)
def test_what_is_wrong_with_a_chat_is_said(client, body, message):
    response = chat(client, **body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_model_of_another_name_is_not_found(client):
    for body in ({"model": "gpt", "prompt": "a"}, {"model": 3, "prompt": "a"}):
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "small", "prompt": "a", "\\ud800": 1}', "unknown field"),
        (b'{"model": "small", "prompt": "\\ud800"}', ""),
    ],
)
def test_bodies_that_are_no_requests(client, content, message):
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_wrong_methods_paths_and_kinds_are_errors_of_the_protocol(client):
    for response, status in (
        (client.get("/v1/completions"), 405),
        (client.get("/nothing"), 404),
        (client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_an_encoder_embeds_and_says_why_it_does_not_answer(tiny_bert):
    import httpx
    from small_server import served

    with served(*tiny_bert) as service, httpx.Client(base_url=service.url) as client:
        body = client.post("/v1/embeddings", json={"model": "small", "input": "the is"}).json()
        assert np.allclose(body["data"][0]["embedding"], embed(*tiny_bert, ["the is"])[0], atol=1e-6)
        error = client.post("/v1/completions", json={"model": "small", "prompt": "a"}).json()["error"]
        assert "encoder-only" in error["message"]
        assert client.get("/v1/models").json()["data"][0]["generates"] is False
        assert client.get("/metrics").status_code == 200
