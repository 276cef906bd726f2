"""The official client of the protocol."""

from __future__ import annotations

import pytest

from mlxlm.generation import embed, generate

openai = pytest.importorskip("openai", reason="the official client isn't installed: pip install openai")
pytestmark = [
    pytest.mark.client,
    # The client leaves sockets of its own to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def official(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_completions_and_embeddings(official, small):
    assert [one.id for one in official.models.list()] == ["small"]
    answer = official.completions.create(model="small", prompt="hello", max_tokens=8, temperature=0)
    assert answer.choices[0].text == generate(*small, "hello", max_tokens=8)
    vectors = official.embeddings.create(model="small", input=["one", "two"])
    assert [one.embedding for one in vectors.data] == pytest.approx(embed(*small, ["one", "two"]), abs=1e-6)


def test_chats_whole_and_streamed(official):
    ask = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8}
    whole = official.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == 8
    stream = official.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8


def test_errors_are_the_clients_own(official):
    with pytest.raises(openai.BadRequestError, match="did you mean 'seed'"):
        official.completions.create(model="small", prompt="a", extra_body={"sead": 1})
    with pytest.raises(openai.NotFoundError):
        official.completions.create(model="other", prompt="a")
