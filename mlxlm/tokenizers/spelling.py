"""The bytes that each token stands for, for grammars that are matched byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxlm.tokenizers.detokenizer import BYTE_TOKEN, CHARACTER_TO_BYTE, flatten

Speller = Callable[[str], bytes]


def make_speller(spec: dict[str, Any] | None, clean_up: bool) -> Speller | None:
    """What spells tokens whose texts a decoder of tokenizer.json joins; None when they can't be told one by one.

    That is so where the decoder looks at neighbours: at the end of words, or to clean up spaces. What it strips at the
    beginning of a text is part of the bytes.
    """
    if spec is None or clean_up:
        return None
    steps: list[Speller | Callable[[str], str]] = []
    falls_back = byte_level = fused = False
    for part in flatten(spec):
        kind = part.get("type")
        if kind == "Fuse":
            fused = True
        elif kind == "ByteLevel":
            byte_level = True
        elif kind == "ByteFallback":
            falls_back = True
        elif kind == "Metaspace":
            steps.append(_replacing(part["replacement"], " "))
        elif kind == "Replace" and len(part["pattern"].get("String", "")) == 1:
            steps.append(_replacing(part["pattern"]["String"], part["content"]))
        elif not (kind == "Strip" and fused and not part.get("stop")):
            return None

    def spell(token: str) -> bytes:
        if byte_level and all(character in CHARACTER_TO_BYTE for character in token):
            return bytes(CHARACTER_TO_BYTE[character] for character in token)
        if falls_back and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match.group(1), 16)])
        for step in steps:
            token = step(token)  # type: ignore[assignment]
        return token.encode("utf-8", "replace")

    return spell


def _replacing(pattern: str, content: str) -> Callable[[str], str]:
    return lambda token: token.replace(pattern, content)
