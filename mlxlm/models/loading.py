"""From a checkpoint on disk or on the hub to a model, and back.

A checkpoint is a Hugging Face directory (float or MLX-quantized) or a GGUF file. What is saved is a Hugging Face
directory: float weights as transformers writes them, quantized ones as mlx-lm does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm import runtime
from mlxlm.checkpoint import (
    Checkpoint,
    Quantization,
    QuantizationConfig,
    dequantize,
    open_checkpoint,
    open_gguf,
    quantized_modules,
    read_json,
    resolve_model,
    unpacked,
)
from mlxlm.errors import UsageError, nearest
from mlxlm.kernels.attention import selfcheck
from mlxlm.models.families import family_of, gguf_family
from mlxlm.models.family import Layout
from mlxlm.models.gguf_dialect import GgufTensors
from mlxlm.models.source import Source
from mlxlm.models.stored_weights import stored_weights
from mlxlm.models.transformer import Transformer
from mlxlm.models.weights import Rule, canonical_names, check, check_copies, to_canonical

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

# Numbers of llama.cpp's pooling types.
_GGUF_POOLINGS = {0: None, 1: "mean", 2: "cls", 3: "last", 4: "rank"}
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    quantized: bool | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    lazy: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """A model in evaluation mode and its tokenizer.

    path_or_hub_id: a checkpoint directory, a .gguf file, or a hub id such as "org/name" (downloaded once, then cached).
    dtype: to compute in, "float32", "float16" or "bfloat16"; default the checkpoint's, float32 on the CPU.
    quantized: keep quantized weights as they are; default True on GPUs, False (dequantize) on the CPU, where MLX's
    quantized products are slower than float32 ones.  revision: of a hub id.  offline: use only what is cached.
    lazy: leave the weights on disk: for a process that then keeps a part of the model and reads nothing else, see
    `StoredWeights.finish`, which must be called before the model is.

    Raises ModelNotFoundError, UnsupportedModelError, ConfigError, CheckpointError, WeightsError or TokenizerError.
    """
    from mlxlm.tokenizers import load_tokenizer, tokenizer_from_gguf

    path = find(path_or_hub_id, revision=revision, offline=offline)
    if path.suffix.lower() == ".gguf":
        checkpoint = open_gguf(path)
        opened = _open_gguf_model(checkpoint, path)
        return _model(opened, dtype, quantized, lazy), tokenizer_from_gguf(checkpoint.metadata)
    tokenizer = load_tokenizer(path)
    return load_model(path, dtype=dtype, quantized=quantized, lazy=lazy), tokenizer


def find(path_or_hub_id: str | Path, *, revision: str | None = None, offline: bool | None = None) -> Path:
    """The local directory or .gguf file of a model; a hub id is downloaded, its config.json first and checked first."""
    return resolve_model(
        path_or_hub_id,
        revision=revision,
        offline=offline,
        check_config=lambda values: (QuantizationConfig.parse(values), family_of(values).read_config(values)),
    )


def load_model(
    path: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    quantized: bool | None = None,
    lazy: bool = False,
) -> Transformer:
    """The model of a local directory or .gguf file, without a tokenizer. Arguments as for `load`."""
    return _model(open_model(path), dtype, quantized, lazy)


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model on disk of which only headers have been read.

    source: what it is.  checkpoint: its tensors.  rules: their names.  quantizations: of the quantized ones, by module
    path on disk.
    """

    source: Source
    checkpoint: Checkpoint
    rules: tuple[Rule, ...]
    quantizations: dict[str, Quantization]

    def canonical_quantizations(self) -> dict[str, Quantization]:
        """The same by module path inside the model."""
        inside: dict[str, Quantization] = {}
        for path, form in self.quantizations.items():
            names = canonical_names(self.rules, f"{path}.scales")
            inside |= dict.fromkeys((name.removesuffix(".scales") for name in names), form)
        return inside


def open_model(path: str | Path) -> OpenedModel:
    """What a local directory or .gguf file holds. Raises as `load` does."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return _open_gguf_model(open_gguf(path), path)
    values = read_json(path / "config.json")
    family = family_of(values)
    checkpoint = unpacked(open_checkpoint(path), values)
    layout: Layout = "mlx" if checkpoint.metadata.get("format") == "mlx" else "hub"
    config = family.read_config(values, frozenset(checkpoint.tensors))
    return OpenedModel(
        source=Source(family=family, path=path, values=values, config=config),
        checkpoint=checkpoint,
        rules=family.rules(config, layout),
        quantizations=quantized_modules(checkpoint, QuantizationConfig.parse(values)),
    )


def _open_gguf_model(checkpoint: Checkpoint, path: Path) -> OpenedModel:
    family = gguf_family(str(checkpoint.metadata.get("general.architecture", "")))
    assert family.gguf is not None

    def read(name: str) -> list[float]:
        return checkpoint.load([name])[name].astype(mx.float32).tolist()  # type: ignore[return-value]

    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    values = family.gguf.config(checkpoint.metadata, GgufTensors(shapes, read))
    config = family.read_config(values, family.gguf.weights)
    values = {**values, **_gguf_token_ids(checkpoint.metadata)}
    number = checkpoint.metadata.get(f"{family.gguf.architecture}.pooling_type", 0)
    pooling = _GGUF_POOLINGS.get(number, f"type {number}")
    return OpenedModel(
        source=Source(family=family, path=path, values=values, config=config, pooling=pooling),
        checkpoint=checkpoint,
        rules=family.gguf.rules(config),
        quantizations=quantized_modules(checkpoint, None),
    )


def _model(
    opened: OpenedModel, dtype: str | mx.Dtype | None, quantized: bool | None, lazy: bool = False
) -> Transformer:
    source = opened.source
    compute = _compute_dtype(dtype, source.values, opened.checkpoint)
    model = _assemble(opened, _load(opened.checkpoint, compute), dtype=compute, quantized=quantized, lazy=lazy)
    model.source = source
    return model


def _load(checkpoint: Checkpoint, dtype: mx.Dtype) -> dict[str, mx.array]:
    """All tensors. Types that come as float32 because MLX has none for them are rounded one by one, so that a large
    model of such never stands in memory at 4 bytes a value.
    """
    native = {"float32", "float16", "bfloat16"}
    plain = [name for name, info in checkpoint.tensors.items() if info.dtype in native or info.quantization is not None]
    tensors = checkpoint.load(plain)
    for name in checkpoint.tensors.keys() - set(plain):
        array = checkpoint.load([name])[name]
        if array.dtype == mx.float32:
            array = array.astype(dtype)
            mx.eval(array)
        tensors[name] = array
    return tensors


def _gguf_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
    return {
        hub: int(metadata[f"tokenizer.ggml.{gguf}"])
        for gguf, hub in names.items()
        if f"tokenizer.ggml.{gguf}" in metadata
    }


def parse_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """A floating dtype by name. Raises UsageError for any other."""
    if isinstance(dtype, mx.Dtype):
        dtype = str(dtype).removeprefix("mlx.core.")
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one to compute in{nearest(dtype, _DTYPES)}")
    return _DTYPES[dtype]


def _compute_dtype(dtype: str | mx.Dtype | None, values: dict[str, Any], checkpoint: Checkpoint) -> mx.Dtype:
    return parse_dtype(dtype) if dtype is not None else runtime.default_dtype(checkpoint_dtype(values, checkpoint))


def checkpoint_dtype(values: Mapping[str, Any], checkpoint: Checkpoint) -> mx.Dtype:
    """The floating dtype of a checkpoint: what its config.json says, else that of most of the bytes."""
    named = values.get("dtype") or values.get("torch_dtype")
    if named not in _DTYPES:
        # GGUF files and some old configs don't say; most of the bytes do. Quantized tensors have float16 scales.
        sizes: dict[str, int] = {}
        for info in checkpoint.tensors.values():
            kind = info.dtype if info.dtype in _DTYPES else "float16"
            sizes[kind] = sizes.get(kind, 0) + info.nbytes
        named = max(sizes, key=lambda kind: sizes[kind], default="float32")
    return _DTYPES[named]


def _assemble(
    opened: OpenedModel, tensors: dict[str, mx.array], *, dtype: mx.Dtype, quantized: bool | None, lazy: bool
) -> Transformer:
    """A model with these tensors, evaluated one by one so that little lives twice, or with `lazy` not at all.

    tensors: by their names on disk; taken out of the dict.
    """
    rules = opened.rules
    translation = to_canonical(rules, tensors)
    if opened.source.config.head is not None:
        check_copies(translation)
    translation.copies.clear()
    tensors.clear()  # nothing but the canonical arrays may hold on to what is read
    weights, modules = translation.tensors, {}
    for name in weights:
        if name.endswith(".scales"):
            on_disk = translation.origins[name].removesuffix(".scales")
            modules[name.removesuffix(".scales")] = opened.quantizations[on_disk]
    keep = runtime.backend() != "cpu" if quantized is None else quantized
    values: dict[str, Quantization] = {}
    if not keep:
        for path, quantization in modules.items():
            parts = (weights.pop(f"{path}.{kind}", None) for kind in ("weight", "scales", "biases"))
            weights[f"{path}.weight"] = dequantize(*parts, quantization, dtype, lazy=lazy)
        modules, values = {}, modules
    selfcheck.ensure_checked()
    model = Transformer(opened.source.config)
    if modules:
        arguments = {path: quantization.to_json() for path, quantization in modules.items()}
        nn.quantize(model, class_predicate=lambda path, module: arguments.get(path, False))
    check(rules, {name: array.shape for name, array in tree_flatten(model.parameters())}, translation)
    for name in list(weights):
        array = _in_dtype(weights.pop(name), dtype)
        if not lazy:
            mx.eval(array)
        weights[name] = array
    if lazy:
        model._stored = stored_weights(opened.checkpoint, rules, translation.origins, weights, values, dtype)
    model.update(tree_unflatten(list(weights.items())))
    model.eval()
    return model


def _in_dtype(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
