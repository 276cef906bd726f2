"""Initial weights of a model that is trained from scratch."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.models import Transformer

# The projections that end a branch and add to the residual stream.
_RESIDUAL = ("attention.output.weight", "cross_attention.output.weight", "feed_forward.down.weight")


def initialise(model: Transformer, seed: int, *, scale: float = 0.02, evaluate: bool = True) -> None:
    """Draw all weights anew: normal(0, scale) for matrices, divided by sqrt(2 * layers) for those that add to the
    residual stream (Radford et al. 2019, GPT-2, section 2.3); 0 for biases, identity for norms. A table of words whose
    head multiplies the logits by a factor, as T5's does, is divided by it: Adam would take a thousand steps to get
    there.

    layers: of the stack that a weight belongs to.  scale: default 0.02.  seed: with the name of a weight it decides its
    values, so a model with one layer more has the same first layers.  evaluate: default True; False leaves the weights
    lazy, for models of which only a part is kept.
    """
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith("RMSNorm")
    }
    layers = {name: len(getattr(model, name).layers) for name in ("encoder", "decoder") if hasattr(model, name)}
    drawn = []
    for name, array in tree_flatten(model.parameters()):
        if name.rpartition(".")[0] in norms:
            drawn.append((name, array))  # modules are built with the identity
        elif array.ndim < 2:
            drawn.append((name, mx.zeros_like(array)))
        else:
            deviation = scale
            if name.endswith(_RESIDUAL):
                deviation = scale / (2 * layers[name.partition(".")[0]]) ** 0.5
            elif name == "embeddings.token.weight":
                deviation = scale / _logit_scale(model)
            values = mx.random.normal(array.shape, scale=deviation, key=_key(seed, name), dtype=array.dtype)
            drawn.append((name, values))
    model.update(tree_unflatten(drawn))
    if evaluate:
        mx.eval(model.parameters())


def _logit_scale(model: Transformer) -> float:
    """What a head that shares the table of words multiplies its logits by; 1 for all other heads and models."""
    head = model.config.head
    return head.scale if model.config.predicts_words and head.tied else 1.0


def _key(seed: int, name: str) -> mx.array:
    """A random key of a weight: FNV-1a of its name, which unlike hash() is the same in every process."""
    number = 0xCBF29CE484222325
    for byte in f"{seed}/{name}".encode():
        number = (number ^ byte) * 0x100000001B3 % 2**64
    return mx.random.key(number)
