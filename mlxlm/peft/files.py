"""Adapter folders on disk: which layout one has, and reading and writing all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from mlxlm.checkpoint import read_json, save_safetensors, write_json_atomic
from mlxlm.errors import CheckpointError, ModelNotFoundError, UsageError, WeightsError, nearest
from mlxlm.peft.adapters import Adapter, activate, add, content_of
from mlxlm.peft.bottleneck_format import read_bottleneck, write_bottleneck
from mlxlm.peft.hub_format import read_peft, write_peft
from mlxlm.peft.method import Content, Method
from mlxlm.peft.mlx_format import read_mlx, write_mlx
from mlxlm.peft.own_format import read_own, write_own
from mlxlm.peft.task_heads import with_task_head, write_labels

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

LayoutName = Literal["peft", "mlx", "adapters", "mlxlm"]
_Read = Callable[[Any, Mapping[str, Any], Mapping[str, mx.array]], tuple[Method, Content]]
_Write = Callable[[Any, Adapter], tuple[dict[str, Any], dict[str, mx.array]]]

# By layout: the file of the tensors without its ending, reader, writer.
LAYOUTS: dict[str, tuple[str, _Read, _Write]] = {
    "peft": ("adapter_model", read_peft, write_peft),
    "mlx": ("adapters", read_mlx, write_mlx),
    "adapters": ("adapter", read_bottleneck, write_bottleneck),
    "mlxlm": ("adapter", read_own, write_own),
}
_BASES = ("base_model_name_or_path", "model", "model_name")  # where PEFT, mlx-lm and adapters name the model
_PICKLES = ("adapter_model.bin", "pytorch_adapter.bin", "adapters.npz")


def load_adapter(
    model: Transformer,
    folder: str | Path,
    *,
    name: str = "default",
    active: bool = True,
    trainable: bool = False,
) -> Transformer:
    """Put the adapter of a folder into a model, in place; the model itself.

    folder: of Hugging Face PEFT, of mlx-lm or, for bottleneck adapters, of the adapters library.  name: of the adapter
    in the model.  active: make it the active one, default True.  trainable: to train it on, default False.
    Raises ModelNotFoundError for a folder that holds no adapter, CheckpointError for unreadable files, ConfigError for
    settings that aren't implemented, WeightsError for tensors that don't fit.
    """
    folder = Path(folder)
    config = folder / "adapter_config.json"
    _check_folder(folder)
    values = read_json(config)
    stem, read, _ = LAYOUTS[_layout(values)]
    path = folder / f"{stem}.safetensors"
    if not path.is_file():
        pickles = [file for file in _PICKLES if (folder / file).is_file()]
        hint = f"; {pickles[0]} is not read, save it as safetensors" if pickles else ""
        raise CheckpointError(f"{folder} has no {path.name}{hint}")
    try:
        tensors = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    try:
        method, content = read(model, values, tensors)
    except KeyError as error:
        raise CheckpointError(f"{config} lacks {error}") from None
    except (UsageError, WeightsError) as error:
        base = next((values[key] for key in _BASES if values.get(key)), None)
        raise error if base is None else type(error)(f"{error}; {config.name} says it was {base}") from None
    add(model, name, method, content)
    if active:
        activate(model, name, trainable=trainable)
    return model


def load_with_adapter(
    path_or_hub_id: str | Path,
    *,
    adapter: str | Path | Mapping[str | Path, float] | None = None,
    **options: Any,
) -> tuple[Transformer, Tokenizer]:
    """A model in evaluation mode and its tokenizer, as `mlxlm.models.load` gives them.

    adapter: a folder as `load_adapter` takes it, or the weights of several by folder, which act together as `activate`
    says; default none. One of a classifier gives the model its head and labels.  options: dtype, quantized, revision,
    offline, lazy of `mlxlm.models.load`.
    """
    from mlxlm.models import load

    wanted = {} if adapter is None else adapter if isinstance(adapter, Mapping) else {adapter: 1.0}
    folders = [Path(folder) for folder in wanted]
    for folder in folders:
        _check_folder(folder)
    model, tokenizer = load(path_or_hub_id, **options)
    if not folders:
        return model, tokenizer
    for folder in folders:
        model = with_task_head(model, folder)
    names = _names(folders)
    for name, folder in zip(names, folders, strict=True):
        load_adapter(model, folder, name=name, active=False)
    activate(model, dict(zip(names, wanted.values(), strict=True)))
    return model, tokenizer


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each adapter: "default" for one alone, else that of its folder, with a number where that is taken."""
    if len(folders) == 1:
        return ["default"]
    names: list[str] = []
    for folder in folders:
        name = re.sub(r"[^\w-]", "-", folder.resolve().name) or "adapter"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    if not folder.is_dir():
        raise ModelNotFoundError(f"no such folder: {folder} (of an adapter)")
    whole = (folder / "config.json").is_file()
    hint = "; it holds a whole model, which needs no adapter: give it as the model" if whole else ""
    raise ModelNotFoundError(f"{folder} holds no adapter: there is no adapter_config.json{hint}")


def _layout(values: Mapping[str, Any]) -> str:
    if "peft_type" in values:
        return "peft"
    if values.get("format") == "mlxlm":
        return "mlxlm"
    return "adapters" if "config" in values else "mlx"


def save_adapter(
    model: Transformer, folder: str | Path, *, layout: LayoutName | None = None, name: str | None = None
) -> None:
    """Write an adapter, each file whole or not at all.

    layout: "peft", "mlx" (mlx-lm), "adapters" (the adapters library, for bottleneck adapters) or "mlxlm", our own,
    which has a form for everything; default the first that has one.  name: of the adapter, default the active one.
    Raises UsageError when the layout has no form for the method.
    """
    adapter = content_of(model, name)
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown adapter layout {layout!r}{nearest(layout, LAYOUTS)}")
    layout, values, tensors = _written(model, adapter, layout)
    stem = LAYOUTS[layout][0]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: mx.contiguous(array) for name, array in tensors.items()}
    mx.eval(tensors)
    save_safetensors(folder, tensors, metadata={"format": "mlx" if layout == "mlx" else "pt"}, stem=stem)
    write_labels(model, folder)
    write_json_atomic(folder / "adapter_config.json", values)


def check_layout(model: Transformer, layout: str | None = None) -> None:
    """Raise UsageError where `save_adapter` would, for the active adapter: before it is trained, not after."""
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"unknown adapter layout {layout!r}{nearest(layout, LAYOUTS)}")
    _written(model, content_of(model), layout)


def _written(model: Transformer, adapter: Adapter, layout: str | None) -> tuple[str, dict[str, Any], Any]:
    """Layout, config and tensors of an adapter, in the layout asked for or the first that has a form for it."""
    for one in LAYOUTS if layout is None else [layout]:
        try:
            return one, *LAYOUTS[one][2](model, adapter)
        except UsageError:
            if layout is not None:
                raise
    raise UsageError("no layout has a form for this adapter")
