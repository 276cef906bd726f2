"""The one face over every kind of vocabulary."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import chat
from mlxlm.tokenizers.backend import Backend
from mlxlm.tokenizers.chat import Message, Tool
from mlxlm.tokenizers.detokenizer import Detokenizer
from mlxlm.tokenizers.special_tokens import END_OF_TURN, ROLES, AddedToken, Settings


class Tokenizer:
    """Text to ids and back, special tokens and chat templates. Made by `load_tokenizer` or `tokenizer_from_gguf`.

    bos_id, eos_id, pad_id, unk_id, mask_id, cls_id, sep_id: ids of the special tokens, None where there is none.
    stop_ids: ids that end a generated answer.  special_ids: ids that `decode` leaves out unless told otherwise.
    model_max_length: the longest input in tokens that the files state, or None.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    stop_ids: frozenset[int]
    special_ids: frozenset[int]

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self._backend, self._settings = backend, settings
        backend.add_tokens(settings.added)
        present = {token.content for token in backend.added if token.special}
        backend.add_tokens(
            AddedToken(content=content) for content in settings.special_contents() if content not in present
        )
        for role in ROLES:
            content = settings.named.get(role)
            setattr(self, f"{role}_id", None if content is None else backend.token_id(content))
        self.special_ids = frozenset(token.id for token in backend.added if token.special and token.id is not None)
        self.stop_ids = frozenset(self._find_stop_ids())

    def _find_stop_ids(self) -> Iterable[int]:
        if self.eos_id is not None:
            yield self.eos_id
        yield from self._settings.end_ids
        written = "\n".join(self._settings.templates.values())
        for token in self._backend.added:
            if token.content in END_OF_TURN and token.content in written and token.id is not None:
                yield token.id

    @cached_property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1, added tokens included. A model may have more rows than that."""
        return self._backend.size

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template used without tools, None when there is none."""
        templates = self._settings.templates
        return (
            chat.choose(templates, None, has_tools=False) if chat.DEFAULT in templates or len(templates) == 1 else None
        )

    @property
    def tool_template(self) -> str | None:
        """Source of the chat template used with tools, None when there is none."""
        return self._settings.templates.get(chat.TOOL_USE, self.chat_template)

    @property
    def model_max_length(self) -> int | None:
        return self._settings.model_max_length

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vocab_size} tokens, {type(self._backend).__name__})"

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, or of a text and its pair. Never truncated.

        add_special_tokens: also the tokens that the vocabulary sets around a text (bos, eos, [CLS], ...).
        Special tokens that are written out in the text become their ids in any case.
        """
        return self._encode(text, pair, add_special_tokens)[0]

    def encode_with_types(self, text: str, pair: str | None = None) -> tuple[list[int], list[int]]:
        """Ids with all special tokens, and for each id 0 or 1: the text it belongs to, for models with token types."""
        return self._encode(text, pair, True)

    def _encode(self, text: str, pair: str | None, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        _check_text(text)
        if pair is not None:
            _check_text(pair)
        return self._backend.encode(text, pair, add_special_tokens)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, faster where the vocabulary can work on several at once."""
        if isinstance(texts, str):
            raise TokenizerError("encode_batch takes a list of texts, got one text; use encode")
        texts = list(texts)
        for text in texts:
            _check_text(text)
        return self._backend.encode_batch(texts, add_special_tokens)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids that the vocabulary does not use give nothing: models may have more rows than tokens."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([stream.add(id) for id in ids]) + stream.finish()

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A converter for one stream of ids; see `Detokenizer`."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        return Detokenizer(self._backend.stream(), skip, _check_id)

    def token(self, id: int) -> str:
        """How the vocabulary spells an id. TokenizerError for an id that it does not use."""
        token = self._backend.token(_check_id(id))
        if token is None:
            raise TokenizerError(f"id {id} is not in the vocabulary, whose ids run from 0 to {self.vocab_size - 1}")
        return token

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None when it has no such token."""
        return self._backend.token_id(token)

    def spell(self, id: int) -> bytes:
        """The bytes that an id adds to a text; of ids that the vocabulary does not use, none.

        A text is these bytes one after another; `decode` may take a space off its beginning.
        Raises TokenizerError when the vocabulary writes a token differently beside others.
        """
        return self._backend.spell(_check_id(id)) or b""

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text that the chat template makes of messages.

        messages: objects with "role" and "content".  tools: JSON schemas, or functions with type hints and a
        docstring.  add_generation_prompt: end with the opening of an answer.  variables: further values for the
        template (`documents`, `enable_thinking`, ...), and `chat_template`: the name of one of the tokenizer's
        templates or the source of another one.

        Raises TokenizerError when there is no template, it is malformed, or it refuses the messages.
        """
        return chat.render_chat(
            self._settings.templates,
            self._settings.named,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of `render_chat`. The template writes all special tokens itself, so none is added."""
        text = self.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def save(self, directory: Path | str) -> None:
        """Write the files from which this package and transformers load the same tokenizer again.

        Raises TokenizerError when the directory holds files of another tokenizer that would be read instead.
        """
        from mlxlm.tokenizers.saving import save

        save(Path(directory), self._backend, self._settings, self.stop_ids, self.eos_id)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"expected a text to encode, got {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has half of a UTF-16 pair (U+{ord(text[error.start]):04X}) at {error.start}; "
                "it was read with the wrong encoding"
            ) from None


def _check_id(id: Any) -> int:
    try:
        value = operator.index(id)
    except TypeError:
        value = id.item() if getattr(id, "shape", None) == () else None
        if not isinstance(value, int):
            raise TokenizerError(f"expected an id (a whole number), got {type(id).__name__}") from None
    if not 0 <= value < 2**32:
        raise TokenizerError(f"{value} is not an id: ids start at 0 (labels of ignored positions can't be decoded)")
    return value
