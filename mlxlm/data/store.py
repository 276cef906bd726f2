"""Tokenised documents on disk: memory-mapped shards, each with an index of its documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from mlxlm.errors import DataError, UsageError

_OPEN_SHARDS = 512


def token_type(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def document_hash(text: str) -> int:
    """64 bits that depend on a document's text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


@lru_cache(maxsize=_OPEN_SHARDS)
def _mapped(path: str, dtype: str, size: int, modified: int) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,))


class TokenStore:
    """Documents as token ids, read from memory-mapped shards: only what is asked for is loaded.

    In memory are 24 bytes a document: length, hash and place. Documents keep the order of their sources.

    Attributes:
        lengths: (N,) int64, tokens of each document, the end-of-text token included.
        hashes: (N,) uint64, `document_hash` of each.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        dtype: np.dtype,
        shard_of: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        hashes: np.ndarray,
    ) -> None:
        self.shards, self.dtype = tuple(shards), np.dtype(dtype)
        self._shard_of, self._starts = shard_of, starts
        self.lengths, self.hashes = lengths, hashes
        self._mapped = [self._stat(path) for path in self.shards]

    def _stat(self, path: Path) -> tuple[str, str, int, int]:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(
                f"{path}: a shard of tokens can't be read ({error.strerror}); build the store again"
            ) from None
        return str(path), self.dtype.str, stat.st_size // self.dtype.itemsize, stat.st_mtime_ns

    @classmethod
    def open(cls, shards: Iterable[Path], dtype: np.dtype) -> TokenStore:
        """From shards: NAME.bin holds tokens, NAME.npy (2, documents) uint64 the lengths and the hashes.

        Raises DataError for a shard that is missing or shorter than its index says.
        """
        shards = list(shards)
        numbers, starts, lengths, hashes = [], [], [], []
        for number, path in enumerate(shards):
            try:
                index = np.load(path.with_suffix(".npy"))
                held = path.stat().st_size // np.dtype(dtype).itemsize
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: a shard of tokens can't be read ({error}); build the store again") from None
            sizes = index[0].astype(np.int64)
            if sizes.sum() != held:
                raise DataError(f"{path}: holds {held} tokens, its index says {sizes.sum()}; build the store again")
            numbers.append(np.full(len(sizes), number, dtype=np.int32))
            starts.append(np.cumsum(sizes) - sizes)
            lengths.append(sizes)
            hashes.append(index[1])
        return cls(
            shards,
            dtype,
            np.concatenate([np.zeros(0, np.int32), *numbers]),
            np.concatenate([np.zeros(0, np.int64), *starts]),
            np.concatenate([np.zeros(0, np.int64), *lengths]),
            np.concatenate([np.zeros(0, np.uint64), *hashes]),
        )

    @classmethod
    def joined(cls, stores: Sequence[TokenStore]) -> TokenStore:
        """One store of the documents of several, made with one tokenizer."""
        if len(stores) == 1:
            return stores[0]
        if len({store.dtype for store in stores}) != 1:
            raise UsageError("stores of different token types can't be joined; build them with one tokenizer")
        firsts = np.cumsum([0, *(len(store.shards) for store in stores)])
        return cls(
            [shard for store in stores for shard in store.shards],
            stores[0].dtype,
            np.concatenate([store._shard_of + first for store, first in zip(stores, firsts, strict=False)]),
            np.concatenate([store._starts for store in stores]),
            np.concatenate([store.lengths for store in stores]),
            np.concatenate([store.hashes for store in stores]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """The number of documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """The number of tokens, end-of-text tokens included."""
        return int(self.lengths.sum())

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A document's tokens from `start` to `stop`, int32."""
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        first = int(self._starts[document])
        shard = _mapped(*self._mapped[self._shard_of[document]])
        return shard[first + start : first + stop].astype(np.int32)

    def selected(self, documents: np.ndarray) -> TokenStore:
        """The store of some documents only: indices, or a mask of shape (N,)."""
        return TokenStore(
            self.shards,
            self.dtype,
            self._shard_of[documents],
            self._starts[documents],
            self.lengths[documents],
            self.hashes[documents],
        )

    def split(self, valid_fraction: float, seed: int = 0) -> tuple[TokenStore, TokenStore]:
        """Training and validation documents.

        A document's side depends on its text and the seed alone: it stays when documents are added, and equal texts
        are always on the same side. So the share of validation documents is `valid_fraction` only on average.
        """
        if not 0 <= valid_fraction < 1:
            raise UsageError(f"valid_fraction {valid_fraction}; expected 0 <= valid_fraction < 1")
        with np.errstate(over="ignore"):  # splitmix64 mixes the seed in (Steele et al. 2014), modulo 2**64
            mixed = self.hashes + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
        valid = (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < valid_fraction
        return self.selected(~valid), self.selected(valid)

    @property
    def fingerprint(self) -> str:
        """A hash of which documents there are, in which order."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.lengths).tobytes())
        digest.update(np.ascontiguousarray(self.hashes).tobytes())
        return digest.hexdigest()
