"""Answers of a form: always valid whatever the model says, with every kind of vocabulary, and else untouched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mlxlm.errors import SamplingError, UsageError
from mlxlm.generation import (
    Engine,
    Request,
    Sampling,
    batch_generate,
    generate,
    grammar,
    json_schema,
    regex,
    stream_generate,
)
from mlxlm.tokenizers import load_tokenizer

pytest.importorskip("llguidance", reason="the extra `constrain` isn't installed")
FIXTURES = Path(__file__).parent.parent / "fixtures" / "tokenizers"
SHIPPED = Path(__file__).parent.parent.parent / "mlxlm" / "shipped" / "python-stdlib"
KINDS = {
    "byte-level": lambda: load_tokenizer(SHIPPED),
    "byte-level files": lambda: load_tokenizer(FIXTURES / "byte_level_files"),
    "SentencePiece BPE": lambda: load_tokenizer(FIXTURES / "sentencepiece_bpe"),
    "SentencePiece unigram": lambda: load_tokenizer(FIXTURES / "sentencepiece_unigram"),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["a", "b é"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 300}, "maxItems": 3},
        "on": {"type": ["boolean", "null"]},
    },
    "required": ["name", "kind", "sizes", "on"],
    "additionalProperties": False,
}
SMALL = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def tokenizer(request):
    return request.param()


def drawn(constraint, tokenizer, seed, limit=400):
    """An answer of a model that finds every allowed token equally likely; None for one that doesn't end."""
    random, processor, answer = np.random.default_rng(seed), constraint.processor(), []
    while len(answer) < limit:
        allowed = np.flatnonzero(np.array(processor(answer)) == 0)
        token = int(random.choice(allowed))
        if token in tokenizer.stop_ids:
            return tokenizer.decode(answer)
        answer.append(token)
    return None


def fits(text):
    value = json.loads(text)
    assert list(value) == ["name", "kind", "sizes", "on"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 5
    assert value["kind"] in ("a", "b é")
    assert len(value["sizes"]) <= 3
    assert all(isinstance(size, int) and 0 <= size <= 300 for size in value["sizes"])
    assert value["on"] in (True, False, None)


def test_every_answer_is_json_of_the_schema(tokenizer):
    constraint = json_schema(tokenizer, SCHEMA)
    texts = [drawn(constraint, tokenizer, seed) for seed in range(12)]
    assert len(set(texts)) > 6
    for text in texts:
        fits(text)


PATTERNS = [r"[a-c]{2,5}(é|[0-9])?", " ?x+y", " {2}a", "(?i)yes|no", "", r"^a/b \"c$", r"a|\$"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_answer_matches_the_expression_as_a_whole(tokenizer, pattern):
    constraint = regex(tokenizer, pattern)
    if pattern == " {2}a" and tokenizer.decode(tokenizer.encode("  a", add_special_tokens=False)) != "  a":
        with pytest.raises(SamplingError, match="can't"):  # what this vocabulary can't write
            drawn(constraint, tokenizer, 0)
        return
    texts = [drawn(constraint, tokenizer, seed) for seed in range(12)]
    assert any(text is not None for text in texts)
    for text in texts:
        assert text is None or re.fullmatch(pattern, text), (pattern, text)


def test_what_allows_everything_changes_nothing(tokenizer):
    mask = np.array(regex(tokenizer, r"(?s:.)*").processor()([]))
    whole = [id for id in range(tokenizer.vocab_size) if _is_text(tokenizer, id)]
    assert len(whole) > 50
    assert (mask[whole] == 0).all()
    assert all(mask[id] == 0 for id in tokenizer.stop_ids)


def _is_text(tokenizer, id):
    if tokenizer.token(id) == "<0x20>":  # a space that isn't taken off, so no answer may begin with it
        return False
    try:
        return id not in tokenizer.special_ids and tokenizer.spell(id).decode() != ""
    except UnicodeDecodeError:
        return False


def test_tokens_spell_the_texts_they_are_decoded_to(tokenizer):
    for text in json.loads((FIXTURES / "texts.json").read_text()):
        ids = [id for id in tokenizer.encode(text, add_special_tokens=False) if id not in tokenizer.special_ids]
        spelled = b"".join(tokenizer.spell(id) for id in ids).decode("utf-8", "replace")
        assert tokenizer.decode(ids) in (spelled, spelled.removeprefix(" "), spelled.lstrip(" "))


@pytest.fixture(scope="module")
def shipped():
    import mlxlm

    return mlxlm.load(SHIPPED)


def test_greedy_answers_that_fit_anyway_are_the_same(shipped):
    model, tokenizer = shipped
    free = generate(model, tokenizer, "import os\n", max_tokens=20)
    assert generate(model, tokenizer, "import os\n", max_tokens=20, constraint=regex(tokenizer, "(?s:.)*")) == free
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 20}
    free = generate(model, tokenizer, "def ", **options)
    assert generate(model, tokenizer, "def ", **options, constraint=regex(tokenizer, "(?s:.)*")) == free


def test_a_model_keeps_to_a_form_alone_in_a_batch_and_in_the_engine(shipped):
    model, tokenizer = shipped
    form = json_schema(tokenizer, SMALL)
    prompts = ["x = ", "import json\nprint("]
    alone = [generate(model, tokenizer, prompt, max_tokens=40, constraint=form) for prompt in prompts]
    for text in alone:
        assert json.loads(text)["n"] in (1, 22)
    assert batch_generate(model, tokenizer, prompts, max_tokens=40, constraint=form) == alone
    words = tokenizer.vocab_size
    with Engine(model, words, max_rows=3) as engine:
        requests = [
            Request(
                tokens=tuple(tokenizer.encode(prompt)),
                max_tokens=40,
                stop_tokens=tokenizer.stop_ids,
                processors=(form.processor(words),) if bound else (),
            )
            for prompt, bound in ((prompts[0], True), (prompts[1], False), (prompts[1], True))
        ]
        results = [tokenizer.decode(handle.result(60).answer) for handle in map(engine.submit, requests)]
    assert [results[0], results[2]] == alone
    assert results[1] == generate(model, tokenizer, prompts[1], max_tokens=40)


def test_a_random_model_keeps_to_a_form_when_it_samples(tiny):
    model, tokenizer = tiny
    for seed in range(5):
        sampling = Sampling(temperature=1.5, seed=seed)
        pieces = list(
            stream_generate(model, tokenizer, "a", sampling=sampling, constraint=regex(tokenizer, "(ab|c){1,4}"))
        )
        assert re.fullmatch("(ab|c){1,4}", "".join(piece.text for piece in pieces))
        assert pieces[-1].finish_reason == "stop"


def test_a_form_that_the_vocabulary_can_not_write_ends_that_answer_only(tiny):
    model, tokenizer = tiny  # without any digit but 0
    with pytest.raises(SamplingError, match="can't"):
        regex(tokenizer, "7").processor()
    form = regex(tokenizer, "(a|b)(7|8)")
    with pytest.raises(SamplingError, match="can't"):
        generate(model, tokenizer, "a", constraint=form)
    with pytest.raises(SamplingError, match="can't"):
        batch_generate(model, tokenizer, ["a"], constraint=form)
    with Engine(model, 67, max_rows=2) as engine:
        good = engine.submit(Request(tokens=(9, 10), max_tokens=9))
        bad = engine.submit(Request(tokens=(9, 10), max_tokens=9, processors=(form.processor(67),)))
        with pytest.raises(SamplingError, match="can't"):
            bad.result(30)
        assert len(good.result(30).tokens) == 9
        assert engine.statistics().failed == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: json_schema(t, "{"), "not JSON"),
        (lambda t: json_schema(t, "[]"), "a JSON schema is an object"),
        (lambda t: json_schema(t, {"type": "nothing"}), "Invalid type: nothing"),
        (lambda t: json_schema(t, {"not": {}}), "Unimplemented keys"),
        (lambda t: json_schema(t, {"$ref": "http://example.com/x"}), "example.com"),
        (lambda t: regex(t, "("), "unclosed group"),
        (lambda t: regex(t, r"a\b"), "lookarounds"),
        (lambda t: regex(t, "a)?(b"), "unopened group"),
        (lambda t: grammar(t, "start: nothing"), "nothing"),
    ],
)
def test_forms_that_are_none_are_refused_in_one_line(tiny, make, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        make(tiny[1])
    assert "\n" not in str(caught.value)


def test_a_form_goes_with_no_guessing_and_needs_an_end(tiny, tiny_seq2seq):
    from mlxlm.generation import Speculation

    model, tokenizer = tiny
    with pytest.raises(UsageError, match="speculation"):
        generate(model, tokenizer, "a", constraint=regex(tokenizer, "a"), speculation=Speculation(prompt_lookup=2))
    model, tokenizer = tiny_seq2seq
    assert generate(model, tokenizer, "abc", constraint=regex(tokenizer, "a{3}b")) == "aaab"
    with pytest.raises(UsageError, match="one prompt at a time"):
        batch_generate(model, tokenizer, ["abc"], constraint=regex(tokenizer, "a"))


def test_vocabularies_that_look_at_neighbours_are_refused(tiny_bert):
    with pytest.raises(UsageError, match=r"neighbours|no token that ends"):
        regex(tiny_bert[1], "a")
