"""A chat answers as if every turn were read anew, but reads only what is new."""

from __future__ import annotations

import pytest

import mlxlm
from mlxlm.errors import PromptError
from mlxlm.generation import Conversation


def ask(conversation, text, **options):
    return "".join(piece.text for piece in conversation.ask(text, max_tokens=6, **options))


def test_turns_equal_a_fresh_reading_of_the_whole_conversation(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer, system="be")
    for text in ("hi", "no", "ok"):
        answer = ask(conversation, text)
        fresh = mlxlm.generate(model, tokenizer, conversation.messages[:-1], max_tokens=6)
        assert answer == fresh
        assert conversation.messages[-2:] == [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]


def test_a_second_turn_reads_only_what_is_new(tiny):
    conversation = Conversation(*tiny)
    ask(conversation, "hello there")
    second = list(conversation.ask("and", max_tokens=2))
    assert second[0].cached_tokens >= len(tiny[1].encode_chat([{"role": "user", "content": "hello there"}]))


def test_reset_forgets_all_but_the_system_message(tiny):
    conversation = Conversation(*tiny, system="be")
    first = ask(conversation, "hi")
    ask(conversation, "no")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be"}]
    assert ask(conversation, "hi") == first


def test_an_answer_given_up_half_way_is_kept_as_far_as_it_came(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    stream = conversation.ask("hi", max_tokens=6)
    shown = next(stream).text + next(stream).text
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": shown}
    answer = ask(conversation, "on")
    assert answer == mlxlm.generate(model, tokenizer, conversation.messages[:-1], max_tokens=6)


def test_a_turn_that_does_not_fit_is_taken_back(tiny):
    conversation = Conversation(*tiny)
    ask(conversation, "hi")
    before = list(conversation.messages)
    with pytest.raises(PromptError, match="context is 64"):
        ask(conversation, "x" * 70)
    assert conversation.messages == before
    assert ask(conversation, "a") == mlxlm.generate(*tiny, conversation.messages[:-1], max_tokens=6)


def test_a_text_that_can_not_be_encoded_leaves_the_conversation_as_it_was(tiny, monkeypatch):
    conversation = Conversation(*tiny)
    with pytest.raises(ValueError, match="half of a UTF-16 pair"):
        list(conversation.ask("\udcff"))
    assert conversation.messages == []
    assert ask(conversation, "hi")
