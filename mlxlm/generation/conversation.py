"""A chat that keeps its cache between turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlxlm.generation.decoding import Piece, stream_generate
from mlxlm.generation.stepping import decoding_cache

if TYPE_CHECKING:
    from mlxlm.layers import CacheSpec
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


class Conversation:
    """Messages so far, and the cache of their tokens.

    system: the system message, default the template's own.  spec: of the cache, default what keeps everything.
    messages: all so far, as chat templates take them.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, system: str | None = None, spec: CacheSpec | None = None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.spec = spec
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, Any]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._cache = decoding_cache(self.model, self.spec)
        self._held: list[int] = []  # the tokens that the cache holds, and maybe one more

    def ask(self, text: str, **options: Any) -> Iterator[Piece]:
        """Add a user's message and generate the answer; options as for `stream_generate`.

        The answer, as far as it was generated, becomes a message when the iteration ends, also when it is given up
        half way. When nothing could be generated the user's message is taken back.
        """
        message = {"role": "user", "content": text}
        tokens = self.tokenizer.encode_chat([*self.messages, message], add_generation_prompt=True)
        self.messages.append(message)
        shared = self._shared(tokens)
        self._cache.trim(shared)
        self._held = tokens
        answer: list[str] = []
        try:
            for piece in stream_generate(self.model, self.tokenizer, tokens, cache=self._cache, **options):
                answer.append(piece.text)
                if piece.token is not None:
                    self._held = [*self._held, piece.token]
                yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()
                kept = min(shared, self._cache.length)
                self._cache.trim(kept if self._cache.can_trim(kept) else 0)
                self._held = tokens[: self._cache.length]

    def _shared(self, tokens: list[int]) -> int:
        """How many leading tokens the cache holds already; at least one must be left to feed."""
        held = self._held[: self._cache.length]
        limit = min(len(held), len(tokens) - 1)
        shared = next((i for i in range(limit) if held[i] != tokens[i]), limit)
        # A window that has moved on can't go back: everything is read again.
        return shared if self._cache.can_trim(shared) else 0
