"""A vocabulary of Hugging Face's `tokenizers` library: tokenizer.json, or one built from older files or GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers.detokenizer import Stage, TextStream, compile_stages, drain, push, spell_bytes
from mlxlm.tokenizers.special_tokens import AddedToken
from mlxlm.tokenizers.spelling import make_speller


class TokenizersBackend:
    """The library's tokenizer, never cutting or padding what it encodes.

    clean_up: decode as with transformers' `clean_up_tokenization_spaces` (which skips BPE vocabularies).
    """

    def __init__(self, library: tokenizers.Tokenizer, *, clean_up: bool = False) -> None:
        self._library = library
        # tokenizer.json may carry the truncation and padding of somebody's inference service. They stay in the file
        # when it is saved, but `encode` gives all ids and only those.
        self._service = (library.truncation, library.padding)
        library.no_truncation()
        library.no_padding()
        decoder = library.decoder
        spec = None if decoder is None else json.loads(decoder.__getstate__())
        clean_up = clean_up and not isinstance(library.model, tokenizers.models.BPE)
        self._stages = compile_stages(spec, clean_up)
        self._literal: dict[int, tokenizers.AddedToken] | None = None
        self._speller = make_speller(spec, clean_up)

    @classmethod
    def read(cls, path: Path, *, clean_up: bool = False) -> TokenizersBackend:
        """From a tokenizer.json."""
        try:
            library = tokenizers.Tokenizer.from_file(str(path))
            for pair in (None, "a"):  # a post-processor that doesn't fit panics at its first use
                library.encode("a", pair)
            return cls(library, clean_up=clean_up)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception for malformed files, and a panic is not even that
            raise TokenizerError(f"{path}: not a valid tokenizer.json ({_first_line(error)})") from None

    @cached_property
    def size(self) -> int:
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def added(self) -> list[AddedToken]:
        tokens = self._library.get_added_tokens_decoder()
        return [_from_library(token, id) for id, token in sorted(tokens.items())]

    def add_tokens(self, tokens: Iterable[AddedToken]) -> None:
        present = {token.content: token for token in self.added}
        for token in tokens:
            old = present.get(token.content)
            if old is None or (token.special and not old.special):
                self._add(token)
            if token.id is not None and self.token_id(token.content) != token.id:
                raise TokenizerError(
                    f"the added token {token.content!r} should have id {token.id}, but the vocabulary gives it "
                    f"{self.token_id(token.content)}; the tokenizer files contradict each other"
                )
        self.__dict__.pop("size", None)
        self.__dict__.pop("_spelled", None)
        self._literal = None

    def _add(self, token: AddedToken) -> None:
        flags = {name: value for name, value in asdict(token).items() if name not in ("content", "id")}
        entry = tokenizers.AddedToken(token.content, **flags)
        if token.special:
            self._library.add_special_tokens([entry])
        else:
            self._library.add_tokens([entry])

    def frame(self, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
        """Put these (token, id) around every encoded text, and nothing else, in place of what the file says."""
        spec = framing(bos, eos)
        processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        processor.__setstate__(json.dumps(spec).encode())
        self._library.post_processor = processor

    def frame_pairs(self, cls: tuple[str, int], sep: tuple[str, int]) -> None:
        """Frame a text as cls A sep and a pair as cls A sep sep B sep, all of type 0 (RoBERTa, arXiv:1907.11692)."""
        self._library.post_processor = processors.RobertaProcessing(sep, cls, True, False)

    def encode(self, text: str, pair: str | None, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        encoding = self._library.encode(text, pair, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.type_ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def token(self, token_id: int) -> str | None:
        return self._library.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def spell(self, token_id: int) -> bytes | None:
        if self._speller is None:
            raise TokenizerError("the tokens of this vocabulary depend on their neighbours, so none has a text alone")
        added = self._library.get_added_tokens_decoder() if self._literal is None else self._literal
        self._literal = added
        if token_id in added:
            return added[token_id].content.encode("utf-8", "replace")
        token = self._library.id_to_token(token_id)
        return None if token is None else self._speller(token)

    @cached_property
    def _spelled(self) -> dict[int, str]:
        """Added tokens whose text a byte-level decoder would mistake for bytes, spelled so that it gives the text."""
        return {
            id: spell_bytes(token.content)
            for id, token in self._library.get_added_tokens_decoder().items()
            if not token.content.isascii()
        }

    def stream(self) -> TextStream:
        if self._stages is None:
            return _WholeStream(self._library)
        byte_level = self._library.decoder is not None and b'"ByteLevel"' in self._library.decoder.__getstate__()
        return _StagedStream(self._library, self._stages(), self._spelled if byte_level else {})

    def files(self) -> dict[str, bytes]:
        truncation, padding = self._service
        try:
            if truncation is not None:
                self._library.enable_truncation(**truncation)
            if padding is not None:
                self._library.enable_padding(**padding)
            return {"tokenizer.json": self._library.to_str(pretty=False).encode("utf-8")}
        finally:
            self._library.no_truncation()
            self._library.no_padding()


class _StagedStream:
    def __init__(self, library: tokenizers.Tokenizer, stages: list[Stage], spelled: dict[int, str]) -> None:
        self._library, self._stages, self._spelled = library, stages, spelled

    def add(self, token_id: int) -> str:
        token = self._spelled.get(token_id) or self._library.id_to_token(token_id)
        return "" if token is None else push(self._stages, (token,))

    def finish(self) -> str:
        return drain(self._stages)


class _WholeStream:
    """For a decoder that can't stream: all the text comes at the end."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library, self._ids = library, []

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        return self._library.decode(self._ids, skip_special_tokens=False)


def framing(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any]:
    """A TemplateProcessing of tokenizer.json: bos before and eos behind each text; a pair has type 1."""

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": bos[0], "type_id": type_id}}] if bos else []
        after = [{"SpecialToken": {"id": eos[0], "type_id": type_id}}] if eos else []
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    specials = {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in filter(None, (bos, eos))}
    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": specials,
    }


def _from_library(token: tokenizers.AddedToken, id: int) -> AddedToken:
    return AddedToken(
        content=token.content,
        special=token.special,
        id=id,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
    )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
