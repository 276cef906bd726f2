"""Tokens back to text, one at a time.

`Tokenizer.decode` and `Tokenizer.detokenizer` run the same stages, so the pieces of a stream always concatenate to
the decoded whole. A stage takes one token and gives the tokens that are now certain; what may still change (half a
character, a space that might be stripped) stays inside it until the next token or `finish`. The work for a token
does not depend on how many came before.

The stages follow the decoders of Hugging Face's `tokenizers` library: each is a function from a list of tokens to a
list of tokens, and the last list is joined. Before a fusing decoder (ByteLevel, Fuse) a stage sees tokens, behind it
chunks of one text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What transformers' clean_up_tokenization_spaces rewrites, in this order.
_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# What the WordPiece decoder rewrites within each token.
_CLEAN_UP_WORD = (
    *((pair, pair.strip()) for pair in (" .", " ?", " !", " ,", " ' ", " n't", " 'm")),
    (" do not", " don't"),
    *((pair, pair.strip()) for pair in (" 's", " 've", " 're")),
)


class TextStream(Protocol):
    """What a backend hands out: ids in, certain text out."""

    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class Detokenizer:
    """Turns a stream of ids into a stream of text; made by `Tokenizer.detokenizer`.

    The concatenation of all `add(id)` and of the final `finish()` equals `Tokenizer.decode` of all ids. A piece never
    ends in half a character; ids that complete nothing yet give "". The cost of `add` does not grow with the length.
    """

    def __init__(self, stream: TextStream, skip: frozenset[int], check: Callable[[Any], int]) -> None:
        self._stream, self._skip, self._check = stream, skip, check

    def add(self, token_id: int) -> str:
        """The text that is certain now that this id has arrived; may be ""."""
        token_id = self._check(token_id)
        return "" if token_id in self._skip else self._stream.add(token_id)

    def finish(self) -> str:
        """The text that was held back; "" when nothing was. The detokenizer is used up afterwards."""
        return self._stream.finish()


def _byte_alphabet() -> dict[int, str]:
    """The 256 printable characters that byte-level BPE writes bytes with (Radford et al. 2019): byte -> character.

    Printable Latin-1 stands for itself; the other bytes, in order, take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)}


BYTE_TO_CHARACTER = _byte_alphabet()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def spell_bytes(text: str) -> str:
    """Text in the byte-level alphabet: one character for each byte of its UTF-8."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in text.encode("utf-8"))


class Stage(Protocol):
    """One decoder of a chain, in streaming form."""

    def add(self, token: str) -> Iterable[str]: ...

    def finish(self) -> Iterable[str]: ...


class _Mapped:
    """Maps every token by itself, knowing only whether it is the first one."""

    def __init__(self, function: Callable[[str, bool], str]) -> None:
        self._function, self._first = function, True

    def add(self, token: str) -> Iterable[str]:
        first, self._first = self._first, False
        return (self._function(token, first),)

    def finish(self) -> Iterable[str]:
        return ()


class _Bytes:
    """Byte-level tokens to text; invalid UTF-8 becomes U+FFFD, one for each maximal invalid part."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: str) -> Iterable[str]:
        try:
            raw = bytes([CHARACTER_TO_BYTE[character] for character in token])
        except KeyError:  # a token outside the alphabet stands for itself
            raw = token.encode("utf-8", "replace")
        return (self._decoder.decode(raw),)

    def finish(self) -> Iterable[str]:
        return (self._decoder.decode(b"", final=True),)


class _ByteFallback:
    """Runs of byte tokens <0xNN> to text. A run that is not valid UTF-8 as a whole is all U+FFFD, one for each byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def add(self, token: str) -> Iterable[str]:
        match = BYTE_TOKEN.fullmatch(token)
        if match:
            self._run.append(int(match.group(1), 16))
            return ()
        return (*self.finish(), token)

    def finish(self) -> Iterable[str]:
        run, self._run = self._run, bytearray()
        try:
            return (run.decode("utf-8"),) if run else ()
        except UnicodeDecodeError:
            return (REPLACEMENT,) * len(run)


class _Suffix:
    """An end-of-word mark becomes a space, but nothing in the very last token: so one token is held back."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: str | None = None

    def add(self, token: str) -> Iterable[str]:
        held, self._held = self._held, token
        return () if held is None else (held.replace(self._suffix, " "),)

    def finish(self) -> Iterable[str]:
        return () if self._held is None else (self._held.replace(self._suffix, ""),)


class _ReplaceText:
    """str.replace on one text that arrives in chunks: holds back what may be the start of a match."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content, self._held = pattern, content, ""

    def add(self, token: str) -> Iterable[str]:
        *done, rest = (self._held + token).split(self._pattern)
        keep = min(len(rest), len(self._pattern) - 1)
        while keep and not self._pattern.startswith(rest[len(rest) - keep :]):
            keep -= 1
        self._held = rest[len(rest) - keep :]
        return (self._content.join([*done, rest[: len(rest) - keep]]),)

    def finish(self) -> Iterable[str]:
        return (self._held,)


class _StripText:
    """Strips up to `start` leading and `stop` trailing marks of one text that arrives in chunks."""

    def __init__(self, mark: str, start: int, stop: int) -> None:
        self._mark, self._start, self._stop, self._held = mark, start, stop, ""

    def add(self, token: str) -> Iterable[str]:
        if self._start and token:
            kept = strip(token, self._mark, self._start, 0)
            self._start = 0 if kept else self._start - len(token)
            token = kept
        text = self._held + token
        certain = strip(text, self._mark, 0, self._stop)
        self._held = text[len(certain) :]
        return (certain,)

    def finish(self) -> Iterable[str]:
        return ()


def strip(text: str, mark: str, start: int, stop: int) -> str:
    """Text without up to `start` leading and up to `stop` trailing marks (one character)."""
    leading = min(start, len(text) - len(text.lstrip(mark)))
    trailing = min(stop, len(text) - len(text.rstrip(mark)))
    return text[leading : max(leading, len(text) - trailing)]


def _word_piece(prefix: str, clean_up: bool) -> Callable[[str, bool], str]:
    def decode(token: str, first: bool) -> str:
        if not first:
            token = token[len(prefix) :] if token.startswith(prefix) else " " + token
        if clean_up:
            for pattern, content in _CLEAN_UP_WORD:
                token = token.replace(pattern, content)
        return token

    return decode


def _metaspace(mark: str, strips_first: bool) -> Callable[[str, bool], str]:
    return lambda token, first: token.replace(mark, "" if first and strips_first else " ")


def _token_stage(spec: dict[str, Any]) -> Callable[[], Stage] | None:
    """A maker of the stage for a decoder that sees tokens, None for one that has no streaming form here."""
    kind = spec.get("type")
    if kind == "ByteFallback":
        return _ByteFallback
    if kind == "BPEDecoder":
        return lambda: _Suffix(spec["suffix"])
    if kind == "Metaspace":
        mapping = _metaspace(spec["replacement"], spec.get("prepend_scheme", "always") != "never")
    elif kind == "WordPiece":
        mapping = _word_piece(spec["prefix"], spec["cleanup"])
    elif kind == "Replace" and "String" in spec["pattern"]:
        pattern, content = spec["pattern"]["String"], spec["content"]
        mapping = lambda token, _: token.replace(pattern, content)  # noqa: E731
    elif kind == "Strip":
        mark, start, stop = spec["content"], spec["start"], spec["stop"]
        mapping = lambda token, _: strip(token, mark, start, stop)  # noqa: E731
    else:
        return None
    return lambda: _Mapped(mapping)


def _text_stage(spec: dict[str, Any]) -> Callable[[], Stage] | None:
    """As `_token_stage`, for a decoder that stands behind a fusing one."""
    kind = spec.get("type")
    if kind == "Replace" and spec["pattern"].get("String"):
        return lambda: _ReplaceText(spec["pattern"]["String"], spec["content"])
    if kind == "Strip":
        return lambda: _StripText(spec["content"], spec["start"], spec["stop"])
    return None


def compile_stages(spec: dict[str, Any] | None, clean_up: bool = False) -> Callable[[], list[Stage]] | None:
    """A maker of fresh stages for a decoder of tokenizer.json, or None when one of its parts can't stream.

    spec: the "decoder" object, None for a tokenizer without one (its tokens are joined with spaces).
    clean_up: also do what transformers' `clean_up_tokenization_spaces` does to the text.
    """
    makers: list[Callable[[], Stage]] = []
    fused = False
    for part in flatten(spec):
        kind = part.get("type")
        if kind == "Fuse":
            fused = True
        elif kind == "ByteLevel":
            fused = True
            makers.append(_Bytes)
        else:
            maker = _text_stage(part) if fused else _token_stage(part)
            if maker is None:
                return None
            makers.append(maker)
    if spec is None:
        makers.append(lambda: _Mapped(lambda token, first: token if first else " " + token))
    if clean_up:
        makers += [_cleaner(pattern) for pattern in _CLEAN_UP]
    return lambda: [make() for make in makers]


def _cleaner(pattern: str) -> Callable[[], Stage]:
    return lambda: _ReplaceText(pattern, pattern.strip())


def flatten(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoders of a decoder, in order."""
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [part for inner in spec["decoders"] for part in flatten(inner)]
    return [spec]


def push(stages: list[Stage], tokens: Iterable[str], start: int = 0) -> str:
    """Send tokens through the stages from `start` on; what comes out behind the last one."""
    for stage in stages[start:]:
        tokens = [result for token in tokens for result in stage.add(token)]
    return "".join(tokens)


def drain(stages: list[Stage]) -> str:
    """Finish the stages in order, each one's rest going through those behind it."""
    return "".join([push(stages, stage.finish(), index + 1) for index, stage in enumerate(stages)])
