"""Prompt caches on disk: the same answers, and only for the model they were made with."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlxlm
from mlxlm.errors import CheckpointError, MlxlmError, PromptError, UsageError
from mlxlm.generation.prompt_cache import (
    chat_tokens,
    load_prompt_cache,
    make_prompt_cache,
    model_fingerprint,
    save_prompt_cache,
)
from mlxlm.layers import CacheSpec

TEXT = "Once upon a time,"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("spec", [CacheSpec(), CacheSpec(bits=8, group_size=32), CacheSpec(ragged=True)], ids=repr)
def test_the_answer_is_that_of_the_whole_prompt(tiny, tmp_path, chat, spec):
    model, tokenizer = tiny
    path = tmp_path / "story.safetensors"
    made = make_prompt_cache(model, tokenizer, TEXT, spec=spec, chat=chat)
    save_prompt_cache(path, model, tokenizer, made)
    held = load_prompt_cache(path, model, tokenizer)
    assert (held.tokens, held.text, held.chat, held.spec) == (made.tokens, TEXT, chat, spec)
    tokens = chat_tokens(tokenizer, TEXT + " there was", chat)
    options = {"max_tokens": 8, "logit_bias": dict.fromkeys(tokenizer.stop_ids, -1e9)}
    pieces = list(mlxlm.stream_generate(model, tokenizer, tokens, cache=held.begins(tokens), **options))
    assert pieces[0].cached_tokens == len(made.tokens) >= len(TEXT)
    wanted = mlxlm.stream_generate(model, tokenizer, tokens, cache=model.make_cache(spec), **options)
    assert [p.token for p in pieces] == [p.token for p in wanted]


def test_another_model_or_tokenizer_is_refused(tiny, tmp_path):
    model, tokenizer = tiny
    path = tmp_path / "story.safetensors"
    save_prompt_cache(path, model, tokenizer, make_prompt_cache(model, tokenizer, TEXT))
    before = model_fingerprint(model)
    weight = model.decoder.layers[0].attention.query.weight
    model.decoder.layers[0].attention.query.weight = weight + 0.01
    assert model_fingerprint(model) != before
    with pytest.raises(UsageError, match="made with another model") as caught:
        load_prompt_cache(path, model, tokenizer)
    assert "\n" not in str(caught.value)
    model.decoder.layers[0].attention.query.weight = weight
    load_prompt_cache(path, model, tokenizer)
    tokenizer.stop_ids = frozenset([7])
    with pytest.raises(UsageError, match="made with another tokenizer"):
        load_prompt_cache(path, model, tokenizer)


def test_files_that_are_none_are_refused(tiny, tmp_path):
    model, tokenizer = tiny
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), {"a": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="is no prompt cache"):
        load_prompt_cache(other, model, tokenizer)
    with pytest.raises(MlxlmError, match="no such file"):
        load_prompt_cache(tmp_path / "none.safetensors", model, tokenizer)
    with pytest.raises(UsageError, match=r"\.safetensors file, not 'cache.bin'"):
        load_prompt_cache(tmp_path / "cache.bin", model, tokenizer)
    path = tmp_path / "story.safetensors"
    save_prompt_cache(path, model, tokenizer, make_prompt_cache(model, tokenizer, TEXT))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"story\.safetensors"):
        load_prompt_cache(path, model, tokenizer)


def test_a_prompt_that_begins_otherwise_is_refused(tiny):
    model, tokenizer = tiny
    made = make_prompt_cache(model, tokenizer, TEXT, chat=False)
    with pytest.raises(PromptError, match="doesn't begin with"):
        made.begins(tokenizer.encode("Something else"))
    with pytest.raises(PromptError, match="empty"):
        make_prompt_cache(model, tokenizer, "")


def test_an_encoder_decoder_has_none(tiny_seq2seq):
    with pytest.raises(UsageError, match="no prompt cache"):
        make_prompt_cache(*tiny_seq2seq, "abc")
