"""/v1/embeddings: texts to vectors."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxlm.server import fields as f
from mlxlm.server.fields import Fields
from mlxlm.server.problems import Problem
from mlxlm.server.settings import ServerSettings
from mlxlm.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """Texts to embed.  tokens: of all of them.  packed: vectors as base64 of little-endian float32."""

    texts: tuple[str, ...]
    tokens: int
    packed: bool


def read_embedding(body: Any, tokenizer: Tokenizer, settings: ServerSettings, dim: int) -> EmbeddingRequest:
    """What a request asks for. Raises Problem for one that can't be answered as it is."""
    fields = Fields(body)
    fields.take("model", f.text)
    texts = fields.need("input", _read_input)
    packed = fields.take("encoding_format", f.one_of("float", "base64"), "float") == "base64"
    fields.take("dimensions", f.one_of(dim))
    fields.take("user", f.anything)
    fields.done()
    if len(texts) > settings.max_inputs:
        raise f.wrong("input", f"{len(texts)} texts", f"at most {settings.max_inputs} texts")
    lengths = [len(tokenizer.encode(text)) for text in texts]
    if settings.max_prompt_tokens is not None and max(lengths) > settings.max_prompt_tokens:
        raise Problem(
            400,
            f"a text has {max(lengths)} tokens, but this server takes at most {settings.max_prompt_tokens}",
            param="input",
            code="context_length_exceeded",
        )
    return EmbeddingRequest(texts=tuple(texts), tokens=sum(lengths), packed=packed)


def _read_input(name: str, value: Any) -> list[str]:
    listed = [value] if isinstance(value, str) else f.items(name, value)
    if not listed or not all(isinstance(one, str) and one for one in listed):
        raise f.wrong(name, value, "a text that is not empty, or a list of such texts (token ids are not taken)")
    return listed


def embedding_body(asked: EmbeddingRequest, vectors: np.ndarray, model: str) -> dict[str, Any]:
    """The answer.  vectors (number of texts, dim) float32."""
    data = []
    for index, vector in enumerate(vectors):
        packed = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": packed if asked.packed else vector.tolist()})
    usage = {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
