"""Beam search finds what transformers finds, and what an exhaustive search finds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import mlx.core as mx
import pytest

import mlxlm
from mlxlm.errors import PromptError, SamplingError, UnsupportedModelError, UsageError
from mlxlm.generation import Beams, beam_search
from mlxlm.generation.beam import search
from mlxlm.models import load_model

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures" / "goldens" / "generation.json").read_text())
NAMES = sorted({row["fixture"] for row in GOLDEN["rows"]})


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_scores_equal_those_of_transformers(name, fixture_model):
    model = load_model(fixture_model(name))
    limits = [GOLDEN["max_tokens"]]
    words = model.config.embeddings.vocab_size
    searched = 0
    for row in GOLDEN["rows"]:
        options = row["options"]
        if row["fixture"] != name or not options:
            continue
        beams = Beams(
            num_beams=options["num_beams"],
            num_return=options["num_return_sequences"],
            length_penalty=options["length_penalty"],
            early_stopping=options["early_stopping"],
        )
        together = model.config.has_memory
        batches = [row["prompts"]] if together else [[prompt] for prompt in row["prompts"]]
        found = [
            answers
            for batch in batches
            for answers in search(
                model, batch, beams, stops=frozenset(GOLDEN["stops"]), limits=limits * len(batch), words=words
            )
        ]
        for ours, theirs in zip(found, row["answers"], strict=True):
            best = ours[: beams.num_return]
            assert [list(tokens) for _, tokens in best] == [answer["tokens"] for answer in theirs], options
            assert [score for score, _ in best] == pytest.approx([answer["score"] for answer in theirs], abs=1e-4)
            searched += 1
    assert searched == 48


def log_probability(model, prompt, answer):
    """Of an answer as a whole, from one pass over all of it."""
    logits = model(mx.array([[*prompt, *answer]]))[0]
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sum(scores[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


def test_with_enough_beams_the_best_of_all_answers_is_found(fixture_model):
    model = load_model(fixture_model("gpt2"))
    words, prompt, stop = 5, [7, 30, 12], 2
    every = [[a, b, c] for a, b, c in itertools.product(range(words), repeat=3) if stop not in (a, b)]
    every += [[a, stop] for a in range(words) if a != stop] + [[stop]]
    expected = sorted(((log_probability(model, prompt, answer), answer) for answer in every), reverse=True)
    beams = Beams(num_beams=40, num_return=40, length_penalty=0.0, early_stopping="never")
    (found,) = search(model, [prompt], beams, stops=frozenset({stop}), limits=[3], words=words)
    for (score, tokens), (best, answer) in zip(found[:20], expected[:20], strict=True):
        assert list(tokens) == answer
        assert score == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "bloom", "falcon", "mpt", "glm", "phi3", "gpt_neox"])
def test_every_family_searches_with_its_cache(name, loaded_models):
    model, prompt = loaded_models[name], [7, 30, 12, 9, 5, 6, 21]
    words = model.config.embeddings.vocab_size
    (found,) = search(model, [prompt], Beams(num_beams=4), stops=frozenset({3, 11}), limits=[9], words=words)
    assert len({answer for _, answer in found}) == 4
    for score, answer in found:
        assert score == pytest.approx(log_probability(model, prompt, answer) / len(answer), abs=1e-4)


def test_one_beam_is_greedy(tiny):
    model, tokenizer = tiny
    ((best,),) = beam_search(model, tokenizer, ["Hello, world"], beams=Beams(num_beams=1), max_tokens=9)
    assert best.text == mlxlm.generate(model, tokenizer, "Hello, world", max_tokens=9)


def test_each_prompt_gets_what_it_gets_alone(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    prompts = ["translate: one", "a", "sum: a longer text, to be padded to"]
    beams = Beams(num_beams=3, num_return=2)
    together = beam_search(model, tokenizer, prompts, beams=beams, max_tokens=8, batch_size=2)
    alone = [beam_search(model, tokenizer, [prompt], beams=beams, max_tokens=8)[0] for prompt in prompts]
    for some, single in zip(together, alone, strict=True):
        assert [one.tokens for one in some] == [one.tokens for one in single]
        assert [one.score for one in some] == pytest.approx([one.score for one in single], abs=1e-4)
        assert len(some) == 2
        assert some[0].score >= some[1].score


def test_scores_are_log_probability_by_length(tiny):
    model, tokenizer = tiny
    prompt = tokenizer.encode("Hello")
    for answer in beam_search(model, tokenizer, [prompt], beams=Beams(num_return=4, length_penalty=0.7), max_tokens=6)[
        0
    ]:
        expected = log_probability(model, prompt, answer.tokens) / len(answer.tokens) ** 0.7
        assert answer.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "num_return": 3}, "num_return is 3"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"early_stopping": "sometimes"}, "'sometimes'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(SamplingError, match=match):
        Beams(**options)


def test_bad_prompts_and_models_are_refused(tiny, tiny_bert):
    with pytest.raises(UsageError, match="one string"):
        beam_search(*tiny, "Hello")
    with pytest.raises(UsageError, match="max_tokens is 0"):
        beam_search(*tiny, ["Hello"], max_tokens=0)
    with pytest.raises(PromptError, match="empty"):
        beam_search(*tiny, [""])
    with pytest.raises(UnsupportedModelError, match="encoder-only"):
        beam_search(*tiny_bert, ["Hello"])
