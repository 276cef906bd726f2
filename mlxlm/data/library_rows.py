"""Rows that Hugging Face's library `datasets` reads: of the hub, of folders that it wrote, of table files.

    hub:OWNER/NAME, hub:OWNER/NAME/CONFIG      a data set of the hub; hub: may be left out where no path begins so
    FOLDER                                     what save_to_disk wrote
    FILE.parquet, .csv, .tsv, .json, .arrow    a table, or train, valid and test of a folder
    parquet:PATTERN, csv:PATTERN, ...          tables of any name, by what reads them

Behind any of them, after a colon, the splits in the library's own words: `:train[:10%]`, which is trained on, or
`:train=train[:90%],valid=train[90%:],test=validation`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxlm.errors import DataError, UsageError, listing, nearest

Located = Iterator[tuple[str, dict[str, Any]]]  # where a row stands, and the row
HUB, HUB_TOO = "hub:", "hf:"  # the second as in the sources of pretraining
# What reads a file, by its suffix.
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".arrow": "arrow"}
_PREFIXES = tuple(f"{name}:" for name in sorted(set(BUILDERS.values())))
_OURS = {"validation": "valid", "dev": "valid"}
_SPLITS = ("train", "valid", "test")
_SAVED = ("dataset_dict.json", "dataset_info.json")


def library_splits(data: str) -> dict[str, Located] | None:
    """The rows of each split, or None for what the library is not needed for.

    Raises DataError where it is needed and missing, or fails; UsageError for splits that are named wrongly.
    """
    place, wanted = _parted(HUB + data.removeprefix(HUB_TOO) if data.startswith(HUB_TOO) or _of_hub(data) else data)
    path = Path(place).expanduser()
    if place.startswith(HUB):
        data = HUB + data.removeprefix(HUB_TOO).removeprefix(HUB)  # as messages have it
        name, config = _name_and_config(place.removeprefix(HUB))
        found = from_library(data, lambda library: library.load_dataset(name, config))
    elif place.startswith(_PREFIXES):
        builder, _, pattern = place.partition(":")
        found = _tables(data, builder, {"train": str(Path(pattern).expanduser())})
    elif path.is_dir() and any((path / name).is_file() for name in _SAVED):
        found = from_library(data, lambda library: library.load_from_disk(str(path)))
    elif path.is_dir() and (tables := _tables_in(path)):
        suffix = Path(next(iter(tables.values()))).suffix
        found = _tables(data, BUILDERS[suffix], tables)
    elif path.is_file() and path.suffix.lower() in BUILDERS:
        found = _tables(data, BUILDERS[path.suffix.lower()], {"train": str(path)})
    else:
        return None
    return _chosen(data, found if isinstance(found, Mapping) else {"train": found}, wanted)


def _of_hub(data: str) -> bool:
    """Whether data is OWNER/NAME and no path, nor one in a folder that is there."""
    path = Path(data)
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:.*)?", data) is not None and not path.exists() and not path.parent.is_dir()


def _parted(data: str) -> tuple[str, str]:
    """The place, and the splits behind a colon, "" without."""
    if Path(data).expanduser().exists():
        return data, ""
    start = next((len(prefix) for prefix in (HUB, *_PREFIXES) if data.startswith(prefix)), 0)
    head, _, wanted = data[start:].partition(":")
    place = data[:start] + head
    known = start or Path(place).expanduser().exists()
    return (place, wanted) if known else (data, "")


def _name_and_config(name: str) -> tuple[str, str | None]:
    """OWNER/NAME/CONFIG as "OWNER/NAME" and "CONFIG", None without."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise UsageError(f"{HUB}{name} names no data set; expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _tables_in(folder: Path) -> dict[str, str]:
    """Table files of a folder by split; of one kind, the first that has any."""
    if any((folder / f"{name}.jsonl").is_file() for name in (*_SPLITS, *_OURS)):
        return {}  # read without the library
    names = {**dict.fromkeys(_SPLITS), **_OURS}
    for suffix in BUILDERS:
        there = {name: folder / f"{name}{suffix}" for name in names if (folder / f"{name}{suffix}").is_file()}
        if there:
            return {names[name] or name: str(path) for name, path in there.items()}
    return {}


def _tables(data: str, builder: str, files: Mapping[str, str]) -> Any:
    options = {"sep": "\t"} if builder == "csv" and next(iter(files.values())).lower().endswith(".tsv") else {}
    return from_library(data, lambda library: library.load_dataset(builder, data_files=dict(files), **options))


def from_library(data: str, load: Callable[[Any], Any]) -> Any:
    """What the library makes of a data set.  load: asks the library.

    Raises DataError where the library is missing, and for whatever it raises.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{data} is read by the package datasets, which is missing: pip install datasets, or give JSON Lines"
        ) from None
    if not sys.stderr.isatty():
        getattr(library, "disable_progress_bars", bool)()  # older versions have it elsewhere
    try:
        return load(library)
    except Exception as error:  # the library raises whatever its many back ends raise
        said = str(error).strip() or type(error).__name__
        raise DataError(f"{data} can't be loaded: {said.splitlines()[0]}") from None


def _chosen(data: str, found: Mapping[str, Any], wanted: str) -> dict[str, Located]:
    """The splits that are wanted, each under our name for it."""
    if not wanted:
        ours = {_OURS.get(name, name): name for name in found if _OURS.get(name, name) in _SPLITS}
        if not ours:
            raise DataError(
                f"{data} has the splits {listing(found)}; say which to train on, as {data}:{next(iter(found))}"
            )
        return {name: _located(theirs, found[theirs]) for name, theirs in ours.items()}
    named = dict(_assignment(part, wanted) for part in wanted.split(","))
    return {name: _sliced(data, found, spec) for name, spec in named.items()}


def _assignment(part: str, wanted: str) -> tuple[str, str]:
    """("valid", "train[90%:]") from "valid=train[90%:]"; alone it is what to train on."""
    name, equals, spec = part.strip().partition("=")
    name, spec = (_OURS.get(name, name), spec) if equals else ("train", name)
    if name not in _SPLITS or not spec or (not equals and "," in wanted):
        raise UsageError(f"the splits {wanted!r}; expected one as train[:10%], or train=...,valid=...,test=...")
    return name, spec


def _sliced(data: str, found: Mapping[str, Any], spec: str) -> Located:
    library = importlib.import_module("datasets")
    try:
        parts = library.ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in found.items()})
    except (ValueError, AssertionError) as error:
        names = [re.split(r"\[", one.strip())[0] for one in spec.split("+")]
        strange = [name for name in names if name not in found]
        why = f"no split {strange[0]!r}{nearest(strange[0], found)}" if strange else str(error).splitlines()[0]
        raise UsageError(f"{data}: {why}; its splits: {listing(found)}") from None
    for part in parts:
        if part.to <= part.from_:
            raise UsageError(f"{data}: {spec} is empty; {part.splitname} has {len(found[part.splitname])} rows")
    return (
        one
        for part in parts
        for one in _located(part.splitname, found[part.splitname].select(range(part.from_, part.to)), part.from_)
    )


def _located(split: str, rows: Iterable[Any], first: int = 0) -> Located:
    """Rows as the checks want them: numbers of classes as names, nothing where a table has only a gap."""
    classes = {name: kind for name, kind in rows.features.items() if _names(kind)}  # type: ignore[attr-defined]
    for number, row in enumerate(rows, first):
        where = f"{split}, row {number}"
        named = {name: _named(_names(classes[name]), row[name], where, name) for name in classes}
        yield where, _without_gaps({**row, **named})


def _names(kind: Any) -> list[str] | None:
    """Names of the classes of a column, or of the items of its lists; None where it has no classes."""
    return getattr(getattr(kind, "feature", kind), "names", None)


def _named(names: Any, value: Any, where: str, column: str) -> Any:
    if isinstance(value, list):
        return [_named(names, one, where, column) for one in value]
    if value is not None and not 0 <= value < len(names):
        raise DataError(
            f"{where}: {column} is {value}, which stands for no label; leave such a split out by naming the others, as "
            ":train=train,valid=validation"
        )
    return None if value is None else names[value]


def _without_gaps(value: Any) -> Any:
    """Without keys whose value is None: tables fill in the keys that a row of another shape has."""
    if isinstance(value, Mapping):
        return {name: _without_gaps(one) for name, one in value.items() if one is not None}
    return [_without_gaps(one) for one in value] if isinstance(value, list) else value
