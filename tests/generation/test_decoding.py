"""Generation: the same tokens as without a cache, and every way to end."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm.errors import PromptError, SamplingError, UnsupportedModelError, UsageError, WeightsError
from mlxlm.generation import Sampling, steps
from mlxlm.layers import KeyValueCache

PROMPT = "Hello, world"


def greedy_without_cache(model, tokens, count):
    """The definition: the likeliest next token of the whole text, again and again."""
    tokens, answer = list(tokens), []
    for _ in range(count):
        answer.append(mx.argmax(model(mx.array([tokens]))[0, -1]).item())
        tokens.append(answer[-1])
    return answer


def run(model, tokenizer, prompt, **options):
    return list(mlxlm.stream_generate(model, tokenizer, prompt, **options))


@pytest.fixture
def endless(tiny):
    """The tiny model, kept from ending its answer."""
    model, tokenizer = tiny
    return model, tokenizer, {"logit_bias": dict.fromkeys(tokenizer.stop_ids, -1000000000.0)}


@pytest.mark.parametrize("chunk", [1, 3, 512], ids="chunk{}".format)
def test_tokens_equal_those_without_a_cache(endless, monkeypatch, chunk):
    model, tokenizer, keep_on = endless
    monkeypatch.setattr(steps.prefill, "__defaults__", (chunk,))
    tokens = tokenizer.encode(PROMPT)
    pieces = run(model, tokenizer, PROMPT, max_tokens=20, **keep_on)
    expected = greedy_without_cache(model, tokens, 20)
    assert not set(expected) & tokenizer.stop_ids
    assert [piece.token for piece in pieces] == expected


def test_pieces_join_to_the_text_of_all_tokens(endless):
    model, tokenizer, keep_on = endless
    pieces = run(model, tokenizer, PROMPT, max_tokens=30, **keep_on)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode([piece.token for piece in pieces])
    assert mlxlm.generate(model, tokenizer, PROMPT, max_tokens=30, **keep_on) == "".join(p.text for p in pieces)


def test_counts_and_reasons(endless):
    model, tokenizer, keep_on = endless
    pieces = run(model, tokenizer, PROMPT, max_tokens=5, **keep_on)
    assert [piece.finish_reason for piece in pieces] == [None] * 4 + ["length"]
    assert [piece.generated_tokens for piece in pieces] == [1, 2, 3, 4, 5]
    assert {piece.prompt_tokens for piece in pieces} == {len(tokenizer.encode(PROMPT))}
    assert pieces[-1].decode_rate > 0
    assert pieces[-1].prompt_rate > 0


def test_a_stop_token_ends_the_answer_and_shows_nothing(endless):
    model, tokenizer, keep_on = endless
    tokens = [piece.token for piece in run(model, tokenizer, PROMPT, max_tokens=12, **keep_on)]
    ending = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    pieces = run(model, tokenizer, PROMPT, max_tokens=12, stop_tokens=[tokens[ending]], **keep_on)
    assert pieces[-1].finish_reason == "stop"
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens[:ending])


def test_a_stop_string_ends_the_answer_before_itself(endless):
    model, tokenizer, keep_on = endless
    text = mlxlm.generate(model, tokenizer, PROMPT, max_tokens=20, **keep_on)
    stop = text[7:10]
    pieces = run(model, tokenizer, PROMPT, max_tokens=20, stop=stop, **keep_on)
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_the_answer_ends_where_the_context_does(endless):
    model, tokenizer, keep_on = endless
    limit = model.config.max_length
    prompt = [5] * (limit - 3)
    pieces = run(model, tokenizer, prompt, max_tokens=50, **keep_on)
    assert len(pieces) == 3
    assert pieces[-1].finish_reason == "length"


def test_a_cache_saves_reading_the_shared_beginning(endless):
    model, tokenizer, keep_on = endless
    cache = model.make_cache()
    first = run(model, tokenizer, PROMPT, max_tokens=6, cache=cache, **keep_on)
    longer = tokenizer.encode(PROMPT) + [piece.token for piece in first] + tokenizer.encode("again")
    held = cache.length
    second = run(model, tokenizer, longer, max_tokens=6, cache=cache, **keep_on)
    assert second[0].cached_tokens == held > 0
    assert [p.token for p in second] == [p.token for p in run(model, tokenizer, longer, max_tokens=6, **keep_on)]


def test_messages_go_through_the_chat_template(tiny):
    model, tokenizer = tiny
    messages = [{"role": "user", "content": "hi"}]
    pieces = run(model, tokenizer, messages, max_tokens=1)
    assert pieces[0].prompt_tokens == len(tokenizer.encode_chat(messages)) > len(tokenizer.encode("hi"))


def test_a_cache_grows_in_blocks_and_keeps_what_it_holds():
    cache, steps, capacities = KeyValueCache(), [], []
    for i in range(3 * KeyValueCache.block):
        step = mx.full((1, 2, 1, 4), float(i))
        keys, values = cache.update(step, -step)
        steps.append(i)
        capacities.append(cache.capacity)
        if i % 97 == 0 or i % KeyValueCache.block in (0, KeyValueCache.block - 1):
            assert keys.shape == (1, 2, i + 1, 4)
            assert keys[0, 1, :, 3].tolist() == steps
            assert values[0, 0, :, 0].tolist() == [-s for s in steps]
        mx.eval(cache.arrays())
    assert len(set(capacities)) <= 3
    cache.trim(10)
    keys, _ = cache.update(mx.full((1, 2, 2, 4), 99.0), mx.zeros((1, 2, 2, 4)))
    assert keys[0, 0, :, 0].tolist() == [*range(10), 99.0, 99.0]


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("", {}, PromptError, "empty"),
        ([], {}, PromptError, "empty"),
        ([5, 67], {}, PromptError, "token id 67, but the model's ids run from 0 to 66"),
        ([5] * 64, {}, PromptError, "64 tokens, but the model's context is 64"),
        ("a", {"max_tokens": 0}, UsageError, "max_tokens is 0"),
        ("a", {"temprature": 1.0}, UsageError, "did you mean 'temperature'"),
        ("a", {"top_p": 2.0}, SamplingError, "top_p is 2.0"),
        ("a", {"sampling": Sampling(), "top_k": 1}, UsageError, "either sampling or its fields"),
    ],
    ids=["text", "tokens", "id", "long", "max", "typo", "domain", "both"],
)
def test_bad_input_gets_one_clear_line(tiny, prompt, options, error, words):
    with pytest.raises(error, match=words) as caught:
        mlxlm.stream_generate(*tiny, prompt, **options)
    assert "\n" not in str(caught.value)


def test_a_cache_that_holds_the_whole_prompt_is_refused(tiny):
    model, tokenizer = tiny
    cache = model.make_cache()
    model(mx.array([[5, 6, 7]]), cache=cache)
    with pytest.raises(PromptError, match="cache holds 3 tokens"):
        mlxlm.stream_generate(model, tokenizer, [5, 6, 7], cache=cache)
    with pytest.raises(UsageError, match="can't be cut to 4"):
        cache.trim(4)


def test_an_encoder_does_not_generate(tiny_bert):
    with pytest.raises(UnsupportedModelError, match="encoder-only"):
        mlxlm.stream_generate(*tiny_bert, "the")


@pytest.mark.parametrize("prompt", [7, None, [1, "2"], [1.5], [True], b"text", [[1, 2]]], ids=repr)
def test_a_prompt_of_another_type_is_refused(prompt, tiny):
    with pytest.raises(UsageError, match="a prompt is text, a list of token ids, or a list of chat messages"):
        mlxlm.generate(*tiny, prompt)


def test_ids_may_come_in_an_array(tiny):
    wanted = mlxlm.generate(*tiny, [5, 6, 7], max_tokens=3)
    assert mlxlm.generate(*tiny, np.array([5, 6, 7]), max_tokens=3) == wanted
    assert mlxlm.generate(*tiny, mx.array([5, 6, 7]), max_tokens=3) == wanted


@pytest.mark.parametrize("token", [-1, 67, 2**40])
def test_ids_beyond_the_table_are_refused(token, tiny):
    with pytest.raises(PromptError, match=f"token id {token}, but the model's ids run from 0 to 66"):
        mlxlm.generate(*tiny, [5, token])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"repetition_penalty": 1.3}], ids=repr)
def test_logits_that_are_no_numbers_stop_the_answer(options, tiny):
    model, tokenizer = tiny
    model.decoder.norm.weight = model.decoder.norm.weight * float("nan")
    with pytest.raises(WeightsError, match="not numbers"):
        mlxlm.generate(model, tokenizer, "abc", **options)
    with pytest.raises(WeightsError, match="not numbers"):
        mlxlm.generation.beam_search(model, tokenizer, ["abc"], max_tokens=3)
