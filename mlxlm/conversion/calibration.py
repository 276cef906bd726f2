"""Text that a model reads while it is measured: how surprised it is, and what reaches its modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlm.errors import DataError, UsageError
from mlxlm.kernels.cross_entropy import fused_linear_cross_entropy
from mlxlm.layers import Scope
from mlxlm.models import Transformer
from mlxlm.tokenizers import Tokenizer

_ROWS_AT_ONCE = 4


def default_text() -> str:
    """The Python language reference as the standard library carries it: 700 KB of English prose and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path | None) -> str:
    """A UTF-8 text file, None: `default_text`. Raises DataError when it can't be read."""
    if path is None:
        return default_text()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text ({error})") from None


@dataclass(frozen=True)
class Calibration:
    """Tokens (rows, length) for measuring a model, and others that were held out to judge it."""

    measured: mx.array
    held_out: mx.array


def calibration(tokenizer: Tokenizer, text: str, *, rows: int = 16, length: int = 256) -> Calibration:
    """Rows of tokens from all over a text; the last row of every three is held out, `rows` for each purpose.

    Raises DataError for a text that is too short for one row of each.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False)
    count = len(tokens) // length
    if count < 2:
        raise DataError(f"the calibration text has {len(tokens)} tokens; at least {2 * length} are needed")
    table = np.array(tokens[: count * length], np.int32).reshape(count, length)
    groups = np.arange(count) % 3 == 2
    if not groups.any():
        groups[-1] = True

    def spread(chosen: np.ndarray) -> mx.array:
        places = np.linspace(0, len(chosen) - 1, min(rows, len(chosen))).astype(int)
        return mx.array(chosen[places])

    return Calibration(spread(table[~groups]), spread(table[groups]))


def check_language_model(model: Transformer) -> None:
    """Raise UsageError unless the model predicts the next word: only such are measured here."""
    if model.config.decoder is None or model.config.has_memory or not model.config.predicts_words:
        raise UsageError("only models that predict the next word can be measured on text")


def losses(model: Transformer, tokens: mx.array) -> mx.array:
    """The mean negative log likelihood of rows (B, L), each token given those before it."""
    hidden = model.hidden(tokens[:, :-1])
    projection = model.head.projection(hidden, model.embeddings.token)
    if projection is None:
        return nn.losses.cross_entropy(model.logits(hidden), tokens[:, 1:], reduction="mean")
    return fused_linear_cross_entropy(
        projection.hidden,
        projection.weight,
        tokens[:, 1:],
        bias=projection.bias,
        logit_scale=projection.scale,
        softcap=projection.softcap,
    )


def perplexity(model: Transformer, tokens: mx.array) -> float:
    """exp of the mean negative log likelihood of all rows (B, L). Raises UsageError for other than language models."""
    check_language_model(model)
    total = 0.0
    for start in range(0, tokens.shape[0], _ROWS_AT_ONCE):
        rows = tokens[start : start + _ROWS_AT_ONCE]
        total += losses(model, rows).item() * rows.shape[0]
    return math.exp(min(total / tokens.shape[0], 700.0))


class _Stop(Exception):
    """Ends a forward pass when its first layer has been reached."""


class _First(nn.Module):
    """Stands in front of the layers and takes what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[mx.array, Scope]] = []

    def __call__(self, x: mx.array, scope: Scope, cache: Any = None, memory: Any = None) -> mx.array:
        self.given.append((x, scope))
        raise _Stop


def layer_inputs(model: Transformer, tokens: mx.array) -> list[tuple[mx.array, Scope]]:
    """What the first layer of a decoder gets for rows (B, L), a few rows at a time: hidden states and their scope.

    The other layers get the same scope, and as hidden states what the layer before gives.
    """
    layers, first = model.decoder.layers, _First()
    model.decoder.layers = [first]
    try:
        for start in range(0, tokens.shape[0], _ROWS_AT_ONCE):
            try:
                model.hidden(tokens[start : start + _ROWS_AT_ONCE])
            except _Stop:
                continue
    finally:
        model.decoder.layers = layers
    return first.given


class _Recorder(nn.Module):
    """A linear module that shows its input before it does its work."""

    def __init__(self, module: nn.Module, note: Callable[[mx.array], None]) -> None:
        super().__init__()
        self._module, self._note = module, note

    @property
    def weight(self) -> mx.array:
        return self._module.weight

    def __call__(self, x: mx.array) -> mx.array:
        self._note(x)
        return self._module(x)


@contextmanager
def recorded(layer: nn.Module, note: Callable[[str, mx.array], None]) -> Iterator[None]:
    """While the block lasts, `note` is called with the path in the layer and the input of each linear module."""
    linear = [(path, module) for path, module in layer.named_modules() if type(module) is nn.Linear]
    owners = {path: _owner(layer, path) for path, _ in linear}
    for path, module in linear:
        setattr(*owners[path], _Recorder(module, lambda x, path=path: note(path, x)))
    try:
        yield
    finally:
        for path, module in linear:
            setattr(*owners[path], module)


def _owner(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    *way, name = path.split(".")
    for step in way:
        layer = getattr(layer, step)
    return layer, name


def gram_matrices(
    layer: nn.Module, inputs: list[tuple[mx.array, Scope]]
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Of each linear module in a layer: the mean of x x^T over its inputs (in, in), and the mean of |x| (in,).

    inputs: as `layer_inputs` gives them. Modules with the same input have the same arrays.
    """
    squares: dict[str, mx.array] = {}
    sizes: dict[str, mx.array] = {}
    counts: dict[str, int] = {}

    def note(path: str, x: mx.array) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        squares[path] = squares.get(path, 0) + rows.T @ rows
        sizes[path] = sizes.get(path, 0) + mx.abs(rows).sum(axis=0)
        counts[path] = counts.get(path, 0) + rows.shape[0]

    with recorded(layer, note):
        for x, scope in inputs:
            mx.eval(layer(x, scope, None, None), squares, sizes)
    return (
        {path: square / counts[path] for path, square in squares.items()},
        {path: size / counts[path] for path, size in sizes.items()},
    )
