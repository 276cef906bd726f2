"""Sentence embeddings: one vector a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxlm.checkpoint import read_json
from mlxlm.errors import CheckpointError, PromptError, UnsupportedModelError, UsageError, nearest
from mlxlm.models import pool

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

POOLINGS = ("mean", "cls", "last")


def default_pooling(model: Transformer) -> str:
    """What the checkpoint's files (of sentence-transformers) or its GGUF header say; without them "mean".

    Raises UnsupportedModelError when they ask for more than pooling and normalising.
    """
    said = getattr(getattr(model, "source", None), "pooling", None)
    if said is not None and said not in POOLINGS:
        raise UnsupportedModelError(f"the GGUF file asks for pooling {said!r}, which isn't implemented")
    folder = _folder(model)
    if said is not None or folder is None:
        return said or "mean"
    path = folder / "1_Pooling" / "config.json"
    if (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
        foreign = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
        if foreign:
            raise UnsupportedModelError(f"this embedding model has parts that aren't implemented: {', '.join(foreign)}")
        path = folder / kinds.get("Pooling", "") / "config.json" if kinds.get("Pooling") else path
    if not path.is_file():
        return "mean"
    values = read_json(path)
    modes = {name for name, value in values.items() if name.startswith("pooling_mode_") and value is True}
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
    if len(modes) != 1 or not modes <= set(names):
        raise UsageError(f"{path} asks for {sorted(modes)}; choose a pooling out of {', '.join(POOLINGS)}")
    return names[modes.pop()]


def default_length(model: Transformer) -> int | None:
    """Most tokens of a text: the model's context, or less where the checkpoint says that it was trained on less."""
    folder = _folder(model)
    path = None if folder is None else folder / "sentence_bert_config.json"
    trained = read_json(path).get("max_seq_length") if path is not None and path.is_file() else None
    limits = [limit for limit in (trained, model.config.max_length) if isinstance(limit, int)]
    return min(limits, default=None)


def _folder(model: Transformer) -> Path | None:
    source = getattr(model, "source", None)
    return source.path if source is not None and source.path.is_dir() else None


def embed(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pooling: str | None = None,
    normalize: bool = True,
    batch_size: int = 32,
    truncate: bool = False,
) -> np.ndarray:
    """Embeddings of texts, (number of texts, dim) float32, in the order given.

    pooling: "mean" of all tokens, "cls" (the first), or "last"; default what the checkpoint says, else mean.
    normalize: to length 1, default True.  batch_size: texts at once; texts of like length go together.
    truncate: cut texts that are longer than the model's context, default False.

    Raises PromptError for an empty text or, without truncate, one that is too long; both by its number.
    """
    pooling = default_pooling(model) if pooling is None else pooling
    if pooling not in POOLINGS:
        raise UsageError(f"unknown pooling {pooling!r}{nearest(pooling, POOLINGS)}")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    if isinstance(texts, str):
        raise UsageError("texts is one string; give a list of strings")
    limit = default_length(model)
    rows = [_tokens(model, tokenizer, text, number, limit, truncate) for number, text in enumerate(texts, 1)]
    result = np.zeros((len(rows), model.config.dim), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        result[batch] = _embed_batch(model, tokenizer, [rows[index] for index in batch], pooling, normalize)
    return result


def _tokens(
    model: Transformer, tokenizer: Tokenizer, text: str, number: int, limit: int | None, truncate: bool
) -> list[int]:
    if not text:
        raise PromptError(f"text {number} is empty")
    tokens = tokenizer.encode(text)
    rows = model.config.embeddings.vocab_size
    if max(tokens) >= rows:
        raise PromptError(f"text {number} has token id {max(tokens)}, but the model's ids run from 0 to {rows - 1}")
    if limit is None or len(tokens) <= limit:
        return tokens
    if not truncate:
        raise PromptError(
            f"text {number} has {len(tokens)} tokens, but the model's context is {limit}; "
            "shorten it or allow cutting (truncate)"
        )
    # What the tokenizer puts at the end stays there.
    ending = tokens[-1:] if tokens[-1] in tokenizer.special_ids else []
    return tokens[: limit - len(ending)] + ending


def _embed_batch(
    model: Transformer, tokenizer: Tokenizer, rows: list[list[int]], pooling: str, normalize: bool
) -> np.ndarray:
    longest = max(map(len, rows))
    padding = tokenizer.pad_id or 0
    tokens = mx.array([row + [padding] * (longest - len(row)) for row in rows])
    lengths = mx.array([len(row) for row in rows])
    # Of an encoder-decoder the encoder's states stand for the text.
    states = model.encode if model.config.has_memory else model.hidden
    hidden = states(tokens, key_lengths=lengths).astype(mx.float32)
    vectors = pool(hidden, "first" if pooling == "cls" else pooling, lengths)
    if normalize:
        vectors = vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    result = np.array(vectors)
    if not np.isfinite(result).all():
        raise CheckpointError(
            "the model gives embeddings that are not numbers: its weights are damaged, or overflow in this dtype"
        )
    return result
