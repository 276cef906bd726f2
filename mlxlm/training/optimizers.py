"""Optimizers over named parameters: MLX's, with weight decay on matrices only and Muon where it belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx
import mlx.optimizers as mlx_optimizers

from mlxlm.errors import CheckpointError, listing
from mlxlm.training.adam import AdamW
from mlxlm.training.packing import Packing
from mlxlm.training.settings import TrainSettings

Arrays = dict[str, mx.array]

# Do to every element the same, whatever its place. In distributed.parallel too, which is imported only under a mesh.
ELEMENTWISE = ("adamw", "lion", "sgd")

# Matrices that are tables of words, positions or labels rather than maps between features.
_TABLE = re.compile(r"(^|\.)(embeddings|positions|head|pooler)\.")


class Optimizer:
    """One optimizer, or two that share the parameters, over a flat dict of parameters.

    parameters: what it will update, for the shapes and dtypes of its state.  packing: made these parameters of those
    whose names checkpoints have, None where they are the same.

    Weight decay is decoupled for every optimizer (Loshchilov and Hutter 2019, arXiv:1711.05101): a matrix is first
    multiplied by 1 - rate * weight_decay. Vectors (biases, norms' scales) never decay.
    """

    def __init__(self, settings: TrainSettings, parameters: Mapping[str, mx.array], packing: Packing | None = None):
        self._packing = Packing({}) if packing is None else packing
        self._decay = settings.weight_decay
        names: dict[str, list[str]] = {"muon": [], "rest": []}
        for name, array in parameters.items():
            matrix = settings.optimizer == "muon" and array.ndim == 2 and not _TABLE.search(name)
            names["muon" if matrix else "rest"].append(name)
        rest = "adamw" if settings.optimizer == "muon" else settings.optimizer
        groups = (("muon", names["muon"]), (rest, names["rest"]))
        self._groups = [(_make(kind, settings), members) for kind, members in groups if members]
        for optimizer, members in self._groups:
            optimizer.init({name: parameters[name] for name in members})

    @property
    def state(self) -> list[dict]:
        """The state of each group; the same objects always, which `mx.compile` captures."""
        return [optimizer.state for optimizer, _ in self._groups]

    def set_learning_rate(self, rate: float) -> None:
        """The learning rate of the next update."""
        for optimizer, _ in self._groups:
            optimizer.learning_rate = rate

    def apply(
        self, gradients: Mapping[str, mx.array], parameters: Mapping[str, mx.array], valid: mx.array,
        factor: mx.array | float = 1.0,
    ) -> Arrays:  # fmt: skip
        """The updated parameters. Where valid, a boolean scalar, is False, they and the state stay as they are.

        factor: of all gradients, a scalar.
        """
        updated: Arrays = {}
        for optimizer, members in self._groups:
            rate = optimizer.learning_rate
            if isinstance(optimizer, AdamW):
                decay = {name: self._decay for name in members if parameters[name].ndim >= 2}
                updated |= optimizer.update(
                    gradients, {name: parameters[name] for name in members}, decay, valid, factor
                )
                continue
            before = {name: self._decayed(parameters[name], rate) for name in members}
            old = _paths(optimizer.state)
            scaled = {
                name: (gradients[name].astype(mx.float32) * factor).astype(parameters[name].dtype) for name in members
            }
            after = optimizer.apply_gradients(scaled, before)
            for name in members:
                new = after[name].astype(parameters[name].dtype)
                updated[name] = mx.where(valid, new, parameters[name])
            for path, array in old:
                holder = _holder(optimizer.state, path)
                holder[path[-1]] = mx.where(valid, holder[path[-1]], array)
        return {name: updated[name] for name in parameters}

    def _decayed(self, parameter: mx.array, rate: mx.array) -> mx.array:
        if not self._decay or parameter.ndim < 2:
            return parameter
        return parameter * (1.0 - rate * self._decay).astype(parameter.dtype)

    def arrays(self) -> Arrays:
        """The whole state by name, for a checkpoint."""
        return {
            _name(number, (name, *kind)): part
            for number, (optimizer, _) in enumerate(self._groups)
            for (pack, *kind), array in _paths(optimizer.state)
            for name, part in self._packing.parts(pack, array).items()
        }

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `arrays` gave. Raises CheckpointError when it is the state of another optimizer."""
        mine = self.arrays()
        unlike = sorted(
            name for name in {*mine, *arrays} if name not in mine or name not in arrays
            or mine[name].shape != arrays[name].shape
        )  # fmt: skip
        if unlike:
            raise CheckpointError(
                f"the checkpoint's optimizer state is that of another optimizer or model: {listing(unlike, 5)}"
            )
        for number, (optimizer, _) in enumerate(self._groups):
            for path, _ in _paths(optimizer.state):
                pack, *kind = path
                parts = {name: arrays[_name(number, (name, *kind))] for name in self._packing.names(pack)}
                _holder(optimizer.state, path)[path[-1]] = self._packing.join(pack, parts)


def _make(kind: str, settings: TrainSettings) -> mlx_optimizers.Optimizer | AdamW:
    """Our AdamW, or MLX's optimizer without its own weight decay, which does not tell matrices from vectors."""
    rate = settings.learning_rate
    if kind == "adamw":
        return AdamW(rate, settings.betas or (0.9, 0.999), settings.eps)
    if kind == "lion":
        return mlx_optimizers.Lion(rate, betas=list(settings.betas or (0.9, 0.99)), weight_decay=0.0)
    if kind == "adafactor":
        return mlx_optimizers.Adafactor(rate, relative_step=False, scale_parameter=False)
    if kind == "muon":
        return mlx_optimizers.Muon(rate, momentum=settings.momentum, weight_decay=0.0)
    return mlx_optimizers.SGD(rate, momentum=settings.momentum)


def _paths(state: dict, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], mx.array]]:
    """Leaves of a nested dict with their keys; names of parameters hold dots, so paths are tuples."""
    found = []
    for key, value in state.items():
        path = (*prefix, key)
        found += _paths(value, path) if isinstance(value, dict) else [(path, value)]
    return found


def _holder(state: dict, path: tuple[str, ...]) -> dict:
    """The dict that holds the last key of a path."""
    for key in path[:-1]:
        state = state[key]
    return state


def _name(number: int, path: tuple[str, ...]) -> str:
    """The name in a checkpoint of an array in the state of a group."""
    return f"{number}/" + "/".join(path)
