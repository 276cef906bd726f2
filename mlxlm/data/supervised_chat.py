"""Which tokens of a text are to be learned: pieces of a prompt and an answer, and the assistant's turns of a chat.

No template says where an answer begins, so the places are found by rendering: the messages before a turn with the
opening of an answer, and the messages up to the turn. Where the first is a prefix of the second, what follows it is the
turn. Every step of that is checked on the rendered text; a chat whose turns can't be told apart is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlxlm.errors import DataError

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

LossOn = Literal["assistant", "completion", "all"]
LOSS_ON = ("assistant", "completion", "all")
Piece = tuple[str, bool]  # a text, and whether it is to be learned


@dataclass(frozen=True)
class Scored:
    """tokens: ids.  scored: for each, whether it is to be predicted from those before it."""

    tokens: list[int]
    scored: list[bool]


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece], *, add_special_tokens: bool) -> Scored:
    """Ids of the pieces' text, and which of them belong to the pieces to be learned.

    Pieces are encoded one by one, as a model meets them: the prompt is encoded before there is an answer. Where that
    would be another text (a vocabulary that sets a space before each text, say), the whole is encoded instead, and a
    token that spans a boundary counts as part of the later piece.
    add_special_tokens: those that the vocabulary sets before a text; those after it are left to the caller.
    """
    whole = tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=add_special_tokens)
    whole = _without_end(tokenizer, whole) if add_special_tokens else whole
    tokens: list[int] = []
    scored: list[bool] = []
    for number, (text, learn) in enumerate(pieces):
        first = number == 0 and add_special_tokens
        ids = tokenizer.encode(text, add_special_tokens=first) if text or first else []
        ids = _without_end(tokenizer, ids) if first else ids
        tokens += ids
        scored += [learn] * len(ids)
    if tokenizer.decode(tokens, skip_special_tokens=False) == tokenizer.decode(whole, skip_special_tokens=False):
        return Scored(tokens, scored)
    scored, done, text = [], 0, ""
    for number, (piece, learn) in enumerate(pieces):
        text += piece
        if number == len(pieces) - 1:
            end = len(whole)
        else:
            part = tokenizer.encode(text, add_special_tokens=add_special_tokens)
            end = max(_shared(part, whole), done)
        scored += [learn] * (end - done)
        done = end
    return Scored(whole, scored)


def _without_end(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids without the special token that some vocabularies set after a text."""
    ends = {tokenizer.eos_id, tokenizer.sep_id} - {None}
    return ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    limit = min(len(left), len(right))
    return next((i for i in range(limit) if left[i] != right[i]), limit)


def with_end(tokenizer: Tokenizer, scored: Scored, learn: bool = True) -> Scored:
    """The tokens with the end-of-text token after them, to be learned, unless a token that ends an answer is there."""
    if tokenizer.eos_id is None or (scored.tokens and scored.tokens[-1] in tokenizer.stop_ids):
        return scored
    return Scored([*scored.tokens, tokenizer.eos_id], [*scored.scored, learn])


def encode_chat_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    loss_on: LossOn = "assistant",
    **variables: Any,
) -> list[Scored]:
    """A chat as tokens with the assistant's turns to be learned, the token that ends each turn included.

    loss_on: "assistant" for all of its turns, "completion" for the last one alone, "all" for every token.
    One result where the template only ever appends. A template that writes earlier turns otherwise once later ones
    follow (that drops their reasoning, say) gives one result a turn, each with the text that the model would have seen.

    Raises DataError naming `where` when the answer can't be found in what the template writes.
    """

    def render(count: int, opening: bool) -> str:
        if count == 0:
            return ""
        given = messages[:count]
        return tokenizer.render_chat(given, tools=tools, add_generation_prompt=opening, **variables)

    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if loss_on == "all":
        # Text after the last turn's end, if any, is context of nothing: it ends as the template ends it.
        return [_closed(tokenizer, [(render(len(messages), False), True)])]
    if loss_on == "completion":
        turns = turns[-1:]
    spans = {turn: _span(tokenizer, messages[turn], turn, render, where) for turn in turns}
    full = render(turns[-1] + 1, False)
    if all(full.startswith(text) for text, _, _ in spans.values()):
        return [_closed(tokenizer, _cut(full, [(start, end) for _, start, end in spans.values()]))]
    return [_closed(tokenizer, _cut(text, [(start, end)])) for text, start, end in spans.values()]


def _span(tokenizer: Tokenizer, message: Mapping[str, Any], turn: int, render: Any, where: str) -> tuple[str, int, int]:
    """The text up to a turn's end, and where in it the turn begins and ends."""
    text = render(turn + 1, False)
    opened = render(turn, True)
    if opened and text.startswith(opened):
        start = len(opened)
    else:
        # The opening of an answer isn't how the turn begins (it may open a block of reasoning): take the content.
        before, content = render(turn, False), message.get("content")
        at = _after(text, before)
        content = content.strip() if isinstance(content, str) else ""
        start = text.find(content, at) if at >= 0 and content else -1
        if start < 0 or text.find(content, start + 1) >= 0:
            raise DataError(
                f"{where}: message {turn + 1} (assistant) can't be told apart in what the chat template writes; give "
                "the row as {prompt, completion}, another template, or loss on all tokens"
            )
    return text, start, start + _end_of_turn(tokenizer, text[start:])


def _after(text: str, before: str) -> int:
    """Where text goes on after `before`, -1 when it doesn't begin with it."""
    return len(before) if text.startswith(before) else -1


def _end_of_turn(tokenizer: Tokenizer, rest: str) -> int:
    """How much of a turn's text is to be learned: up to its last end token. What follows, a newline say, comes from
    the template and is never generated.
    """
    ends = [rest.rfind(mark) + len(mark) for mark in map(tokenizer.token, tokenizer.stop_ids) if mark in rest]
    return max(ends, default=len(rest))


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces: list[Piece] = []
    done = 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return pieces  # nothing after the last turn is learned, so it is left out


def _closed(tokenizer: Tokenizer, pieces: list[Piece]) -> Scored:
    """Encoded pieces; the end-of-text token is added where the template ends an answer with no token of its own."""
    scored = encode_pieces(tokenizer, pieces, add_special_tokens=False)
    if any(token in tokenizer.stop_ids for token in scored.tokens[-3:]):
        return scored
    return with_end(tokenizer, scored)
