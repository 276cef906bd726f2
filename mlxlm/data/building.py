"""Building tokenised stores: in parallel, once, and only what is not there yet.

A build cuts the documents, in order, into chunks; each chunk becomes one shard, written under a temporary name and
renamed. An interrupted build goes on at the shards that are missing; sources or a tokenizer that changed start anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxlm.checkpoint.files import write_bytes_atomic, write_json_atomic
from mlxlm.data.mixture import Mixture
from mlxlm.data.sources import Source, describe_files, read_documents
from mlxlm.data.store import TokenStore, document_hash, token_type
from mlxlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

_FORMAT = 1
_CHUNK = 1 << 24  # characters of a shard: 8 to 16 MB of tokens
_BATCH = 64  # documents tokenised in one call
_PARALLEL_FROM = 1 << 23  # bytes of sources from which starting further processes pays
_MANIFEST, _PLAN, _TOKENIZER = "manifest.json", "building.json", "tokenizer"


def prepare(
    sources: Source | str | Path | Sequence[Source | str | Path | Mapping[str, Any]],
    tokenizer: Tokenizer,
    cache_folder: str | Path,
    *,
    valid_fraction: float = 0.0,
    seed: int = 0,
    processes: int | None = None,
    progress: bool = True,
) -> tuple[TokenStore | Mixture, TokenStore]:
    """Training and validation documents of some sources, tokenised now or taken from the cache.

    sources: see `Source`; paths, patterns and mappings of its fields do too.  cache_folder: holds one folder a source.
    valid_fraction: the share of documents for validation, by hash (see `TokenStore.split`), default 0.  seed: of the
    split.  processes: how many tokenise, default by size and cores.  progress: show a bar on a terminal's stderr.
    Returns the training documents (a `Mixture` where the sources have weights) and those for validation, which may be
    none. Raises DataError for unusable data, and when no document is left for training.
    """
    given = [sources] if isinstance(sources, (Source, str, Path, Mapping)) else list(sources)
    parsed = [Source.parse(one) for one in given]
    if not parsed:
        raise UsageError("no data: expected at least one file, folder, pattern or hf:NAME")
    weighted = [source for source in parsed if source.weight is not None]
    if weighted and len(weighted) != len(parsed):
        without = next(source.location for source in parsed if source.weight is None)
        raise UsageError(f"{without} has no weight, but {weighted[0].location} has; give all sources one, or none")
    stores = [build_store(source, tokenizer, cache_folder, processes=processes, progress=progress) for source in parsed]
    splits = [store.split(valid_fraction, seed) for store in stores]
    valid = TokenStore.joined([side for _, side in splits])
    for source, (train, _) in zip(parsed, splits, strict=True):
        if weighted and not len(train):
            raise DataError(f"{source.location}: no document is left for training")
    if weighted:
        return Mixture([train for train, _ in splits], [float(source.weight or 0) for source in parsed]), valid
    train = TokenStore.joined([side for side, _ in splits])
    if not len(train) and not len(valid):
        raise DataError("the data has no text: " + ", ".join(source.location for source in parsed))
    if not len(train):
        raise DataError(
            f"no document is left for training: the sources have {len(valid)}, all of them for validation; "
            "set a smaller valid_fraction, or a separator that cuts files into documents"
        )
    return train, valid


def build_store(
    source: Source | str | Path,
    tokenizer: Tokenizer,
    cache_folder: str | Path,
    *,
    processes: int | None = None,
    progress: bool = True,
    chunk_characters: int = _CHUNK,
) -> TokenStore:
    """The tokenised documents of one source; each document ends with the end-of-text (or separator) token.

    What is in the cache is used when files (path, size, time or else content), tokenizer and source settings are the
    same; otherwise it is built anew.  chunk_characters: size of a shard.  See `prepare` for the rest.
    """
    source = Source.parse(source)
    if processes is not None and processes < 1:
        raise UsageError(f"processes {processes}; expected 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        fingerprint = _folder_hash(Path(scratch))
        settings = {
            "format": _FORMAT, "location": _absolute(source.location), "field": source.field,
            "separator": source.separator, "tokenizer": fingerprint, "chunk_characters": chunk_characters,
        }  # fmt: skip
        key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        folder = Path(cache_folder) / f"tokens-{key}"
        manifest = _read(folder / _MANIFEST)
        files = describe_files(source, {entry["path"]: entry for entry in manifest.get("files", ())})
        dtype = token_type(tokenizer.vocab_size)
        if manifest and _contents(manifest["files"]) == _contents(files):
            with contextlib.suppress(DataError):  # a damaged store is built again
                return TokenStore.open(_shards(folder, manifest["num_shards"]), dtype)
        plan = {"settings": settings, "files": files}
        _start(folder, plan, Path(scratch))
    worker = _Worker(str(folder), dtype.str, _end(tokenizer))
    with _bar(progress, source.location) as advance:
        num_shards = _run(source, files, folder, worker, processes, chunk_characters, advance)
    write_json_atomic(folder / _MANIFEST, {**plan, "num_shards": num_shards})
    return TokenStore.open(_shards(folder, num_shards), dtype)


def _absolute(location: str) -> str:
    return location if location.startswith("hf:") else os.path.abspath(os.path.expanduser(location))


def _folder_hash(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _contents(files: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    return [(entry["path"], entry["size"], entry["hash"]) for entry in files]


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _shards(folder: Path, count: int) -> list[Path]:
    return [_shard(folder, number) for number in range(count)]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.bin"


def _end(tokenizer: Tokenizer) -> int | None:
    return tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.sep_id


def _start(folder: Path, plan: dict[str, Any], tokenizer: Path) -> None:
    """Make the folder ready: keep the shards of an interrupted build with the same plan, else remove everything."""
    old = _read(folder / _PLAN)
    same = bool(old) and _contents(old["files"]) == _contents(plan["files"])
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        # The tokenizer comes first: a plan stands for a folder that is ready.
        shutil.copytree(tokenizer, folder / _TOKENIZER)
        write_json_atomic(folder / _PLAN, plan)
    (folder / _MANIFEST).unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


class _Worker:
    """Tokenises chunks into shards, in this process or in others."""

    def __init__(self, folder: str, dtype: str, end: int | None) -> None:
        self.folder, self.dtype, self.end = folder, dtype, end
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}  # each process loads its own

    def done(self, number: int) -> bool:
        """Whether the shard is there, whole: as many tokens as its index says."""
        path = _shard(Path(self.folder), number)
        try:
            return (
                int(np.load(path.with_suffix(".npy"))[0].sum()) * np.dtype(self.dtype).itemsize == path.stat().st_size
            )
        except (OSError, ValueError):
            return False

    def write(self, number: int, documents: list[str]) -> int:
        """Write the shard of a chunk; returns its number of characters."""
        if self._tokenizer is None:
            from mlxlm.tokenizers import load_tokenizer

            self._tokenizer = load_tokenizer(Path(self.folder) / _TOKENIZER)
        pieces, index = [], []
        for first in range(0, len(documents), _BATCH):
            texts = documents[first : first + _BATCH]
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            for text, ids in zip(texts, encoded, strict=True):
                if not ids:  # white space only, or characters that the vocabulary drops
                    continue
                pieces.append(np.array(ids if self.end is None else [*ids, self.end], dtype=self.dtype))
                index.append((len(pieces[-1]), document_hash(text)))
        path = _shard(Path(self.folder), number)
        write_bytes_atomic(path, b"".join(piece.tobytes() for piece in pieces))
        content = io.BytesIO()
        np.save(content, np.array(index, dtype=np.uint64).reshape(-1, 2).T)
        write_bytes_atomic(path.with_suffix(".npy"), content.getvalue())
        return sum(map(len, documents))


_worker: _Worker | None = None


def _set_worker(worker: _Worker) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = worker


def _work(number: int, documents: list[str]) -> int:
    assert _worker is not None
    return _worker.write(number, documents)


def _chunks(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _run(
    source: Source,
    files: Sequence[Mapping[str, Any]],
    folder: Path,
    worker: _Worker,
    processes: int | None,
    characters: int,
    advance: Any,
) -> int:
    """Write all shards that are missing; returns how many there are. At most two chunks a process are in memory."""
    size = sum(entry["size"] for entry in files)
    if processes is None:
        processes = 1 if size < _PARALLEL_FROM else min(os.cpu_count() or 1, 8)
    chunks = enumerate(_chunks(read_documents(source, [Path(entry["path"]) for entry in files]), characters))
    count = 0
    if processes == 1:
        for number, chunk in chunks:
            advance(sum(map(len, chunk)) if worker.done(number) else worker.write(number, chunk))
            count += 1
        return count
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _set_worker, (worker,))
    try:
        running: set[Future[int]] = set()
        for number, chunk in chunks:
            count += 1
            if worker.done(number):
                advance(sum(map(len, chunk)))
                continue
            if len(running) >= 2 * processes:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    advance(future.result())
            running.add(pool.submit(_work, number, chunk))
        for future in running:
            advance(future.result())
    except BrokenProcessPool:
        raise DataError(
            f"{source.location}: a tokenising process was killed, perhaps for lack of memory; the next run goes on at "
            f"the shards in {folder}; set fewer processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return count


@contextlib.contextmanager
def _bar(wanted: bool, location: str) -> Iterator[Any]:
    """A function that counts tokenised characters, shown where stderr is a terminal and rich is installed."""
    if not wanted or not sys.stderr.isatty():
        yield lambda characters: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("tokenising {task.description}: {task.completed:,.0f} characters"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(location, total=None)
        yield lambda characters: bar.advance(task, characters)
