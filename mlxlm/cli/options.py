"""Options that several verbs share, and what they have in common."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from mlxlm.errors import SamplingError, UsageError

if TYPE_CHECKING:
    from mlxlm.distributed import Joined
    from mlxlm.generation import Piece
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

Model = Annotated[
    str, typer.Option("--model", metavar="PATH_OR_ID", help="A checkpoint directory, a .gguf file or a hub id.")
]
AdapterPath = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter-path",
        metavar="FOLDER",
        help="An adapter to use (of PEFT, mlx-lm, adapters, mlxlm); several, as FOLDER=WEIGHT, are added up.",
    ),
]
AdapterOutput = Annotated[
    str | None, typer.Option("--adapter-path", metavar="FOLDER", help="Where the result goes, default adapters.")
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="YAML with the same names; flags win.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder, exactly.")]
ModelOrShipped = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="A checkpoint directory, a .gguf file or a hub id; default the small model of Python code that mlxlm has.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, float16 or bfloat16; default the checkpoint's, float32 on the CPU."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens of an answer.")]
MeshFlag = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXES", help="Under `launch`: dp=2,tp=2 (and pp, sp); default all data parallel."),
]
Zero = Annotated[int, typer.Option("--zero", help="What data-parallel processes share: 0 nothing to 3 everything.")]
Schedule = Annotated[str, typer.Option("--schedule", help="Of pipeline stages: 1f1b or gpipe.")]


def shipped_model() -> str:
    """The directory of the small model that comes with the package; its README.md says what it is."""
    return str(Path(__file__).parent.parent / "shipped" / "python-stdlib")


def read_text(given: str) -> str:
    """A text given to a flag; - stands for standard input."""
    if given != "-":
        return given
    return sys.stdin.read() if sys.stdin is not None else ""


@contextlib.contextmanager
def joined(
    mesh: str | None, zero: int = 0, schedule: str = "1f1b", axes: tuple[str, ...] = ("dp", "tp", "pp", "sp")
) -> Iterator[Joined]:
    """The processes that `mlxlm launch` has started with this one; only the first writes to stdout.

    axes: that the command can use, all processes along the first of them by default.
    """
    from mlxlm.distributed import join

    with join(mesh, zero=zero, schedule=schedule, axes=axes) as group:
        if group.first:
            yield group
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield group


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """A sign of life on a terminal while a model is loaded."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"loading {name}"):
        yield


def load(
    model: str,
    dtype: str | None,
    revision: str | None,
    adapters: Sequence[str] | None = None,
    quantized: bool | None = None,
    group: Joined | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer, with a sign of life.  adapters: folders to load on top, each with or without =WEIGHT.
    quantized: as for `mlxlm.load`.  group: processes that share the model; each reads its part.
    """
    from mlxlm.models import find

    weights = adapter_weights(adapters or ())

    if group is not None and not group.alone:
        with group.world.first_alone():
            path = find(model, revision=revision)
        from mlxlm.peft import load_with_adapter

        network, tokenizer = load_with_adapter(path, adapter=weights, dtype=dtype, quantized=quantized, lazy=True)
        group.serve(network)
        return network, tokenizer
    path = find(model, revision=revision)  # shows progress bars of its own
    with loading(model):
        if not weights:
            from mlxlm.models import load as load_checkpoint

            return load_checkpoint(path, dtype=dtype, quantized=quantized)
        from mlxlm.peft import load_with_adapter

        return load_with_adapter(path, adapter=weights, dtype=dtype, quantized=quantized)


def adapter_weights(adapters: Sequence[str]) -> dict[str, float]:
    """Weights by folder of adapters given as FOLDER or FOLDER=WEIGHT; 1 without. Raises UsageError for one twice."""
    weights: dict[str, float] = {}
    for given in adapters:
        folder, weight = given, 1.0
        if "=" in given and not Path(given).is_dir():
            folder, _, number = given.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                raise UsageError(f"--adapter-path is FOLDER or FOLDER=WEIGHT, and {number!r} is no number") from None
            if not math.isfinite(weight):
                raise UsageError(f"--adapter-path {given!r}: the weight must be a finite number")
        if folder in weights:
            raise UsageError(f"--adapter-path names {folder} twice; give it one weight")
        weights[folder] = weight
    return weights


def columns_of(given: Sequence[str]) -> dict[str, str]:
    """{"completion": "response"} from completion=response. Raises UsageError for anything else."""
    found = dict(text.split("=", 1) for text in given if "=" in text)
    if len(found) < len(given) or not all(name and column for name, column in found.items()):
        raise UsageError(f"--columns is NAME=COLUMN, each name once, not {' '.join(given)!r}")
    return found


def parse_logit_bias(text: str | None) -> dict[int, float]:
    """Token biases from JSON. Raises SamplingError for anything else."""
    if text is None:
        return {}
    try:
        return {int(token): float(bias) for token, bias in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise SamplingError(f'--logit-bias is JSON such as {{"42": -5.0}}, not {text!r}') from None


def parse_object(flag: str, text: str | None) -> dict[str, Any]:
    """A JSON object given to a flag. Raises UsageError for anything else."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f'{flag} is a JSON object such as {{"enable_thinking": false}}, not {text!r}')
    return value


def token_ids(tokenizer: Tokenizer, tokens: list[str] | None) -> list[int]:
    """Ids of tokens by name. Raises UsageError for one that the tokenizer doesn't have."""
    ids = []
    for token in tokens or ():
        number = tokenizer.token_id(token)
        if number is None:
            raise UsageError(f"--extra-eos-token {token!r} is no token of this model")
        ids.append(number)
    return ids


def report(piece: Piece | None, seconds_to_load: float) -> None:
    """Tokens, speed and memory of an answer, on stderr."""
    if piece is None:
        return
    from mlxlm.runtime import memory

    cached = f" ({piece.cached_tokens} cached)" if piece.cached_tokens else ""
    reason = {"stop": "stop token or string", "length": "length limit", None: "interrupted"}[piece.finish_reason]
    loaded = f"loaded in {seconds_to_load:.2f} s; " if seconds_to_load else ""
    print(
        f"{loaded}prompt: {piece.prompt_tokens} tokens{cached}, {piece.prompt_rate:.1f} tokens/s, first token after "
        f"{piece.prompt_seconds:.2f} s; answer: {piece.generated_tokens} tokens, {piece.decode_rate:.1f} tokens/s, "
        f"ended by {reason}; peak memory {memory().peak / 1e9:.2f} GB",
        file=sys.stderr,
    )


class Output:
    """Standard output, or a file that appears under its name only when it is whole."""

    def __init__(self, path: str | None):
        self.path = None if path is None or path == "-" else Path(path)
        # Devices, pipes and links are written to, never replaced.
        self.direct = (
            self.path is not None
            and (self.path.is_symlink() or self.path.exists())
            and not (self.path.is_file() and not self.path.is_symlink())
        )
        if path == "" or (self.path is not None and self.path.is_dir()):
            raise UsageError(f"{path!r} is no file that can be written")

    def __enter__(self) -> TextIO:
        if self.path is None:
            return sys.stdout
        self.temporary = self.path if self.direct else self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.file = open(self.temporary, "w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.path} can't be written: {error.strerror}") from None
        return self.file

    def __exit__(self, kind: object, *_: object) -> None:
        if self.path is None:
            return
        try:
            self.file.close()
        except OSError as error:
            if not self.direct:
                self.temporary.unlink(missing_ok=True)
            raise UsageError(f"{self.path} can't be written: {error.strerror}") from None
        if self.direct:
            return
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink()
