"""Text sources: files, folders, patterns, compressed files, JSON Lines and Hugging Face data sets, as documents."""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlxlm.data.library_rows import from_library
from mlxlm.errors import DataError, UsageError, listing, nearest

HUB_PREFIX = "hf:"
_COMPRESSED = (".gz", ".zst")
_ROW_SUFFIXES = (".jsonl", ".ndjson")
_ZSTD_MODULES = ("compression.zstd", "zstandard")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from.

    location: a file, a folder (all files in it, at any depth, but hidden ones), a pattern such as "books/**/*.txt", or
    "hf:NAME" or "hf:NAME:SPLIT" for a Hugging Face data set (split "train" by default; needs the package `datasets`).
    field: the key of the text in JSON Lines (.jsonl, .ndjson) and data sets, default "text".
    separator: splits each text into documents, for example "\\n\\n" for blank lines; None: a file or row is one.
    weight: the share of training rows that come from here, relative to the other sources; None for all to be used
    exactly once an epoch. Either all sources of a corpus have a weight or none has.
    """

    location: str
    field: str = "text"
    separator: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.location:
            raise UsageError("a data source has an empty location; expected a file, a folder, a pattern or hf:NAME")
        if self.separator == "":
            raise UsageError(f"{self.location}: the separator is empty; expected a text, or none to keep files whole")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UsageError(f"{self.location}: weight {self.weight}; expected a number above 0")

    @classmethod
    def parse(cls, value: Source | str | Path | Mapping[str, Any]) -> Source:
        """From a path, a pattern or a mapping with the fields of this class, as in a recipe."""
        if isinstance(value, Source):
            return value
        if isinstance(value, Mapping):
            known = tuple(cls.__dataclass_fields__)
            for key in value:
                if key not in known:
                    raise UsageError(f"a data source has no setting {key!r}{nearest(key, known)}")
            if "location" not in value:
                raise UsageError("a data source needs a location: a file, a folder, a pattern or hf:NAME")
            return cls(**{**value, "location": str(value["location"])})
        return cls(location=str(value))


def find_files(location: str) -> list[Path]:
    """The files of a location, sorted by path. Raises DataError when there are none."""
    path = Path(location).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        problem = "the folder has no files"
    elif glob.has_magic(str(path)):
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        problem = "no file fits the pattern"
    else:
        beside = [entry.name for entry in path.parent.iterdir() if entry.exists()] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        raise DataError(f"{location}: no such file or folder{close if close.startswith('; did') else ''}")
    if not files:
        raise DataError(f"{location}: {problem}")
    return sorted(files)


def content_hash(path: Path) -> str:
    """A hash of a file's bytes, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from None
    return digest.hexdigest()


def read_documents(source: Source, files: Iterable[Path]) -> Iterator[str]:
    """The documents of a source's files in order, empty ones left out. One file's text is in memory at a time, and of
    JSON Lines one row.

    Raises DataError naming the file (and line) of what is not UTF-8, not JSON, or can't be decompressed.
    """
    texts = _hub_texts(source) if source.location.startswith(HUB_PREFIX) else _file_texts(source, files)
    for text in texts:
        for document in [text] if source.separator is None else text.split(source.separator):
            if document.strip():
                yield document


def _file_texts(source: Source, files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        try:
            with _open(path) as file:
                if Path(_plain_name(path)).suffix.lower() in _ROW_SUFFIXES:
                    yield from _rows(path, file, source.field)
                else:
                    yield _decode(file.read(), str(path))
        except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
            raise DataError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


def _plain_name(path: Path) -> str:
    return path.name[: -len(path.suffix)] if path.suffix.lower() in _COMPRESSED else path.name


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {error.start}); convert it (iconv -t UTF-8), or leave it out with a "
            "pattern such as folder/**/*.txt"
        ) from None


def _rows(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(_decode(line, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with {field!r}, not a {type(row).__name__}")
        yield _text(row, field, where)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where}: the row has no {field!r}; its keys: {listing(map(str, row))}")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: {field!r} is a {type(row[field]).__name__}, not a string")
    return row[field]


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return _open_zstd(path)
    return open(path, "rb")


def _open_zstd(path: Path) -> BinaryIO:
    for name in _ZSTD_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return module.open(path, "rb") if name == "compression.zstd" else io.BufferedReader(_ZstdFile(module, path))
    raise DataError(f"{path}: reading .zst needs Python 3.14 or the package zstandard (pip install zstandard)")


class _ZstdFile(io.RawIOBase):
    """What is in a .zst file, frame after frame. Unlike zstandard's own reader it notices that a file was cut short."""

    def __init__(self, module: Any, path: Path):
        self._module, self._file = module, path.open("rb")
        self._frame: Any = None
        self._compressed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the next piece reaches. Raises EOFError at the end of a frame that has none."""
        while not self._plain:
            compressed = self._compressed or self._file.read(1 << 16)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the compressed data was cut short")
                return 0
            self._frame = self._frame or self._module.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(compressed))
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _zstd_errors() -> list[type[Exception]]:
    """What the modules that are loaded raise for a file that is no zstd stream."""
    return [getattr(sys.modules.get(name), "ZstdError", EOFError) for name in _ZSTD_MODULES]


def _hub_dataset(source: Source) -> Any:
    """The rows of a Hugging Face data set, memory-mapped by its own library."""
    name, _, split = source.location.removeprefix(HUB_PREFIX).partition(":")
    return from_library(source.location, lambda library: library.load_dataset(name, split=split or "train"))


def _hub_texts(source: Source) -> Iterator[str]:
    for number, row in enumerate(_hub_dataset(source)):
        yield _text(row, source.field, f"{source.location}, row {number}")


def describe_files(source: Source, previous: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """What a source consists of: per file its path, size (bytes), mtime_ns and content hash.

    previous: descriptions by path from before; a file of the same size and time is taken to be unchanged, without
    reading it. A data set of the hub is described by the fingerprint that its library gives.
    """
    if source.location.startswith(HUB_PREFIX):
        fingerprint = str(getattr(_hub_dataset(source), "_fingerprint", ""))
        return [{"path": source.location, "size": 0, "mtime_ns": 0, "hash": fingerprint}]
    described = []
    for path in find_files(source.location):
        stat = path.stat()
        entry = {"path": str(path.absolute()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        old = (previous or {}).get(entry["path"], {})
        same = all(old.get(key) == value for key, value in entry.items())
        described.append({**entry, "hash": old["hash"] if same else content_hash(path)})
    return described
