"""What a vocabulary must offer to stand behind a `Tokenizer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from mlxlm.tokenizers.detokenizer import TextStream
from mlxlm.tokenizers.special_tokens import AddedToken


class Backend(Protocol):
    """A vocabulary with its algorithm. Ids run from 0 to size - 1, some may be unused."""

    @property
    def size(self) -> int: ...

    @property
    def added(self) -> Sequence[AddedToken]:
        """All added tokens with their ids."""
        ...

    def add_tokens(self, tokens: Iterable[AddedToken]) -> None:
        """Cut these out of the text from now on; those not in the vocabulary yet get the next free ids."""
        ...

    def encode(self, text: str, pair: str | None, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Ids, and for each the type of its part: 0 for the text, 1 for the pair."""
        ...

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]: ...

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells an id; None for one that it does not use."""
        ...

    def token_id(self, token: str) -> int | None: ...

    def spell(self, token_id: int) -> bytes | None:
        """The bytes that an id adds to a text, None for one that the vocabulary does not use.

        Raises TokenizerError when that depends on the ids around it.
        """
        ...

    def stream(self) -> TextStream:
        """A fresh converter of ids to text, for one text."""
        ...

    def files(self) -> dict[str, bytes]:
        """The vocabulary as files of a checkpoint directory."""
        ...
