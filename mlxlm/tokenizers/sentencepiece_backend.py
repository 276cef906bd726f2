"""A SentencePiece vocabulary (Kudo & Richardson 2018, arXiv:1808.06226), run by the `sentencepiece` library itself.

Added tokens are cut out of the text first; what lies between them is encoded one part at a time. Decoding follows
SentencePiece's rules in streaming form: U+2581 is a space, the space that encoding put in front of the text is taken
off again, byte pieces are gathered into characters, and each byte that belongs to none becomes U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import sentencepiece

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers.detokenizer import REPLACEMENT, TextStream
from mlxlm.tokenizers.model_proto import without_dummy_prefix
from mlxlm.tokenizers.special_tokens import AddedToken

SPACE = "\u2581"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")

# "always": every part between added tokens gets the model's space in front, as SentencePiece and the first LLaMA
# tokenizers do.  "first": only a part that opens the text (transformers' legacy=false).  "never": none.
PrefixSpace = Literal["always", "first", "never"]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Ids set around a text; a pair is `before + text + after + between + pair + after`, its types 0 and pair_type."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    pair_type: int = 0


@dataclass(frozen=True, kw_only=True)
class IdLayout:
    """How ids of the model file become ids of the checkpoint.

    moved: model id -> checkpoint id of single pieces.  offset: added to all others.
    """

    moved: tuple[tuple[int, int], ...] = ()
    offset: int = 0


# fairseq put its own <s> <pad> </s> <unk> in front of the model's pieces, whose <unk> <s> </s> it left out.
SHIFTED = IdLayout(moved=((0, 3), (1, 0), (2, 2)), offset=1)


class SentencePieceBackend:
    """A SentencePiece model with added tokens.

    model: the serialized file.  file_name: what it is called in a checkpoint directory.  prefix_space: which parts
    of a text get the model's space in front.  layout: see `IdLayout`.
    """

    def __init__(
        self,
        model: bytes,
        *,
        file_name: str = "tokenizer.model",
        prefix_space: PrefixSpace = "always",
        layout: IdLayout | None = None,
    ) -> None:
        self._model, self._file_name, self._prefix_space = model, file_name, prefix_space
        self._processor = _load(model)
        self._bare: sentencepiece.SentencePieceProcessor | None = None
        self.frame = Frame()
        layout = layout or IdLayout()
        self._offset, self._moved = layout.offset, dict(layout.moved)
        self._back = {ours: theirs for theirs, ours in layout.moved}
        count = self.piece_count = self._processor.GetPieceSize()
        self._end = max([count + layout.offset, *(ours + 1 for _, ours in layout.moved)])
        self._added: dict[str, AddedToken] = {}
        self._added_texts: dict[int, str] = {}
        self._followers: dict[str, tuple[str, int]] = {}
        self._splitter: re.Pattern[str] | None = None
        # How the model treats spaces, asked of itself: the options stand behind all pieces in the file.
        probe = "".join(self._processor.EncodeAsPieces("a  a"))
        self._has_prefix = probe.startswith(SPACE)
        self._one_space = SPACE * 2 not in probe
        controls = (id for id in range(count) if self._processor.IsControl(id) or self._processor.IsUnknown(id))
        self.add_tokens(AddedToken(content=self._processor.IdToPiece(id), id=self._ours(id)) for id in controls)

    @classmethod
    def read(cls, path: Path, *, prefix_space: PrefixSpace, layout: IdLayout | None = None) -> SentencePieceBackend:
        """From a model file."""
        try:
            model = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: can't be read ({error.strerror or error})") from None
        if _TIKTOKEN_LINE.match(model):
            raise TokenizerError(
                f"{path}: is a tiktoken vocabulary, not a SentencePiece model; use a checkpoint of this model that has "
                "a tokenizer.json"
            )
        try:
            return cls(model, file_name=path.name, prefix_space=prefix_space, layout=layout)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    def special_piece(self, role: str) -> str | None:
        """The piece that the model itself calls bos, eos, pad or unk; None when it has none."""
        id = getattr(self._processor, f"{role}_id")()
        return self._processor.IdToPiece(id) if 0 <= id < self._processor.GetPieceSize() else None

    @property
    def size(self) -> int:
        return self._end

    @property
    def added(self) -> list[AddedToken]:
        return sorted(self._added.values(), key=lambda token: token.id or 0)

    def add_tokens(self, tokens: Iterable[AddedToken]) -> None:
        for token in tokens:
            id = self.token_id(token.content)
            if id is None:
                id = self._end if token.id is None else token.id
                if self.token(id) is not None:
                    raise TokenizerError(
                        f"the added token {token.content!r} should have id {id}, but that is {self.token(id)!r}; "
                        "the tokenizer files contradict each other"
                    )
            elif token.id not in (None, id):
                raise TokenizerError(
                    f"the added token {token.content!r} should have id {token.id}, but the vocabulary gives it {id}; "
                    "the tokenizer files contradict each other"
                )
            old = self._added.get(token.content)
            if old is not None:  # a second mention that gives no id says nothing about white space either
                token = replace(old if token.id is None else token, special=token.special or old.special)
            self._added[token.content] = replace(token, id=id)
            self._added_texts[id] = token.content
            self._end = max(self._end, id + 1)
        self._splitter = _splitter(self._added.values(), self._followers)

    def reserve(self, content: str, id: int, *, after: str | None = None) -> None:
        """Give this text an id, if it has none, and look for it in a text only right behind the token `after`."""
        if self.token_id(content) is None:
            if self.token(id) is not None:
                raise TokenizerError(f"the token {content!r} belongs at id {id}, but that is {self.token(id)!r}")
            self._added_texts[id] = content
            self._end = max(self._end, id + 1)
        if after is not None:
            self._followers[content] = (after, self.token_id(content) or id)
            self._splitter = _splitter(self._added.values(), self._followers)

    def encode(self, text: str, pair: str | None, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        frame = self.frame if add_special_tokens else Frame(pair_type=self.frame.pair_type)
        ids = [*frame.before, *self._encode(text), *frame.after]
        if pair is None:
            return ids, [0] * len(ids)
        rest = [*frame.between, *self._encode(pair), *frame.after]
        return ids + rest, [0] * len(ids) + [frame.pair_type] * len(rest)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, None, add_special_tokens)[0] for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._splitter.finditer(text) if self._splitter else ():
            ids += self._encode_part(text[start : match.start()], start == 0)
            # The group is the token without the white space that it swallows.
            content = match.group(match.lastindex or 0)
            ids.append(self._added[content].id or 0 if content in self._added else self._followers[content][1])
            start = match.end()
        return ids + self._encode_part(text[start:], start == 0)

    def _encode_part(self, part: str, opens: bool) -> list[int]:
        if not part:
            return []
        prefixed = self._prefix_space == "always" or (self._prefix_space == "first" and opens)
        if self._has_prefix and not prefixed:
            if self._bare is None:
                self._bare = _load(without_dummy_prefix(self._model))
            found = self._bare.EncodeAsIds(part)
        else:
            found = self._processor.EncodeAsIds(part)
        return [self._ours(id) for id in found] if self._offset or self._moved else found

    def _ours(self, id: int) -> int:
        return self._moved.get(id, id + self._offset)

    def _theirs(self, token_id: int) -> int | None:
        """The model's id, None for one that stands for no piece of it."""
        id = self._back.get(token_id, token_id - self._offset)
        return id if 0 <= id < self._processor.GetPieceSize() and self._ours(id) == token_id else None

    def token(self, token_id: int) -> str | None:
        if token_id in self._added_texts:
            return self._added_texts[token_id]
        id = self._theirs(token_id)
        return None if id is None else self._processor.IdToPiece(id)

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        id = self._processor.PieceToId(token)
        if self._processor.IdToPiece(id) == token:
            return self._ours(id)
        return next((ours for ours, text in self._added_texts.items() if text == token), None)

    def piece(self, token_id: int) -> str | int | None:
        """What an id stands for in a text: a byte as int, anything else as a str with U+2581 for spaces."""
        if token_id in self._added_texts:
            return self._added_texts[token_id]
        id = self._theirs(token_id)
        if id is None:
            return None
        piece = self._processor.IdToPiece(id)
        return int(piece[3:5], 16) if self._processor.IsByte(id) else piece

    def spell(self, token_id: int) -> bytes | None:
        piece = self.piece(token_id)
        if piece is None or isinstance(piece, int):
            return None if piece is None else bytes([piece])
        return (piece if token_id in self._added_texts else piece.replace(SPACE, " ")).encode("utf-8", "replace")

    def stream(self) -> TextStream:
        strips = (self._has_prefix or self._one_space) and self._prefix_space != "never"
        return _PieceStream(self, strips, self._one_space, frozenset(self._added_texts))

    def files(self) -> dict[str, bytes]:
        return {self._file_name: self._model}


class _PieceStream:
    """Pieces to text. Byte pieces wait until they are a character, or can't become one any more."""

    def __init__(self, backend: SentencePieceBackend, strips: bool, one_space: bool, literal: frozenset[int]) -> None:
        self._backend, self._strips, self._strips_all, self._literal = backend, strips, one_space, literal
        self._bytes = bytearray()
        self._pieces: dict[int, str | int | None] = {}

    def add(self, token_id: int) -> str:
        if token_id not in self._pieces:
            self._pieces[token_id] = self._backend.piece(token_id)
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._bytes.append(piece)
            return self._opened(_take_characters(self._bytes, final=False))
        text = self.finish()
        if token_id in self._literal:
            return text + self._opened(piece)
        return text + self._opened(self._without_prefix(piece).replace(SPACE, " "))

    def finish(self) -> str:
        return self._opened(_take_characters(self._bytes, final=True))

    def _without_prefix(self, piece: str) -> str:
        """The piece without the space that encoding put in front, while the text has not begun."""
        if not self._strips or not piece.startswith(SPACE):
            return piece
        self._strips = self._strips_all  # models that keep single spaces only take off all that lead
        return piece[1:]

    def _opened(self, text: str) -> str:
        """The text itself; the first that is not empty begins the whole."""
        self._strips = self._strips and not text
        return text


def _take_characters(pending: bytearray, final: bool) -> str:
    """Cut complete characters off the front of `pending`, and U+FFFD for each byte that can't start one."""
    text = ""
    while pending:
        width = _width(pending[0])
        if width and len(pending) < width and not final and _continues(pending):
            break
        try:
            text += pending[: width or 1].decode("utf-8")
            del pending[: width or 1]
        except UnicodeDecodeError:
            text += REPLACEMENT
            del pending[:1]
    return text


def _width(first: int) -> int:
    """Bytes of the UTF-8 character with this first byte; 0 when there is none."""
    if first < 0x80:
        return 1
    return 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 0


def _continues(pending: bytearray) -> bool:
    return all(0x80 <= byte < 0xC0 for byte in pending[1:])


def _load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.LoadFromSerializedProto(model)
    except Exception as error:  # RuntimeError, or what the binding of this version makes of it
        raise TokenizerError(f"not a SentencePiece model ({str(error).splitlines()[0]})") from None
    if loaded is False or processor.GetPieceSize() == 0:
        raise TokenizerError("not a SentencePiece model (it has no pieces)")
    return processor


def _splitter(tokens: Iterable[AddedToken], followers: Mapping[str, tuple[str, int]]) -> re.Pattern[str] | None:
    """An expression that finds added tokens, the longest first, and texts that are tokens behind another one only."""
    patterns, space = [f"(?<={re.escape(after)})({re.escape(text)})" for text, (after, _) in followers.items()], r"\s*"
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        pattern = re.escape(token.content)
        if token.single_word:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        patterns.append(f"{space if token.lstrip else ''}({pattern}){space if token.rstrip else ''}")
    return re.compile("|".join(patterns)) if patterns else None
