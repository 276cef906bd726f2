"""Converting a model, one move at a time, and what is said about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlxlm.checkpoint.files import write_bytes_atomic
from mlxlm.checkpoint.shards import inside
from mlxlm.conversion.card import model_card
from mlxlm.conversion.mapping import Move
from mlxlm.conversion.parts import Parts, check_free
from mlxlm.conversion.quantizing import Quantize
from mlxlm.conversion.targets import GgufTarget, HubTarget, Job, MlxTarget
from mlxlm.errors import TokenizerError, UsageError
from mlxlm.models import OpenedModel, open_model
from mlxlm.models.weights import hub_name
from mlxlm.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_gguf

Target = HubTarget | MlxTarget | GgufTarget
# Called with bytes done, bytes in all, and the tensor at work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class TensorMove:
    """One line of a dry run: a tensor of the target, or one that is left out.

    sources: names on disk.  name, shape, dtype, nbytes: in the target; name None for what is left out.
    """

    sources: tuple[str, ...]
    name: str | None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done.

    output: file or folder.  source_bytes, bytes: of the weights before and after.  parameters: numbers that they stand
    for.  errors: relative error of each module that was quantized, by its path on disk.
    """

    output: Path
    source_bytes: int
    nbytes: int
    parameters: int
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the result for each number of the model."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The modules with the largest relative errors."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:count]


def dry_run(source: str | Path, target: Target, output: str | Path = "model.gguf") -> Iterator[TensorMove]:
    """What `convert` would do with every tensor; reads headers only. Raises as `convert` does."""
    opened = open_model(Path(source))
    job = target.job(opened, read_tokenizer(opened), Path(output))
    moves = job.translator.moves()
    sizes = {name: size for layout in job.files(moves).values() for name, (_, size) in layout.positions.items()}
    for move in moves:
        if not move.targets:
            yield TensorMove(sources=move.sources, name=None)
        for name, (dtype, shape) in move.targets.items():
            yield TensorMove(
                sources=move.sources, name=name, shape=shape, dtype=job.stored(name, dtype), nbytes=sizes[name]
            )
    for name, array in job.extra.items():
        dtype = job.stored(name, array.dtype)
        yield TensorMove(sources=(), name=name, shape=tuple(array.shape), dtype=dtype, nbytes=sizes[name])


def convert(
    source: str | Path,
    output: str | Path,
    target: Target,
    *,
    origin: str | None = None,
    notes: str = "",
    progress: Progress | None = None,
    judge: Callable[[Path], str] | None = None,
) -> Conversion:
    """Convert a local model; the result appears at `output` when it is whole.

    source: a directory (safetensors, PyTorch files; float, MLX-quantized, GPTQ, AWQ, floats of 8 bits) or a .gguf file.
    output: a folder, for `GgufTarget` a file; nothing may stand there.  origin: what the card calls the source, such as
    its hub id.  notes: Markdown for the card.  progress: see `Progress`.  judge: is shown the whole result before it
    has its name, may refuse it by an error of this package, and gives more Markdown for the card.

    Memory: the tensors of one move (a module, or what is stored together with it) and their results. An interrupted
    conversion goes on where it was when it is called again with the same arguments.
    Raises UsageError when there is something at `output`, CheckpointError when the disk is too small or a tensor can't
    be read or stored, WeightsError when tensors don't fit the model, and what opening a model raises.
    """
    output = Path(output)
    check_output(output, target)
    check_links(Path(source))
    opened = open_model(Path(source))
    tokenizer = read_tokenizer(opened)
    job = target.job(opened, tokenizer, output)
    moves = job.translator.moves()
    files = job.files(moves)
    file_of = {name: file for file, layout in files.items() for name in layout.positions}
    change = job.translator.change
    if isinstance(change, Quantize):
        change.measure = True
    parts = Parts(output, files, _identity(opened, target, files))
    done = 0
    with parts.opened():
        for number, move in enumerate(moves):
            nbytes = sum(files[file_of[name]].positions[name][1] for name in move.targets)
            if move.targets and number not in parts.notes:
                _say(progress, done, parts.size, next(iter(move.targets)))
                _write(job, parts, move, number, file_of)
            elif not move.targets:
                job.translator.read(move)  # copies of tied weights are compared with them
            done += nbytes
        for name, array in job.extra.items():
            parts.write(file_of[name], name, job.encode(name, array))
        _say(progress, parts.size, parts.size, "")
        parts.sync()
        result = _result(output, job, moves, parts)
        job.finish(parts.folder, moves)
        if judge is not None:
            is_file = isinstance(target, GgufTarget)
            notes += "\n\n" + judge(parts.folder / output.name if is_file else parts.folder)
        card = model_card(result, opened, target, tokenizer, origin=origin, notes=notes)
        if not isinstance(target, GgufTarget):
            write_bytes_atomic(parts.folder / "README.md", card.encode("utf-8"))
        parts.publish()
    if isinstance(target, GgufTarget):
        write_bytes_atomic(output.with_suffix(".md"), card.encode("utf-8"))
    return result


def check_output(output: Path, target: Target) -> None:
    """Raise UsageError when something stands at the output, or its name is that of another kind of result."""
    is_file = isinstance(target, GgufTarget)
    if is_file != (output.suffix.lower() == ".gguf"):
        raise UsageError(
            f"{output}: a GGUF file's name ends in .gguf"
            if is_file
            else f"{output}: the result is a folder, but the name is that of a GGUF file"
        )
    check_free(output)


def check_links(source: Path) -> None:
    """Raise CheckpointError when a file in a model's folder is a link that leaves it, other than in the hub's cache:
    its content would be carried along into the result.
    """
    if source.is_dir():
        for file in source.rglob("*"):
            if file.is_symlink():
                inside(source, str(file.relative_to(source)))


def read_tokenizer(opened: OpenedModel) -> Tokenizer | None:
    """The model's tokenizer, None when it has none. Raises TokenizerError for one that can't be read."""
    path = opened.source.path
    if path.is_file():
        has_one = "tokenizer.ggml.model" in opened.checkpoint.metadata
        return tokenizer_from_gguf(opened.checkpoint.metadata) if has_one else None
    try:
        return load_tokenizer(path)
    except TokenizerError:
        if any(path.glob("*token*")) or any(path.glob("vocab*")) or any(path.glob("*.model")):
            raise
        return None


def _write(job: Job, parts: Parts, move: Move, number: int, file_of: dict[str, str]) -> None:
    change = job.translator.change
    arrays = job.translator.read(move)
    for name in list(arrays):
        parts.write(file_of[name], name, job.encode(name, arrays.pop(name)))
    errors = {}
    if isinstance(change, Quantize):
        errors, change.errors = change.errors, {}
    parts.done(number, errors)
    mx.clear_cache()


def _result(output: Path, job: Job, moves: list[Move], parts: Parts) -> Conversion:
    errors: dict[str, float] = {}
    for note in parts.notes.values():
        errors |= note
    rules = job.translator.rules
    sizes = [size for layout in parts.files.values() for _, size in layout.positions.values()]
    return Conversion(
        output=output,
        source_bytes=job.translator.opened.checkpoint.nbytes,
        nbytes=sum(sizes),
        parameters=sum(move.parameters for move in moves),
        errors={hub_name(rules, f"{path}.weight").removesuffix(".weight"): error for path, error in errors.items()},
    )


def _identity(opened: OpenedModel, target: Target, files: dict[str, object]) -> str:
    """What is converted to what, so that only the same conversion is ever taken up again."""
    read = sorted({info.file for info in opened.checkpoint.tensors.values()})
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in read]
    layouts = {name: hashlib.sha256(layout.header).hexdigest() for name, layout in files.items()}
    return json.dumps({"source": stats, "target": repr(target), "files": layouts})


def _say(progress: Progress | None, done: int, total: int, name: str) -> None:
    if progress is not None:
        progress(done, total, name)
