"""Encoder-decoder models: the same answers as transformers, alone and in padded batches, and every way to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxlm
from mlxlm.errors import PromptError, UnsupportedModelError, UsageError
from mlxlm.generation import Sampling, batch_generate
from mlxlm.generation.steps import make_steps
from mlxlm.models import load_model
from mlxlm.tokenizers import load_tokenizer

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures" / "goldens" / "generation.json").read_text())
TOKENIZERS = Path(__file__).parent.parent / "fixtures" / "tokenizers"
GREEDY = [row for row in GOLDEN["rows"] if not row["options"]]
PROMPT = "sum: a text, to be made shorter"


@pytest.mark.parametrize("row", GREEDY, ids=lambda row: row["fixture"])
def test_greedy_answers_equal_those_of_transformers(row, fixture_model):
    model = load_model(fixture_model(row["fixture"]))
    for prompt, (answer,) in zip(row["prompts"], row["answers"], strict=True):
        steps, tokens = make_steps(model), []
        logits = steps.start([prompt])
        while True:
            tokens.append(mx.argmax(logits[0]).item())
            if tokens[-1] in GOLDEN["stops"] or len(tokens) == GOLDEN["max_tokens"]:
                break
            logits = steps.step(mx.array(tokens[-1:]))
        assert tokens == answer["tokens"]


def test_a_stream_is_the_argmax_of_one_pass_after_another(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    source = mx.array([tokenizer.encode(PROMPT)])
    pieces = list(
        mlxlm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=9, logit_bias=dict.fromkeys(tokenizer.stop_ids, -1e9)
        )
    )
    decoder = [model.config.decoder_start]
    for piece in pieces:
        logits = np.array(model(source, decoder_tokens=mx.array([decoder]))[0, -1, : tokenizer.vocab_size])
        logits[list(tokenizer.stop_ids)] = -1e9
        assert piece.token == logits.argmax()
        decoder.append(piece.token)
    assert pieces[-1].finish_reason == "length"
    assert {piece.prompt_tokens for piece in pieces} == {source.shape[1]}


def test_a_stop_token_ends_an_answer(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    (stop,) = tokenizer.stop_ids
    pieces = list(mlxlm.stream_generate(model, tokenizer, PROMPT, max_tokens=9, logit_bias={stop: 1e9}))
    assert [(piece.token, piece.text, piece.finish_reason) for piece in pieces] == [(stop, "", "stop")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_padded_batch_gives_each_prompt_its_own_answer(tiny_seq2seq, temperature):
    model, tokenizer = tiny_seq2seq
    prompts = [PROMPT, "a", "what? me!", "b c", "translate: one"]
    sampling = Sampling(temperature=temperature, seed=3)
    together = batch_generate(model, tokenizer, prompts, max_tokens=10, batch_size=3, sampling=sampling)
    alone = [
        mlxlm.generate(model, tokenizer, prompt, max_tokens=10, temperature=temperature, seed=3 + number)
        for number, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len(set(together)) > 1


def test_answers_of_a_batch_end_each_at_its_own_stop_token(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    prompts = [PROMPT, "a", "what? me!", "b c"]
    whole = batch_generate(model, tokenizer, prompts, max_tokens=12)
    stop = tokenizer.token_id(whole[0][2])
    cut = batch_generate(model, tokenizer, prompts, max_tokens=12, stop_tokens=[stop])
    assert cut == [text.split(whole[0][2])[0] for text in whole]


def test_a_repetition_penalty_counts_the_answer_alone(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    plain = mlxlm.generate(model, tokenizer, PROMPT, max_tokens=1)
    assert mlxlm.generate(model, tokenizer, PROMPT + plain, max_tokens=1, repetition_penalty=1e9) != ""
    tokens = [p.token for p in mlxlm.stream_generate(model, tokenizer, PROMPT, max_tokens=9, repetition_penalty=1e9)]
    assert len(set(tokens)) == len(tokens)


def test_a_decoder_in_a_batch_goes_one_by_one(tiny):
    model, tokenizer = tiny
    prompts = ["Hello", "Good day to you"]
    expected = [mlxlm.generate(model, tokenizer, prompt, max_tokens=5) for prompt in prompts]
    assert batch_generate(model, tokenizer, prompts, max_tokens=5) == expected


def test_a_sentencepiece_vocabulary_frames_the_prompt(tiny_seq2seq_directory):
    directory, vocabulary = tiny_seq2seq_directory, TOKENIZERS / "sentencepiece_unigram" / "tokenizer.model"
    (directory / "tokenizer.json").unlink()
    shutil.copy(vocabulary, directory / "spiece.model")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 3}')
    tensors = {name: mx.array(np.array(x)) for name, x in mx.load(str(directory / "model.safetensors")).items()}
    rows = load_tokenizer(directory).vocab_size + 5  # some heads have more rows than there are words
    tensors["shared.weight"] = mx.random.normal((rows, 20), scale=0.25, key=mx.random.key(2))
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    model, tokenizer = mlxlm.load(directory)
    tokens = tokenizer.encode("translate this: hello <extra_id_0>")
    assert tokens[-2:] == [tokenizer.token_id("<extra_id_0>"), tokenizer.eos_id]
    pieces = list(mlxlm.stream_generate(model, tokenizer, "translate this: hello <extra_id_0>", max_tokens=8))
    assert pieces[0].prompt_tokens == len(tokens)
    assert all(piece.token < tokenizer.vocab_size for piece in pieces)
    shown = [piece.token for piece in pieces if piece.token not in tokenizer.stop_ids]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(shown)


def test_mistakes_are_refused(tiny_seq2seq, tiny_bert):
    model, tokenizer = tiny_seq2seq
    with pytest.raises(UsageError, match="encoder reads every prompt anew"):
        mlxlm.generate(model, tokenizer, PROMPT, cache=model.make_cache())
    with pytest.raises(UsageError, match="one string"):
        batch_generate(model, tokenizer, PROMPT)
    with pytest.raises(UsageError, match="batch_size is 0"):
        batch_generate(model, tokenizer, [PROMPT], batch_size=0)
    with pytest.raises(PromptError, match="empty"):
        batch_generate(model, tokenizer, ["a", ""])
    with pytest.raises(UsageError, match="decoder_tokens"):
        model(mx.array([[3, 4]]))
    with pytest.raises(UnsupportedModelError, match="encoder-only"):
        mlxlm.generate(*tiny_bert, "the")


def test_only_models_that_fit_are_encoded_and_decoded(tiny, tiny_bert):
    tokens = mx.array([[3, 4]])
    with pytest.raises(UnsupportedModelError, match="no encoder"):
        tiny[0].encode(tokens)
    with pytest.raises(UnsupportedModelError, match="no encoder-decoder"):
        tiny_bert[0].decode(tokens, mx.zeros((1, 2, 30)))
    with pytest.raises(UsageError, match="single stack"):
        tiny[0](tokens, decoder_tokens=tokens)
    with pytest.raises(UsageError, match="two coordinates"):
        tiny[0](tokens, blocks=tokens)


@pytest.mark.parametrize("keyword", ["positions", "prefix_lengths"])
def test_keywords_that_an_encoder_decoder_would_ignore_are_refused(tiny_seq2seq, keyword):
    tokens = mx.array([[3, 4]])
    with pytest.raises(UsageError, match="single stack"):
        tiny_seq2seq[0](tokens, decoder_tokens=tokens, **{keyword: mx.array([[1, 2]])})


def test_vectors_may_stand_for_the_encoders_tokens(tiny_seq2seq):
    model, _ = tiny_seq2seq
    tokens, decoder = mx.array([[3, 4, 9]]), mx.array([[0, 5]])
    vectors = model.embeddings.token(tokens)
    plain = model(tokens, decoder_tokens=decoder)
    assert mx.allclose(model(mx.zeros_like(tokens), decoder_tokens=decoder, vectors=vectors), plain, atol=1e-5)
