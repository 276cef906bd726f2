"""The bridge to lm_eval: what is asked is answered by one plain pass; through the library itself when it is there."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.errors import PromptError, UnsupportedModelError, UsageError
from mlxlm.generation import Requests, check_harness, generate, harness_model, run_harness


def log_softmax(logits):
    logits = np.array(logits, dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


PAIRS = [("the sky", " is"), ("the sky ", "is"), ("", "hello"), ("Why?", " not"), (" ", "a")]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_likelihood_is_that_of_one_pass(batch_size, tiny):
    model, tokenizer = tiny
    found = Requests(model, tokenizer, batch_size=batch_size).log_likelihoods(PAIRS)
    for (context, continuation), one in zip(PAIRS, found, strict=True):
        before = context.rstrip() or context
        ids = (
            tokenizer.encode(context + continuation)
            if context
            else [tokenizer.bos_id, *tokenizer.encode(continuation, add_special_tokens=False)]
        )
        start = len(tokenizer.encode(before)) if context else 1
        table = log_softmax(model(mx.array([ids]))[0])
        places = range(start, len(ids))
        assert one.log_probability == pytest.approx(sum(table[place - 1, ids[place]] for place in places), abs=1e-4)
        assert one.greedy == all(table[place - 1].argmax() == ids[place] for place in places)
    assert found[0].log_probability == pytest.approx(found[1].log_probability, abs=1e-4)


def test_what_the_model_would_say_is_greedy(tiny):
    model, tokenizer = tiny
    said = generate(model, tokenizer, "the sky is", max_tokens=3)
    (one,) = Requests(model, tokenizer).log_likelihoods([("the sky is", said)])
    assert one.greedy


def test_a_long_context_loses_its_beginning(tiny):
    model, tokenizer = tiny
    requests = Requests(model, tokenizer, max_length=5)
    (long,) = requests.log_likelihoods([("abcdefgh", "ij")])
    ids = tokenizer.encode("abcdefghij", add_special_tokens=False)[-6:]
    table = log_softmax(model(mx.array([ids[:-1]]))[0])
    assert long.log_probability == pytest.approx(table[3, ids[4]] + table[4, ids[5]], abs=1e-4)


def test_a_text_is_rolled_over_in_windows(tiny):
    model, tokenizer = tiny
    text = "abcdefghij"
    (whole, again) = Requests(model, tokenizer, max_length=4, batch_size=3).rolling([text, text])
    assert whole == pytest.approx(again, abs=1e-5)
    ids = [tokenizer.bos_id, *tokenizer.encode(text, add_special_tokens=False)]
    total = 0.0
    for begin, counted in ((0, 4), (4, 4), (6, 2)):  # the harness's own example of ten tokens
        table = log_softmax(model(mx.array([ids[begin : begin + 4]]))[0])
        total += sum(table[place, ids[begin + place + 1]] for place in range(4 - counted, 4))
    assert whole == pytest.approx(total, abs=1e-4)


def test_answers_end_before_a_stop_string(tiny):
    model, tokenizer = tiny
    requests = Requests(model, tokenizer)
    whole = generate(model, tokenizer, "hello", max_tokens=9)
    assert requests.answer("hello", {"max_gen_toks": 9, "do_sample": False, "temperature": 0.7}) == whole
    stop = whole[4]
    assert requests.answer("hello", {"until": stop, "max_gen_toks": 9}) == whole.split(stop)[0]
    assert requests.answer("hello", {"until": ["", stop], "max_gen_toks": 9}) == whole.split(stop)[0]
    with pytest.raises(UsageError, match="num_beams = 4"):
        requests.answer("hello", {"until": [], "num_beams": 4})


def test_an_encoder_decoder_reads_the_context_with_its_encoder(tiny_seq2seq):
    model, tokenizer = tiny_seq2seq
    requests = Requests(model, tokenizer)
    (one,) = requests.log_likelihoods([("what is", " this")])
    ids = tokenizer.encode(" this", add_special_tokens=False)
    decoder = mx.array([[model.config.decoder_start, *ids[:-1]]])
    table = log_softmax(model(mx.array([tokenizer.encode("what is")]), decoder_tokens=decoder)[0])
    assert one.log_probability == pytest.approx(sum(table[i, token] for i, token in enumerate(ids)), abs=1e-4)
    with pytest.raises(UnsupportedModelError):
        requests.rolling(["text"])


def test_mistakes_are_told(tiny, tiny_bert, monkeypatch):
    with pytest.raises(UsageError, match="max_length"):
        Requests(*tiny, max_length=100_000)
    with pytest.raises(UnsupportedModelError):
        Requests(*tiny_bert)
    with pytest.raises(PromptError, match="empty text"):
        Requests(*tiny).log_likelihoods([("a", "")])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install lm_eval"):
        run_harness(Requests(*tiny), ["toy"])


def test_a_missing_harness_is_told_before_a_model_is_read(monkeypatch):
    monkeypatch.setattr("mlxlm.generation.harness.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    with pytest.raises(UsageError, match="pip install lm_eval"):
        check_harness()
    monkeypatch.setattr("mlxlm.generation.harness.find_spec", lambda name: object())
    check_harness()


def stub():
    """A package with the names of lm_eval that are used, whose evaluation asks one thing of each kind."""

    class LM:
        def __init__(self):
            self.kept = []
            self.cache_hook = SimpleNamespace(add_partial=lambda *one: self.kept.append(one))

    class Manager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "toy"]

    def simple_evaluate(model, tasks, **options):
        ask = lambda *arguments: [SimpleNamespace(args=arguments)]  # noqa: E731
        values = {
            "pair": model.loglikelihood(ask("the sky", " is")),
            "text": model.loglikelihood_rolling(ask("abc")),
            "answer": model.generate_until(ask("hello", {"max_gen_toks": 4})),
            "kept": len(model.kept),
            "chat": model.apply_chat_template([{"role": "user", "content": "hi"}]),
            "limit": options["limit"],
        }
        return {"results": dict.fromkeys(tasks, values)}

    package, api, model, tasks = (ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "t"))
    model.LM, tasks.TaskManager = LM, Manager
    package.api, api.model, package.tasks, package.simple_evaluate = api, model, tasks, simple_evaluate
    return {"lm_eval": package, "lm_eval.api": api, "lm_eval.api.model": model, "lm_eval.tasks": tasks}


def test_the_harness_is_given_a_model_of_its_own_kind(tiny, monkeypatch):
    for name, module in stub().items():
        monkeypatch.setitem(sys.modules, name, module)
    requests = Requests(*tiny)
    found = run_harness(requests, ["toy"], limit=3)["toy"]
    (pair,) = requests.log_likelihoods([("the sky", " is")])
    assert found["pair"] == [(pair.log_probability, pair.greedy)]
    assert found["text"] == requests.rolling(["abc"])
    assert found["answer"] == [generate(*tiny, "hello", max_tokens=4)]
    assert found["chat"] == requests.tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert (found["kept"], found["limit"]) == (3, 3)
    with pytest.raises(UsageError, match="'toi'"):
        run_harness(requests, ["toi"])


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_lm_eval_itself_gets_the_same_answers(tiny, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the package lm_eval")
    docs = [
        {"question": "the sky", "choices": ["is", "a cup"], "label": 0, "text": "the sky is blue."},
        {"question": "Why", "choices": ["not", "zzz"], "label": 1, "text": "Why not?"},
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    kinds = {
        "multiple_choice": ('"{{question}}"', "label", "doc_to_choice: choices\nmetric_list: [{metric: acc}]"),
        "loglikelihood_rolling": ('""', '"{{text}}"', "metric_list: [{metric: bits_per_byte}]"),
    }
    for kind, (text, target, rest) in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(
            f"task: toy_{kind}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/docs.jsonl}}\n"
            f"test_split: test\noutput_type: {kind}\ndoc_to_text: {text}\ndoc_to_target: {target}\n{rest}\n"
        )
    requests = Requests(*tiny)
    found = run_harness(requests, [f"toy_{kind}" for kind in kinds], include_path=str(tmp_path))
    right = 0
    for doc in docs:
        scores = requests.log_likelihoods([(doc["question"], f" {choice}") for choice in doc["choices"]])
        right += np.argmax([score.log_probability for score in scores]) == doc["label"]
    assert found["toy_multiple_choice"]["acc,none"] == right / 2
    bits = -sum(requests.rolling([doc["text"] for doc in docs])) / np.log(2)
    assert found["toy_loglikelihood_rolling"]["bits_per_byte,none"] == pytest.approx(
        bits / sum(len(doc["text"]) for doc in docs), rel=1e-5
    )
    assert harness_model(requests).chat_template() == ""
