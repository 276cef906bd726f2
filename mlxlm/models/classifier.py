"""From a pretrained model to a classifier: the same body with a new head, to be fine-tuned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.errors import UnsupportedModelError, UsageError, WeightsError, listing, nearest
from mlxlm.models.family import Layout
from mlxlm.models.head_config import TASKS
from mlxlm.models.heads import SequenceHeadSpec, SpanHeadSpec, TokenHeadSpec
from mlxlm.models.source import Source
from mlxlm.models.transformer import Transformer
from mlxlm.models.weights import to_canonical, to_hub

_KINDS: dict[str, type[TokenHeadSpec]] = {"sequence": SequenceHeadSpec, "tokens": TokenHeadSpec, "span": SpanHeadSpec}


def with_classification_head(
    model: Transformer, kind: Literal["sequence", "tokens", "span"], labels: Sequence[str] = ()
) -> Transformer:
    """A model with the body of `model` and the classification head that its family has for `kind`.

    The body's arrays are the same ones. Of the head, what the checkpoint holds is kept (a pooler, say); the rest is
    drawn from MLX's global random state. The result is in evaluation mode and is saved under the family's own names.

    Quantized weights of the body stay so, the head is of floats.

    model: as loaded from a checkpoint.  kind: one label a sequence, one a token, or an answer's first
    and last token.  labels: their names; none for "span".

    Raises UnsupportedModelError where the family has no such head, UsageError for arguments that don't fit.
    """
    if kind not in _KINDS:
        raise UsageError(f"unknown kind of head {kind!r}{nearest(kind, _KINDS)}")
    if (kind == "span") == bool(labels) or len(set(labels)) < len(labels):
        raise UsageError(f"labels are {list(labels)}; expected different names, and none for spans")
    source: Source | None = getattr(model, "source", None)
    if source is None:
        raise UsageError("this model was not loaded from a checkpoint, so nothing says which head fits it")
    parameters = dict(tree_flatten(model.parameters()))
    quantized = {path: module for path, module in model.named_modules() if hasattr(module, "bits")}
    named = source.values.get("architectures") or source.family.unparse(model.config)["architectures"]
    family_name = re.sub(r"(LMHeadModel|Model|For[A-Z]\w*)\Z", "", str(named[0]))
    values = {**source.values, "architectures": [family_name + TASKS[_KINDS[kind]]]}
    if kind != "span":
        values["id2label"] = {str(number): label for number, label in enumerate(labels)}
        values["label2id"] = {label: number for number, label in enumerate(labels)}
    config = source.family.read_config(values)
    if not isinstance(config.head, _KINDS[kind]):
        raise UnsupportedModelError(f"models of family {source.family.name} have no head for kind {kind!r} here")
    layout: Layout = "mlx" if quantized else "hub"
    tensors = to_hub(source.family.rules(model.config, layout), parameters)
    found = to_canonical(source.family.rules(config, layout), tensors).tensors
    result = Transformer(config)
    forms = {
        path: {"bits": module.bits, "group_size": module.group_size, "mode": module.mode}
        for path, module in quantized.items()
        if not path.startswith("head.")
    }
    if forms:
        nn.quantize(result, class_predicate=lambda path, module: forms.get(path, False))
    expected = dict(tree_flatten(result.parameters()))
    kept = {name: array for name, array in found.items() if name in expected and expected[name].shape == array.shape}
    missing = [name for name in expected if name not in kept and not name.startswith("head.")]
    if missing:
        raise WeightsError(f"the model lacks what the classifier needs: {listing(missing)}")
    dtype = next(array.dtype for array in kept.values() if mx.issubdtype(array.dtype, mx.floating))
    drawn = {name: array.astype(dtype) for name, array in expected.items() if name not in kept}
    result.update(tree_unflatten(list({**kept, **drawn}.items())))
    result.eval()
    result.source, result._stored = replace(source, values=values, config=config), model._stored
    return result
