"""Rows of supervised data: where they are, of which format they are, and whether each one is well formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlm.data.jsonl import read_jsonl
from mlxlm.data.library_rows import library_splits
from mlxlm.errors import DataError, UsageError, listing, nearest

Row = Mapping[str, Any]
SPLITS = ("train", "valid", "test")
_VALID_NAMES = ("valid", "validation", "dev")


@dataclass(frozen=True, kw_only=True)
class Format:
    """keys: that a row must have, and by which the format is known.  optional: that it may have besides."""

    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()


TEXT_FILES = (".txt", ".md")
# What other programs call our keys.
_USUAL = {
    "prompt": "instruction question query problem input user context",
    "completion": "response answer output reply solution assistant",
    "text": "sentence content document body review",
    "label": "labels category class sentiment intent",
    "tokens": "words",
    "labels": "tags ner_tags pos_tags",
    "source": "article src",
    "target": "summary tgt highlights",
}

# The first whose keys are all there wins, so that {"text", "label"} is not taken for {"text"}.
FORMATS: dict[str, Format] = {
    "chat": Format(keys=("messages",), optional=("tools",)),
    "preference": Format(keys=("prompt", "chosen", "rejected"), optional=("margin",)),
    "ranking": Format(keys=("prompt", "ranked")),
    "choices": Format(keys=("prompt", "choices", "answer")),
    "completion": Format(keys=("prompt", "completion")),
    "classification": Format(keys=("text", "label"), optional=("pair",)),
    "tagging": Format(keys=("tokens", "labels")),
    "seq2seq": Format(keys=("source", "target")),
    "text": Format(keys=("text",)),
    "prompt": Format(keys=("prompt",)),
}
_KEYS = {key for form in FORMATS.values() for key in (*form.keys, *form.optional)}


@dataclass(frozen=True)
class Rows:
    """The rows of one file or split. name: for messages.  format: of all of them, a key of `FORMATS`."""

    name: str
    format: str
    rows: list[tuple[str, Row]]  # where each stands ("train.jsonl, line 3"), and the row

    def __len__(self) -> int:
        return len(self.rows)


def format_of(row: Row, where: str) -> str:
    """The format whose keys the row has. Raises DataError when there is none."""
    for name, form in FORMATS.items():
        if all(key in row for key in form.keys):
            return name
    strange = next((key for key in row if key not in _KEYS), "")
    expected = "; ".join("{" + ", ".join(form.keys) + "}" for form in FORMATS.values())
    hint = renaming(row) or (nearest(strange, _KEYS) if strange else "")
    raise DataError(
        f"{where}: the keys {listing(row) or 'none'} are of no known format{hint} (expected one of {expected})"
    )


def renaming(row: Row) -> str:
    """A hint which columns to rename for a format with more of the row in it; "" where no name is a usual one."""
    ours = {theirs: name for name, usual in _USUAL.items() for theirs in usual.split()}
    for form in FORMATS.values():
        names = {key: next((one for one in row if ours.get(one) == key), None) for key in form.keys if key not in row}
        if names and all(names.values()) and len(form.keys) > 1:
            given = " ".join(f"--columns {key}={theirs}" for key, theirs in names.items())
            return f"; did you mean {{{', '.join(form.keys)}}}? Say so with {given}"
    return ""


def read_rows(path: str | Path, *, limit: int | None = None, columns: Mapping[str, str] | None = None) -> Rows:
    """All rows of a .jsonl file, checked: one format, taken from the first row, and values of the right types. Of a
    .txt or .md file each paragraph is a row of text.

    Keys that the format doesn't know are passed over, as data often carries ids and sources.  limit: of rows, None
    for all.  columns: see `read_splits`.  Raises DataError naming file and line.
    """
    name, rows = str(path), (_paragraphs(path) if Path(path).suffix.lower() in TEXT_FILES else _numbered(path))
    return check_rows(name, ((f"{name}, line {number}", row) for number, row in rows), limit, columns)


def check_rows(
    name: str, rows: Iterable[tuple[str, Row]], limit: int | None = None, columns: Mapping[str, str] | None = None
) -> Rows:
    """The rows as `Rows`, each with the place that messages name it by.  columns: see `read_splits`.

    Raises DataError for the first bad one.
    """
    found: list[tuple[str, Row]] = []
    form = ""
    for where, given in rows:
        if limit is not None and len(found) >= limit:
            break
        row = _renamed(given, columns, where) if columns else given
        form = form or format_of(row, where)
        if not all(key in row for key in FORMATS[form].keys):
            missing = listing(key for key in FORMATS[form].keys if key not in row)
            raise DataError(f"{where}: the row lacks {missing}; the first rows of {name} are of format {form!r}")
        other = format_of(row, where)
        if other != form:
            raise DataError(f"{where}: the row is of format {other!r}, those before it of {form!r}")
        _CHECKS[form](row, where)
        found.append((where, row))
    if not found:
        what = "text" if Path(name).suffix.lower() in TEXT_FILES else "rows; expected one JSON object a line"
        raise DataError(f"{name} has no {what}")
    return Rows(name, form, found)


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    for ours, theirs in columns.items():
        if ours not in _KEYS:
            raise UsageError(f"columns: no format has {ours!r}{nearest(ours, _KEYS)}")
        if theirs not in row:
            raise DataError(f"{where}: there is no column {theirs!r} to take for {ours!r}{nearest(theirs, row)}")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return {**rest, **{ours: row[theirs] for ours, theirs in columns.items()}}


def find_splits(data: str | Path) -> dict[str, Path]:
    """Files of the splits: of a folder train.jsonl, valid.jsonl and test.jsonl; a single file is "train".

    Raises DataError when there is no such file or folder, or no train.jsonl in it.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DataError(
            f"{data} is no file and no folder; expected a .jsonl, .txt, .csv or .parquet file, a folder with "
            "train.jsonl, or a data set of the hub, written as hub:OWNER/NAME"
        )
    found = {name: path / f"{name}.jsonl" for name in SPLITS if (path / f"{name}.jsonl").is_file()}
    for name in _VALID_NAMES:
        if "valid" not in found and (path / f"{name}.jsonl").is_file():
            found["valid"] = path / f"{name}.jsonl"
    if not found:
        there = [entry.name for entry in sorted(path.iterdir())]
        raise DataError(
            f"{data} has no train.jsonl, valid.jsonl or test.jsonl; it holds: {listing(there) or 'nothing'}"
        )
    return found


def read_splits(data: str | Path, columns: Mapping[str, str] | None = None) -> dict[str, Rows]:
    """The rows of all splits of a folder, a file, or what `library_rows` reads.

    columns: names that formats have, by those that the data has instead, as {"completion": "response"}.
    Raises DataError, also when the splits are of different formats.
    """
    tables = library_splits(str(data))
    if tables is not None:
        splits = {name: check_rows(f"{data}, {name}", rows, columns=columns) for name, rows in tables.items()}
    else:
        splits = {name: read_rows(path, columns=columns) for name, path in find_splits(data).items()}
    forms = {rows.format for rows in splits.values()}
    if len(forms) > 1:
        raise DataError(f"{data}: the splits are of different formats: {listing(sorted(forms))}")
    return splits


def read_split(
    data: str | Path, split: str | None = None, *, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> Rows:
    """The rows of one split, by default of "test", or of the only one of what is no folder of splits.

    limit, columns: see `read_rows`.  Raises UsageError for a split that the data hasn't.
    """
    tables = library_splits(str(data))
    found: Mapping[str, Any] = find_splits(data) if tables is None else tables
    alone = len(found) == 1 and not (tables is None and Path(data).expanduser().is_dir())
    name = split or ("train" if alone and "train" in found else "test")
    if name not in found:
        raise UsageError(f"{data} has no split {name!r}{nearest(name, found)}; choose one with --split")
    if tables is None:
        return read_rows(found[name], limit=limit, columns=columns)
    return check_rows(f"{data}, {name}", found[name], limit, columns)


def _numbered(path: str | Path) -> Iterable[tuple[int, Row]]:
    """Rows and their line numbers; `read_jsonl` passes over empty lines, so they are counted here."""
    text_lines: list[int] = []
    if str(path) != "-":
        try:
            with open(path, "rb") as file:
                text_lines = [number for number, line in enumerate(file, 1) if line.strip()]
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}") from None
    for index, row in enumerate(read_jsonl(path)):
        yield (text_lines[index] if index < len(text_lines) else index + 1), row


def _paragraphs(path: str | Path) -> Iterable[tuple[int, Row]]:
    """The paragraphs of a text, which empty lines part, and the lines that they begin at."""
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    held: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            held.append(line)
        elif held:
            yield number - len(held), {"text": "\n".join(held)}
            held = []


def _text(row: Row, where: str, *keys: str, empty: bool = False) -> None:
    for key in keys:
        if not isinstance(row[key], str):
            raise DataError(f"{where}: {key!r} must be text, not {type(row[key]).__name__}")
        if not empty and not row[key].strip():
            raise DataError(f"{where}: {key!r} is empty")


def _check_chat(row: Row, where: str) -> None:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} must be an object with a 'role' that is text")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise DataError(f"{where}: message {number} ({message['role']}) has no 'content' and no 'tool_calls'")
    if not any(message["role"] == "assistant" for message in messages):
        roles = listing(dict.fromkeys(message["role"] for message in messages))
        raise DataError(f"{where}: no message has the role 'assistant' (roles: {roles}), so there is nothing to learn")
    if row.get("tools") is not None and not isinstance(row["tools"], list):
        raise DataError(f"{where}: 'tools' must be a list")


def _check_classification(row: Row, where: str) -> None:
    _text(row, where, "text")
    if isinstance(row["label"], bool) or not isinstance(row["label"], (str, int)):
        raise DataError(f"{where}: 'label' must be text or a whole number, not {type(row['label']).__name__}")
    if row.get("pair") is not None:
        _text(row, where, "pair")


def _check_tagging(row: Row, where: str) -> None:
    tokens, labels = row["tokens"], row["labels"]
    if not isinstance(tokens, list) or not isinstance(labels, list) or not tokens:
        raise DataError(f"{where}: 'tokens' and 'labels' must be lists of at least one entry")
    if len(tokens) != len(labels):
        raise DataError(f"{where}: {len(tokens)} tokens but {len(labels)} labels")
    if not all(isinstance(token, str) and token.strip() for token in tokens):
        raise DataError(f"{where}: every token must be text that isn't empty")
    if not all(isinstance(label, (str, int)) and not isinstance(label, bool) for label in labels):
        raise DataError(f"{where}: every label must be text or a whole number")


def _check_ranking(row: Row, where: str) -> None:
    _text(row, where, "prompt")
    ranked = row["ranked"]
    if (
        not isinstance(ranked, list)
        or len(ranked) < 2
        or not all(isinstance(one, str) and one.strip() for one in ranked)
    ):
        raise DataError(f"{where}: 'ranked' must be a list of at least two answers, best first, none of them empty")


def _check_choices(row: Row, where: str) -> None:
    _text(row, where, "prompt")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: 'choices' must be a list of at least two texts, none of them empty")
    if isinstance(answer, str) and choices.count(answer) != 1:
        raise DataError(f"{where}: 'answer' {answer!r} must be one of the choices, once{nearest(answer, choices)}")
    number = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    if not number and not isinstance(answer, str):
        raise DataError(f"{where}: 'answer' must be a choice, or its number from 0 to {len(choices) - 1}")


_CHECKS: dict[str, Callable[[Row, str], None]] = {
    "chat": _check_chat,
    "preference": lambda row, where: _text(row, where, "prompt", "chosen", "rejected"),
    "ranking": _check_ranking,
    "choices": _check_choices,
    "completion": lambda row, where: _text(row, where, "prompt", "completion"),
    "classification": _check_classification,
    "tagging": _check_tagging,
    "seq2seq": lambda row, where: _text(row, where, "source", "target"),
    "text": lambda row, where: _text(row, where, "text"),
    "prompt": lambda row, where: _text(row, where, "prompt"),
}
