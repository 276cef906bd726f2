"""SentencePiece models written by hand: the ModelProto of sentencepiece_model.proto in protobuf's wire format.

Only what the library needs to encode: pieces with score and type, the kind of model, and how text is normalized.
Field numbers are those of the published .proto file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum

UNIGRAM, BPE = 1, 2


class PieceType(IntEnum):
    """Kinds of a piece; GGUF's token types have the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as 64-bit two's complement
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _bytes(1, _bytes(1, text.encode("utf-8")) + _float(2, score) + _integer(3, kind))


def write_model(
    pieces: Iterable[tuple[str, float, int]],
    *,
    kind: int,
    unk_id: int,
    bos_id: int = -1,
    eos_id: int = -1,
    pad_id: int = -1,
    byte_fallback: bool = False,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """A serialized model without text normalization (other than that of spaces).

    pieces: (text, score, PieceType) in the order of the ids.  kind: UNIGRAM or BPE.  The special ids are -1 where the
    model has none.  add_dummy_prefix: put a space in front of every text.
    """
    pieces = list(pieces)
    trainer = _integer(3, kind) + _integer(35, byte_fallback)
    for field, id in ((40, unk_id), (41, bos_id), (42, eos_id), (43, pad_id)):
        trainer += _integer(field, id)
        if id >= 0:  # the library finds these pieces by their texts, fields 45 to 48
            trainer += _bytes(field + 5, pieces[id][0].encode("utf-8"))
    normalizer = (
        _bytes(1, b"identity")
        + _integer(3, add_dummy_prefix)
        + _integer(4, remove_extra_whitespaces)
        + _integer(5, True)  # escape_whitespaces: a space is written U+2581
    )
    return b"".join(_piece(*piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def without_dummy_prefix(model: bytes) -> bytes:
    """The same model, putting no space in front of a text.

    Protobuf merges repeated occurrences of a message and keeps the last value of a field: so one is appended.
    """
    return model + _bytes(3, _integer(3, False))


def model_kind(model: bytes) -> int:
    """UNIGRAM, BPE or another kind, as a serialized model says it (UNIGRAM when it doesn't)."""
    kind = UNIGRAM
    for field, value in _fields(model):
        if field == 2 and isinstance(value, bytes):
            for inner, number in _fields(value):
                kind = number if inner == 3 and isinstance(number, int) else kind
    return kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; stops where it is damaged."""
    position = 0

    def varint() -> int:
        nonlocal position
        value, shift = 0, 0
        while position < len(message) and shift < 64:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return value

    while position < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            return
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield key >> 3, message[position : position + length]
        position += length
