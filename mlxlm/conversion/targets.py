"""What a model can be converted to: which names, dtypes and files the result has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import mlx.core as mx

from mlxlm.checkpoint import Quantization, write_json_atomic
from mlxlm.checkpoint.gguf_tensors import NUMBERS, TYPES
from mlxlm.checkpoint.gguf_writer import encode, gguf_layout
from mlxlm.checkpoint.safetensors_writer import FileLayout, bytes_of, index_of, safetensors_layout
from mlxlm.conversion.mapping import Move, Translator
from mlxlm.conversion.quantizing import Packed, Quantize
from mlxlm.conversion.recipes import Recipe, quantizable
from mlxlm.errors import CheckpointError, UnsupportedModelError, UsageError, listing
from mlxlm.models import OpenedModel
from mlxlm.models.gguf_contents import gguf_contents
from mlxlm.models.loading import checkpoint_dtype, parse_dtype
from mlxlm.models.saving import config_values, copy_sidecars, quantization_entry
from mlxlm.models.weights import to_hub
from mlxlm.tokenizers import Tokenizer
from mlxlm.tokenizers.gguf_writing import gguf_vocabulary

GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
GGUF_TYPES: tuple[GgufType, ...] = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# general.file_type of llama.cpp.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}


class Job(Protocol):
    """One conversion of one model: everything about its result.

    extra: tensors of the target that no tensor of the source becomes.
    """

    translator: Translator
    extra: dict[str, mx.array]

    def files(self, moves: list[Move]) -> dict[str, FileLayout]:
        """The weight files by name."""
        ...

    def stored(self, name: str, dtype: mx.Dtype) -> str:
        """How a tensor of the target is stored, for people."""
        ...

    def encode(self, name: str, array: mx.array) -> bytes | memoryview:
        """A tensor's bytes."""
        ...

    def finish(self, folder: Path, moves: list[Move]) -> None:
        """Write everything but the weights and the card."""
        ...


@dataclass(frozen=True, kw_only=True)
class HubTarget:
    """A folder that transformers loads.

    dtype: of all floats, "float32", "float16" or "bfloat16"; default each tensor's own, and the one that config.json
    names for weights that were packed.  max_shard_bytes: of one file, default 5 GB.
    """

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9

    def job(self, opened: OpenedModel, tokenizer: Tokenizer | None, output: Path) -> FolderJob:
        """The conversion of one model."""
        return FolderJob(_translator(opened, self.dtype, lambda inside: inside), tokenizer, self.max_shard_bytes)


@dataclass(frozen=True, kw_only=True)
class MlxTarget:
    """A folder that mlx-lm loads, quantized.

    recipe: None keeps the packed modules of the source as they are.  dtype: of the floats, see `HubTarget`.
    prepared, floats: what a calibrated method made of the weights, see `Quantize`; method: names it and what it was
    calibrated on.  max_shard_bytes: of one file.
    """

    recipe: Recipe | None
    dtype: str | None = None
    prepared: Mapping[str, Packed] = field(default_factory=dict, repr=False)
    floats: Mapping[str, mx.array] = field(default_factory=dict, repr=False)
    method: str = "round"
    max_shard_bytes: int = 5 * 10**9

    def job(self, opened: OpenedModel, tokenizer: Tokenizer | None, output: Path) -> FolderJob:
        """The conversion of one model. Raises UsageError when nothing would be quantized."""
        rules = opened.source.family.rules(opened.source.config, "mlx")
        if self.recipe is None:
            forms = opened.canonical_quantizations()
            change: Quantize = Quantize({})
        else:
            forms = self.recipe.forms(quantizable(opened.source.config, rules))
            change = Quantize(forms, self.prepared, self.floats)
        if not forms:
            reason = "the source isn't quantized" if self.recipe is None else "no module's rows divide into such groups"
            raise UsageError(f"nothing would be quantized: {reason}; give other bits or group sizes, or a float target")
        translator = _translator(opened, self.dtype, change, rules=rules, keep=self.recipe is None)
        return FolderJob(translator, tokenizer, self.max_shard_bytes, forms)


def _translator(opened: OpenedModel, dtype: str | None, change: Any, **options: Any) -> Translator:
    loose = checkpoint_dtype(opened.source.values, opened.checkpoint)
    explicit = None if dtype is None else parse_dtype(dtype)
    if explicit is None and opened.source.path.suffix.lower() == ".gguf":
        explicit = loose  # such files have norms in float32 whatever the rest is
    rules = options.pop("rules", None) or opened.source.family.rules(opened.source.config, "hub")
    keep = options.pop("keep", False)
    return Translator(opened=opened, rules=rules, change=change, keep=keep, dtype=explicit, loose=loose)


class FolderJob:
    """A conversion to config.json and safetensors. forms: quantization of canonical modules, none for floats."""

    def __init__(
        self,
        translator: Translator,
        tokenizer: Tokenizer | None,
        max_shard_bytes: int,
        forms: Mapping[str, Quantization] | None = None,
    ) -> None:
        self.translator = translator
        self.tokenizer = tokenizer
        self.extra: dict[str, mx.array] = {}
        self.max_shard_bytes = max_shard_bytes
        self.forms = dict(forms or {})

    def files(self, moves: list[Move]) -> dict[str, FileLayout]:
        """One file, or shards; the tensors of a move stand in one."""
        shards: list[list[tuple[str, mx.Dtype, tuple[int, ...]]]] = [[]]
        size = 0
        for move in moves:
            entries = [(name, dtype, shape) for name, (dtype, shape) in move.targets.items()]
            nbytes = sum(mx.zeros(shape, dtype).nbytes for _, dtype, shape in entries)
            if shards[-1] and size + nbytes > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1] += entries
            size += nbytes
        metadata = {"format": "mlx" if self.forms else "pt"}
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        return {name: safetensors_layout(entries, metadata) for name, entries in zip(names, shards, strict=True)}

    def stored(self, name: str, dtype: mx.Dtype) -> str:
        """The dtype."""
        return str(dtype).removeprefix("mlx.core.")

    def encode(self, name: str, array: mx.array) -> memoryview:
        """The values as they are."""
        return bytes_of(array)

    def finish(self, folder: Path, moves: list[Move]) -> None:
        """Index, tokenizer, sidecars and config.json."""
        source = self.translator.opened.source
        files = self.files(moves)
        names = [name for move in moves for name in move.targets]
        if len(files) > 1:
            shards = {file: list(layout.positions) for file, layout in files.items()}
            size = sum(nbytes for layout in files.values() for _, nbytes in layout.positions.values())
            index = index_of(shards, size, self._parameters(moves))
            write_json_atomic(folder / "model.safetensors.index.json", index)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        copy_sidecars(source, folder)
        values = config_values(source.config, source.family, source, names, "mlx" if self.forms else "hub")
        values.pop("quantization", None), values.pop("quantization_config", None)
        if self.forms:
            entry = quantization_entry(self.translator.rules, self.forms)
            values["quantization"] = values["quantization_config"] = entry
        values["dtype" if "dtype" in values else "torch_dtype"] = self._dtype_name(moves)
        write_json_atomic(folder / "config.json", values)

    def _parameters(self, moves: list[Move]) -> int:
        return sum(move.parameters for move in moves)

    def _dtype_name(self, moves: list[Move]) -> str:
        sizes: dict[str, int] = {}
        for dtype, shape in (entry for move in moves for entry in move.targets.values()):
            if mx.issubdtype(dtype, mx.floating):
                name = str(dtype).removeprefix("mlx.core.")
                sizes[name] = sizes.get(name, 0) + mx.zeros(shape, dtype).nbytes
        return max(sizes, key=lambda name: sizes[name])


@dataclass(frozen=True, kw_only=True)
class GgufTarget:
    """One .gguf file for llama.cpp.

    kind: of the matrices, one of `GGUF_TYPES`; vectors are F32, and so are matrices' rows that don't divide into
    blocks, as F16.  embeddings: of the table of tokens and the head, default as the others.
    """

    kind: GgufType = "F16"
    embeddings: GgufType | None = None

    def __post_init__(self) -> None:
        for kind in (self.kind, self.embeddings):
            if kind is not None and kind not in GGUF_TYPES:
                raise UsageError(f"GGUF files are written in {listing(GGUF_TYPES)}, not in {kind!r}")

    def job(self, opened: OpenedModel, tokenizer: Tokenizer | None, output: Path) -> GgufJob:
        """The conversion of one model. Raises UsageError when its family has no known form in GGUF files."""
        source = opened.source
        if source.family.gguf is None:
            raise UnsupportedModelError(f"there is no GGUF architecture for models of {source.family.name}")
        translator = Translator(
            opened=opened,
            rules=source.family.gguf.rules(source.config),
            change=lambda inside: inside,
            keep=False,
            dtype=None,
            loose=mx.float32,  # packed weights are rounded once, when they are stored
        )
        return GgufJob(self, translator, tokenizer, output.name)


class GgufJob:
    """A conversion to one .gguf file of this name."""

    def __init__(self, target: GgufTarget, translator: Translator, tokenizer: Tokenizer | None, name: str) -> None:
        self.target = target
        self.translator = translator
        self.name = name
        source = translator.opened.source
        outlines = {inside: mx.zeros(shape) for inside, shape in translator.shapes().items()}
        contents = gguf_contents(source.family, source.config, outlines)
        shapes = {tensor: tuple(array.shape) for tensor, array in contents.tensors.items()}
        # What belongs to the configuration, such as factors of rotary frequencies, is no tensor of the source.
        written = to_hub(translator.rules, outlines)
        self.extra = {tensor: array for tensor, array in contents.tensors.items() if tensor not in written}
        self.kinds = {tensor: self._kind(tensor, shape) for tensor, shape in shapes.items()}
        self.shapes = shapes
        general = {
            "general.architecture": contents.metadata["general.architecture"],
            "general.type": "model",
            "general.name": source.path.stem,
            "general.file_type": _FILE_TYPES[target.kind],
            "general.quantization_version": 2,
        }
        vocabulary = {} if tokenizer is None else gguf_vocabulary(tokenizer, source.config.embeddings.vocab_size)
        self.metadata = general | contents.metadata | vocabulary

    def files(self, moves: list[Move]) -> dict[str, FileLayout]:
        """The one file."""
        return {self.name: gguf_layout(self.metadata, [(t, self.kinds[t], self.shapes[t]) for t in self.shapes])}

    def stored(self, name: str, dtype: mx.Dtype) -> str:
        """The type in the file."""
        return self.kinds[name]

    def encode(self, name: str, array: mx.array) -> memoryview:
        """Blocks or floats. Raises CheckpointError for values that the type can't hold."""
        try:
            return encode(array, self.kinds[name])
        except CheckpointError as error:
            raise CheckpointError(f"tensor {name!r} can't be stored as {self.kinds[name]}: {error}") from None

    def finish(self, folder: Path, moves: list[Move]) -> None:
        """Nothing more: all is in the file."""

    def _kind(self, name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or name in self.extra:
            return "F32"
        wide = name.startswith(("token_embd.", "output.")) and self.target.embeddings is not None
        kind = self.target.embeddings if wide else self.target.kind
        assert kind is not None
        return kind if shape[-1] % TYPES[NUMBERS[kind]][1] == 0 else "F16"
