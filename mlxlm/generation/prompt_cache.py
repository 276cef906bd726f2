"""Prompt caches on disk: what a model made of a text once, so that no later prompt that begins so reads it again.

A file is safetensors: the tokens, and the arrays of each layer's cache. Its metadata say which cache it is, for which
model and tokenizer, so that no other one takes it for its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxlm.checkpoint import open_safetensors, save_safetensors
from mlxlm.errors import CheckpointError, PromptError, UsageError
from mlxlm.generation.steps import check_generates, check_ids, prefill
from mlxlm.layers import Cache, CacheSpec

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

_FORMAT = "mlxlm prompt cache 1"
# Texts that tokenizers cut differently: words, spaces, digits, other scripts, code.
PROBE = "Hello, world!  1234 naïve Ünïcode\n\tdef f(x): return x**2  # 你好 שלום 🙂"


@dataclass(frozen=True, kw_only=True)
class PromptCache:
    """What a model made of a text.

    tokens: it has.  cache: that holds them (but for those that could be cut otherwise when the text goes on).
    text: the tokens' text as it was given, "" when they were given as such.  chat: whether text is the beginning of a
    chat message.  system: the system message before it, None for the template's own.
    """

    tokens: tuple[int, ...]
    cache: Cache = field(repr=False)
    spec: CacheSpec = CacheSpec()
    text: str = ""
    chat: bool = False
    system: str | None = None

    def continued(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Tokens of the prompt that is this text and what follows it."""
        return chat_tokens(tokenizer, self.text + text, self.chat, self.system)

    def begins(self, tokens: Sequence[int]) -> Cache:
        """The cache, cut to what it shares with the beginning of `tokens`. Raises PromptError when that is nothing.

        At least one token is left to be read.
        """
        limit = min(self.cache.length, len(tokens) - 1)
        shared = next((i for i in range(limit) if self.tokens[i] != tokens[i]), limit)
        if shared < 1 or not self.cache.can_trim(shared):
            raise PromptError(
                f"the prompt doesn't begin with the {len(self.tokens)} tokens of the prompt cache; it must go on with "
                "the same text"
            )
        self.cache.trim(shared)
        return self.cache


def make_prompt_cache(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    spec: CacheSpec | None = None,
    chat: bool | None = None,
    system: str | None = None,
) -> PromptCache:
    """Read a text, to which later prompts are appended.

    chat: the text is the beginning of a user's message; default where the tokenizer has a chat template.
    spec: of the cache, default `CacheSpec()`.  system: a system message before it.
    """
    check_generates(model)
    if model.config.has_memory:
        raise UsageError("an encoder-decoder model reads every prompt anew: there is no prompt cache for it")
    if not text:
        raise PromptError("the text to cache is empty")
    chat = tokenizer.chat_template is not None if chat is None else chat
    if system is not None and not chat:
        raise PromptError("a system message needs a chat template, which this model doesn't have or was told to ignore")
    spec = CacheSpec() if spec is None else spec
    # Only tokens that stay the same however the text goes on are kept.
    variants = [chat_tokens(tokenizer, text + end, chat, system) for end in ("", "a", " a", "\n\n1")]
    shortest = min(map(len, variants))
    shared = next((i for i in range(shortest) if len({v[i] for v in variants}) > 1), shortest)
    tokens = variants[0][:shared]
    if not tokens:
        raise PromptError("the text to cache has no token that stays the same when more text follows")
    check_ids(model, tokens)
    cache = model.make_cache(spec)
    mx.eval(prefill(model, tokens, cache), cache.arrays())
    return PromptCache(tokens=tuple(tokens), cache=cache, spec=spec, text=text, chat=chat, system=system)


def chat_tokens(tokenizer: Tokenizer, text: str, chat: bool, system: str | None = None) -> list[int]:
    """Tokens of a prompt: of a user's message, which an answer follows, or of plain text."""
    if chat:
        first = [] if system is None else [{"role": "system", "content": system}]
        return tokenizer.encode_chat([*first, {"role": "user", "content": text}], add_generation_prompt=True)
    return tokenizer.encode(text)


def save_prompt_cache(path: str | Path, model: Transformer, tokenizer: Tokenizer, prompt: PromptCache) -> None:
    """Write a prompt cache to a .safetensors file. An older file stays whole until the new one is."""
    path = _path(path)
    cache = prompt.cache
    if len(cache.row_lengths) != 1:
        raise UsageError(f"a prompt cache has one row, not {len(cache.row_lengths)}")
    tensors = {"tokens": mx.array(prompt.tokens, dtype=mx.int32)}
    counts = []
    for index, layer in enumerate(cache):
        keys, values = layer.filled()
        counts.append([layer.length, layer.virtual])
        for name, parts in (("keys", keys), ("values", values)):
            tensors |= {f"layers.{index}.{name}.{number}": array for number, array in enumerate(parts)}
    metadata = {
        "format": _FORMAT,
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "spec": json.dumps(asdict(prompt.spec)),
        "layers": json.dumps(counts),
        "text": json.dumps({"text": prompt.text, "chat": prompt.chat, "system": prompt.system}),
    }
    save_safetensors(path.parent, tensors, metadata=metadata, stem=path.stem, max_shard_bytes=2**62)


def load_prompt_cache(path: str | Path, model: Transformer, tokenizer: Tokenizer) -> PromptCache:
    """A prompt cache from a file of `save_prompt_cache`.

    Raises CheckpointError for a file that isn't one, and UsageError when it was made with another model, adapter or
    tokenizer.
    """
    path = _path(path)
    checkpoint = open_safetensors(path)
    held = checkpoint.metadata
    if held.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no prompt cache; mlxlm cache-prompt makes one")
    for name, own in (("model", model_fingerprint(model)), ("tokenizer", tokenizer_fingerprint(tokenizer))):
        if held.get(name) != own:
            raise UsageError(f"the prompt cache {path} was made with another {name}; make it anew with this one")
    try:
        spec, about = CacheSpec(**json.loads(held["spec"])), json.loads(held["text"])
        cache = model.make_cache(spec)
        arrays = checkpoint.load()
        for index, (length, virtual) in enumerate(json.loads(held["layers"])):
            keys, values = (
                tuple(arrays[f"layers.{index}.{name}.{part}"] for part in range(1 if spec.bits is None else 3))
                for name in ("keys", "values")
            )
            cache[index].fill(keys, values, length, virtual)
        tokens = tuple(arrays["tokens"].tolist())
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged prompt cache ({error}); make it anew") from error
    mx.eval(cache.arrays())
    return PromptCache(tokens=tokens, cache=cache, spec=spec, **about)


def _path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"a prompt cache is a .safetensors file, not {path.name!r}")
    return path


def model_fingerprint(model: Transformer) -> str:
    """A hash of the configuration and of some values of every parameter: another fine-tuning is another model."""
    digest = hashlib.sha256(json.dumps(model.config.to_json(), sort_keys=True).encode())
    parameters: list[tuple[str, Any]] = sorted(tree_flatten(model.parameters()))
    samples = [array.reshape(-1)[: 4 * max(1, array.size // 4) : max(1, array.size // 4)] for _, array in parameters]
    mx.eval(samples)
    for (name, array), sample in zip(parameters, samples, strict=True):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(sample.astype(mx.float32) if array.dtype == mx.bfloat16 else sample).tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of what the tokenizer makes of texts and chats."""
    known = [tokenizer.vocab_size, sorted(tokenizer.stop_ids), tokenizer.encode(PROBE), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
