"""Answers that follow a JSON schema or a regular expression: only tokens that keep to it may come next.

The grammars are those of the library llguidance (the extra `constrain`); here they meet our tokenizers and samplers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import mlx.core as mx
import numpy as np

from mlxlm.errors import SamplingError, TokenizerError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mlxlm.tokenizers import Tokenizer

# Between the parts of JSON: at most a new line and some indentation, for a model could go on with spaces for ever.
_SPACES = r"\n?[ ]{0,16}"
_vocabularies: WeakKeyDictionary[Tokenizer, _Vocabulary] = WeakKeyDictionary()
_lock = threading.Lock()


class _Vocabulary:
    """A tokenizer as llguidance sees it.

    strips: how many spaces decoding takes off the beginning of a text, as SentencePiece's does: "none", "one" or "all".
    unstripped: tokens that begin with a space which is not taken off, such as the byte 32.
    """

    def __init__(self, tokenizer: Tokenizer):
        from llguidance import LLTokenizer, TokenizerWrapper

        self.stops = sorted(tokenizer.stop_ids)
        if not self.stops:
            raise UsageError("this tokenizer has no token that ends an answer, so no answer of a form can end")
        try:
            self.tokens = [tokenizer.spell(id) for id in range(tokenizer.vocab_size)]
        except TokenizerError as error:
            raise UsageError(f"answers can't be constrained with this tokenizer: {error}") from None
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, self.stops[0]
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.stop_ids)
        # The table of vocabularies must not keep tokenizers alive.
        self._tokenizer = ref(tokenizer)
        self._special = frozenset(self.special_token_ids)
        self._ids = {text: id for id, text in enumerate(self.tokens) if text and id not in self._special}
        self._longest = max(map(len, self._ids), default=0)
        self.library: LLTokenizer = LLTokenizer(TokenizerWrapper(self), eos_token=self.stops)
        spaced = [id for id, text in enumerate(self.tokens) if text[:1] == b" " and id not in self._special]
        opening = [id for id in spaced if not tokenizer.decode([id]).startswith(" ")]
        blank = [id for id in opening if self.tokens[id] == b" "]
        all_of_them = blank and tokenizer.decode([blank[0], blank[0]]) == ""
        self.strips = "none" if not opening else "all" if all_of_them else "one"
        self.unstripped = [id for id in spaced if opening and tokenizer.decode([id]).encode() == self.tokens[id]]

    def __call__(self, text: str) -> list[int]:
        """Ids of which a text that must come next is made. Their bytes are the text, or the library would stumble."""
        wanted, tokenizer = text.encode(), self._tokenizer()
        if tokenizer is not None:
            # Behind a line break no vocabulary puts a space in front of what follows.
            opening = tokenizer.encode("\n", add_special_tokens=False)
            behind = tokenizer.encode("\n" + text, add_special_tokens=False)
            for ids in (tokenizer.encode(text, add_special_tokens=False), behind[len(opening) :]):
                if b"".join(self.tokens[id] for id in ids) == wanted and not self._special.intersection(ids):
                    return ids
        return self._longest_first(wanted)

    def _longest_first(self, text: bytes) -> list[int]:
        """Ids of a text, each the longest that fits; bytes that no token has are left out."""
        ids, start = [], 0
        while start < len(text):
            sizes = range(min(self._longest, len(text) - start), 0, -1)
            size = next((size for size in sizes if text[start : start + size] in self._ids), 0)
            if size:
                ids.append(self._ids[text[start : start + size]])
            start += size or 1
        return ids


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    with _lock:
        found = _vocabularies.get(tokenizer)
        if found is None:
            found = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
        return found


class Constraint:
    """What answers must look like, from beginning to end. Made by `json_schema`, `regex` and `grammar`.

    An answer that is cut off by max_tokens is the beginning of one that fits; any other one fits.
    """

    def __init__(self, vocabulary: _Vocabulary, text: str):
        self._vocabulary = vocabulary
        self._grammar = text

    def processor(self, words: int | None = None) -> ConstraintProcessor:
        """A new processor, for one answer.  words: how many there are to choose from, default the tokenizer's.

        Raises SamplingError when no token can begin such an answer.
        """
        matcher = _matcher(self._vocabulary, self._grammar)
        size = len(self._vocabulary.tokens)
        return ConstraintProcessor(matcher, self._vocabulary, size if words is None else min(words, size))


class ConstraintProcessor:
    """Keeps one answer to its constraint; see `Processor`. Raises SamplingError when no token fits."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary, words: int):
        self._matcher, self._words = matcher, words
        self._stops = [stop for stop in vocabulary.stops if stop < words]
        self._unfit = [id for id in vocabulary.unstripped if id < words]
        self._read = 0
        # Made at once, so that who asks for an answer learns whether it can begin, and a large grammar waits here.
        self._first: mx.array | None = self._allowed(first=True)

    def __call__(self, answer: Sequence[int]) -> mx.array:
        """What to add to the logits, (words,): 0 for tokens that may come next, -inf for others."""
        if not answer and self._first is not None:
            first, self._first = self._first, None
            return first
        for token in answer[self._read :]:
            self._matcher.consume_token(token)
        self._read = len(answer)
        return self._allowed(first=not answer)

    def _allowed(self, *, first: bool) -> mx.array:
        allowed = np.zeros(self._words, dtype=bool)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            allowed[self._stops] = True
        elif not self._matcher.is_error():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, count=self._words, bitorder="little").astype(bool)
            if first:
                allowed[self._unfit] = False
        if self._matcher.is_error():
            raise SamplingError(f"the answer can't follow its form: {_first_line(self._matcher.get_error())}")
        if not allowed.any():
            raise SamplingError("the answer can't go on in its form: this tokenizer has no token for what must follow")
        return mx.array(np.where(allowed, np.float32(0), np.float32(-np.inf)))


def json_schema(tokenizer: Tokenizer, schema: Mapping[str, Any] | bool | str) -> Constraint:
    """Answers are JSON of that schema (JSON Schema, draft 2020-12), given as such or in text.

    {"type": "object"} asks for any object. Raises UsageError for a schema that is none, or has keywords that can't be
    kept to, such as "not" and "uniqueItems".
    """
    return grammar(tokenizer, f"start: answer\nanswer: {json_part(schema)}", "JSON schema")


def json_part(schema: Mapping[str, Any] | bool | str) -> str:
    """A JSON schema as a part of a `grammar`."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema is not JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise UsageError(f"a JSON schema is an object, not {schema!r:.60}")
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _SPACES}})


def regex(tokenizer: Tokenizer, pattern: str) -> Constraint:
    """Answers match a regular expression as a whole (syntax of Rust's regex, without look-around and anchors).

    Raises UsageError for one that is malformed.
    """
    # An answer is matched as a whole, so anchors at its ends say nothing.
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2:
        pattern = pattern[:-1]
    _check(_library().grammar_from_regex(pattern), "regular expression")
    written = pattern.replace("/", r"\/").replace("\n", r"\n")
    vocabulary = _vocabulary(tokenizer)
    if vocabulary.strips == "none":
        return Constraint(vocabulary, _library().grammar_from_regex(pattern))
    # Decoding takes a space off, so an answer has one more than is meant, or none that could be taken.
    spaced = "MEANT" if vocabulary.strips == "one" else "BARE"
    text = f'start: SPACED | BARE\nSPACED: " " {spaced}\nBARE: MEANT & ~/ (?s:.)*/\nMEANT: /{written}/'
    return Constraint(vocabulary, _library().grammar_from_lark(text))


def grammar(tokenizer: Tokenizer, text: str, what: str = "grammar") -> Constraint:
    """Answers follow a grammar in llguidance's Lark syntax, whose first line is `start: NAME`.

    Raises UsageError for one that is malformed.
    """
    _check(_library().grammar_from_lark(text), what)
    vocabulary = _vocabulary(tokenizer)
    if vocabulary.strips != "none":
        optional = "" if _begins_with_space(vocabulary, _library().grammar_from_lark(text)) else "?"
        text = text.replace("start: ", f'start: " "{optional} ', 1)
    return Constraint(vocabulary, _library().grammar_from_lark(text))


def _library() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise UsageError("constrained answers need llguidance: pip install llguidance") from None
    return LLMatcher


def _matcher(vocabulary: _Vocabulary, text: str) -> LLMatcher:
    return _library()(vocabulary.library, text, log_level=0)


def _check(text: str, what: str) -> None:
    error = _library().validate_grammar(text)
    if error:
        raise UsageError(f"the {what} can't be used: {_reason(error)}")


def _reason(error: str) -> str:
    """What is wrong, out of a message that goes on with an excerpt of the grammar."""
    lines = [line.strip() for line in error.splitlines()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return named[0] if named else lines[0].partition("failed to compile JSON schema: ")[2] or lines[0]


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "unknown error"


def _begins_with_space(vocabulary: _Vocabulary, text: str) -> bool:
    """Whether what a grammar describes may begin with a space."""
    bits = np.frombuffer(_matcher(vocabulary, text).compute_bitmask(), dtype=np.uint8)
    allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    return any(vocabulary.tokens[id][:1] == b" " for id in allowed if id < len(vocabulary.tokens))
