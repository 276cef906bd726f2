"""`mlxlm tokenizer`: train tokenizers, and see what they do."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlm.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlxlm.tokenizers import Tokenizer

tokenizer = typer.Typer(
    name="tokenizer",
    help="Train a tokenizer, encode and decode text, measure a tokenizer on texts.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[str, typer.Option("--tokenizer", metavar="FOLDER", help="A folder with a tokenizer or checkpoint.")]
Data = Annotated[
    list[str],
    typer.Option("--data", metavar="SOURCE", help="A file, folder, pattern or hf:NAME; may be repeated."),
]
Field = Annotated[str, typer.Option("--field", help="The key of the text in JSON Lines.")]


@tokenizer.command()
def train(
    kind: Annotated[
        str, typer.Option("--kind", help="sentencepiece-bpe, sentencepiece-unigram, byte-level-bpe or wordpiece.")
    ],
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Ids in all, special tokens included.")],
    data: Data,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="Where the tokenizer is written.")],
    objective: Annotated[
        str,
        typer.Option(
            "--objective", help="Decides the special tokens: causal, masked, span-corruption, blank-infilling."
        ),
    ] = "causal",
    special_tokens: Annotated[
        list[str] | None, typer.Option("--special-tokens", help="A further special token; may be repeated.")
    ] = None,
    field: Field = "text",
    lower_case: Annotated[bool, typer.Option("--lower-case", help="Lower-case all text (wordpiece only).")] = False,
) -> None:
    """Train a tokenizer on texts. The same texts and settings give the same tokenizer."""
    from mlxlm.tokenizers.training import measure_tokenizer, train_tokenizer

    texts = _texts(data, field)
    made = train_tokenizer(
        texts,
        output,
        kind=kind,
        vocab_size=vocab_size,
        objective=objective,
        special=tuple(special_tokens or ()),
        lower_case=lower_case,
    )
    rates = measure_tokenizer(made, texts()).rates()
    print(
        f"{output}: {made.vocab_size} tokens, {rates['characters_per_token']:.2f} characters a token on these texts",
        file=sys.stderr,
    )
    if made.vocab_size < vocab_size:
        print(f"the texts are too few for {vocab_size} tokens", file=sys.stderr)


@tokenizer.command()
def encode(
    folder: Folder,
    text: Annotated[str | None, typer.Argument(help="The text; default standard input.")] = None,
    special: Annotated[
        bool, typer.Option("--special/--no-special", help="Set the tokenizer's special tokens around the text.")
    ] = True,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print each token beside its id.")] = False,
) -> None:
    """Print the ids of a text on one line."""
    made = _load(folder)
    ids = made.encode(sys.stdin.read() if text is None else text, add_special_tokens=special)
    if tokens:
        for id in ids:
            print(f"{id}\t{made.token(id)}")
    else:
        print(*ids)


@tokenizer.command()
def decode(
    folder: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids; default those on standard input.")] = None,
    special: Annotated[bool, typer.Option("--special/--no-special", help="Show special tokens.")] = False,
) -> None:
    """Print the text of ids."""
    made = _load(folder)
    words = " ".join(ids or [sys.stdin.read()]).replace(",", " ").split()
    wrong = next((word for word in words if not (word.isascii() and word.isdigit())), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is not an id; expected whole numbers from 0 to {made.vocab_size - 1}")
    print(made.decode(map(int, words), skip_special_tokens=not special))


@tokenizer.command()
def stats(
    folder: Folder,
    data: Data,
    field: Field = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a tokenizer on texts: characters and bytes a token, the unknown rate, vocabulary use."""
    from mlxlm.tokenizers.training import measure_tokenizer

    found = measure_tokenizer(_load(folder), _texts(data, field)())
    if not found.documents:
        raise DataError("the data has no documents to measure on")
    rows = {**asdict(found), **found.rates()}
    if as_json:
        print(json.dumps(rows))
        return
    for name, value in rows.items():
        print(
            f"{name.replace('_', ' '):22}{value:>14,}"
            if isinstance(value, int)
            else f"{name.replace('_', ' '):22}{value:>14.4f}"
        )


def _load(folder: str) -> Tokenizer:
    from mlxlm.tokenizers import load_tokenizer

    return load_tokenizer(folder)


def _texts(locations: list[str], field: str) -> Callable[[], Iterator[str]]:
    """A function that reads the documents of sources anew at each call; a missing one is told at once."""
    from mlxlm.data.sources import HUB_PREFIX, Source, find_files, read_documents

    sources = [Source(location=location, field=field) for location in locations]
    files = [[] if one.location.startswith(HUB_PREFIX) else find_files(one.location) for one in sources]

    def read() -> Iterator[str]:
        for source, paths in zip(sources, files, strict=True):
            yield from read_documents(source, paths)

    return read
