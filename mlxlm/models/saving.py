"""Writing a model as a Hugging Face checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlxlm.checkpoint import (
    Quantization,
    QuantizationConfig,
    save_safetensors,
    write_bytes_atomic,
    write_json_atomic,
)
from mlxlm.errors import UsageError
from mlxlm.layers import differences
from mlxlm.models.config import TransformerConfig
from mlxlm.models.families import family as family_by_name
from mlxlm.models.family import Family, Layout
from mlxlm.models.hub_config import notes
from mlxlm.models.source import Source
from mlxlm.models.transformer import Transformer
from mlxlm.models.weights import Rule, hub_name, to_hub

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

# Small files that say how a checkpoint is used; they go along with it.
_SIDECARS = (
    "generation_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


def save(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: str | Path,
    *,
    family: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json, safetensors and tokenizer files, each whole or not at all.

    Float weights get transformers' names and orientation, quantized ones mlx-lm's, so that each loads there.
    Saved over the directory that it was loaded from, a model keeps the tokenizer files there.
    family: the `model_type` to write, for a model that was not loaded from a checkpoint; its config.json then names the
    tokenizer's special tokens.  max_shard_bytes: of one safetensors file, default 5 GB.
    Raises UsageError when the family is not known or can't describe the model, or when the directory can't be made.
    """
    directory = Path(directory)
    source: Source | None = getattr(model, "source", None)
    if source is None and family is None:
        raise UsageError("this model was not loaded from a checkpoint: say what to write it as, e.g. family='gpt2'")
    home = family_by_name(family) if family is not None else source.family  # type: ignore[union-attr]
    modules = _quantized(model)
    layout: Layout = "mlx" if modules else "hub"
    rules = home.rules(model.config, layout)
    parameters = dict(tree_flatten(model.parameters()))
    tensors = to_hub(rules, parameters)
    values = config_values(model.config, home, source, tensors, layout)
    values.pop("quantization", None), values.pop("quantization_config", None)
    if modules:
        values["quantization"] = values["quantization_config"] = quantization_entry(rules, modules)
    values["dtype" if "dtype" in values else "torch_dtype"] = _dtype_name(parameters)
    if source is None and tokenizer is not None:
        values |= {name: id for name, id in _token_ids(tokenizer).items() if values.get(name) is None}
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{directory}: a model is saved in a directory, but a file is in its place") from None
    except OSError as error:
        raise UsageError(f"can't make the directory {directory}: {error.strerror or error}") from error
    onto_itself = source is not None and source.path.resolve() == directory.resolve()
    if tokenizer is not None and not onto_itself:
        tokenizer.save(directory)  # first: it may refuse, and then nothing has been replaced
    save_safetensors(
        directory, tensors, metadata={"format": "mlx" if modules else "pt"}, max_shard_bytes=max_shard_bytes
    )
    copy_sidecars(source, directory)
    write_json_atomic(directory / "config.json", values)


def config_values(
    config: TransformerConfig,
    family: Family,
    source: Source | None,
    weights: Iterable[str],
    layout: Layout = "hub",
) -> dict[str, Any]:
    """The source's own config.json while it still describes the model, else one written anew that keeps its notes.

    weights: names of the tensors on disk.  layout: "mlx" adds what mlx-lm asks for and the config lacks.
    Raises UsageError when a config.json of this family can't say what the model is.
    """
    if source is not None and source.family is family:
        if source.config == config and "architectures" in source.values:
            extra = family.mlx_keys if layout == "mlx" else ()
            written = family.unparse(config) if extra else {}
            return {**{name: written[name] for name in extra}, **source.values}
        values = {**notes(source.values), **family.unparse(config)}
    else:
        values = family.unparse(config)
    described = family.read_config(values, frozenset(weights))
    if described != config:
        unlike = ", ".join(differences(config, described))
        raise UsageError(f"a config.json of {family.name} can't describe this model: {unlike}")
    return values


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens that a config.json names, as far as the tokenizer has them."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
    return {name: id for name, id in ids.items() if id is not None}


def _quantized(model: Transformer) -> dict[str, Quantization]:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {
        path: Quantization(bits=module.bits, group_size=module.group_size, mode=module.mode)
        for path, module in model.named_modules()
        if isinstance(module, kinds)
    }


def quantization_entry(rules: tuple[Rule, ...], modules: dict[str, Quantization]) -> dict[str, Any]:
    """One default, and an override for every module (by its path on disk) that differs from it."""
    forms = list(modules.values())
    default = max(dict.fromkeys(forms), key=forms.count)
    overrides = {
        hub_name(rules, f"{path}.scales").removesuffix(".scales"): form
        for path, form in modules.items()
        if form != default
    }
    return QuantizationConfig(default, overrides).to_json()


def _dtype_name(parameters: dict[str, mx.array]) -> str:
    sizes: dict[str, int] = {}
    for array in parameters.values():
        if mx.issubdtype(array.dtype, mx.floating):
            name = str(array.dtype).removeprefix("mlx.core.")
            sizes[name] = sizes.get(name, 0) + array.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _write_pooling(directory: Path, pooling: str, dim: int) -> None:
    """What sentence-transformers reads of how a text becomes one vector."""
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
    (directory / "1_Pooling").mkdir(exist_ok=True)
    write_json_atomic(
        directory / "1_Pooling" / "config.json",
        {"word_embedding_dimension": dim, **{name: mode == pooling for name, mode in modes.items()}},
    )
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    write_bytes_atomic(directory / "modules.json", json.dumps(modules, indent=2).encode())


def copy_sidecars(source: Source | None, directory: Path) -> None:
    """Copy the small files that say how a checkpoint is used, where the source is a directory that has them; write
    those that say what a GGUF file says of pooling.
    """
    if source is not None and source.pooling is not None:
        _write_pooling(directory, source.pooling, source.config.dim)
    if source is None or source.path is None or not source.path.is_dir():
        return
    for name in _SIDECARS:
        origin, target = source.path / name, directory / name
        if origin.is_file() and origin.resolve() != target.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(target, origin.read_bytes())
