"""Collect the Python standard library of this interpreter as a corpus: train.jsonl and valid.jsonl.

    python examples/pretrain_stdlib/collect.py --output runs/stdlib/corpus

One document a file: the library's source, its tests, and the language reference that `help()` shows. Whole modules are
held out for validation, a module and its tests together, chosen by a hash of the module's name. Needs nothing but
Python and reads nothing but its own installation (PSF licence).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT = 0.03  # share of the modules
# Tables of numbers, generated parsers, and files that are broken on purpose.
SKIPPED = ("encodings", "lib2to3", "test/encoded_modules", "test/cjkencodings", "ensurepip", "site-packages")
LONGEST = 400_000  # characters; longer files are generated tables


def module_of(path: Path) -> str:
    """What a file is about: "json" for json/decoder.py, test/test_json/test_decode.py and json/tests/test_scan.py."""
    parts = [part for part in path.with_suffix("").parts if part not in ("test", "tests", "idle_test")]
    return parts[0].removeprefix("test_").removeprefix("_") if parts else "test"


def is_held_out(module: str) -> bool:
    """The same answer on every machine and for every version of Python."""
    number = int.from_bytes(hashlib.sha256(f"stdlib {module}".encode()).digest()[:4], "big")
    return number / 2**32 < HELD_OUT


def documents(library: Path) -> Iterator[tuple[str, str]]:
    """Relative path and text of every file, in order."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if any(relative.as_posix().startswith(skipped) or skipped in relative.parts for skipped in SKIPPED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if relative.as_posix() == "pydoc_data/topics.py":
            names: dict[str, dict[str, str]] = {}
            exec(compile(text, str(path), "exec"), names)  # a dictionary of texts, from the interpreter's own files
            yield from ((f"reference/{topic}.rst", names["topics"][topic]) for topic in sorted(names["topics"]))
        elif 40 < len(text) <= LONGEST:
            yield relative.as_posix(), text


def main() -> None:
    """Write both files, each under a temporary name first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument(
        "--limit", type=int, help="characters of train.jsonl at most, files chosen by hash; default all"
    )
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "valid": []}
    characters = dict.fromkeys(lines, 0)
    found: Iterable[tuple[str, str]] = documents(Path(sysconfig.get_paths()["stdlib"]))
    if arguments.limit is not None:
        # Another order than the alphabet's, so that a small corpus has a bit of everything.
        found = sorted(found, key=lambda one: hashlib.sha256(one[0].encode()).digest())
    for name, text in found:
        held_out = not name.startswith("reference/") and is_held_out(module_of(Path(name)))
        split = "valid" if held_out else "train"
        # The validation files get a fifth of the room.
        if arguments.limit is not None and characters[split] + len(text) > arguments.limit // (
            1 if split == "train" else 5
        ):
            continue
        lines[split].append(json.dumps({"text": text, "path": name}, ensure_ascii=False))
        characters[split] += len(text)
    for split, rows in lines.items():
        temporary = output / f".{split}.jsonl"
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
        os.replace(temporary, output / f"{split}.jsonl")
        print(f"{split}: {len(rows)} documents, {characters[split] / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
