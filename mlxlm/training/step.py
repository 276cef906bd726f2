"""The training step: batches in, updated weights and a few numbers out, as one compiled function."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm import runtime
from mlxlm.errors import UsageError
from mlxlm.kernels.squares import square_sums
from mlxlm.models import Transformer
from mlxlm.training.communicator import Communicator
from mlxlm.training.optimizers import ELEMENTWISE, Optimizer
from mlxlm.training.packing import JOINED, Packing
from mlxlm.training.settings import TrainSettings
from mlxlm.training.tasks import Task, regularised

Arrays = dict[str, mx.array]

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Outcome:
    """What a step came to, as lazy scalars.

    loss: sum over the targets, float32.  count: of targets.  norm: of the whole gradient, before clipping.
    valid: whether the gradient was finite and there was a target; if not, nothing was updated.
    """

    loss: mx.array
    count: mx.array
    norm: mx.array
    valid: mx.array


class Step:
    """The state of training and the function that moves it on.

    What the model marks as trainable is trained, whatever the method that chose it. The trained weights live here
    under their names, in float32 with `master_weights`; the model gets them back, and in its loss a copy in the dtype
    to compute in. Frozen floating weights are converted to that dtype once; quantized ones stay as they are. Where the
    step is compiled small weights are kept joined, see `Packing`; `parameters`, `average` and `take` know none of it.

    Label smoothing and z-loss of the settings go into the task. Raises UsageError for a task that has none of them, or
    when nothing is trainable.
    """

    def __init__(
        self, model: Transformer, task: Task, settings: TrainSettings, communicator: Communicator | None = None
    ):
        task = regularised(task, label_smoothing=settings.label_smoothing, z_loss=settings.z_loss)
        self.model, self.task, self.settings = model, task, settings
        self.communicator = Communicator() if communicator is None else communicator
        self.communicator.check_optimizer(settings.optimizer)
        self._evaluated = task.for_evaluation()
        trained = dict(tree_flatten(model.trainable_parameters()))
        if not trained:
            raise UsageError("nothing to train: all parameters of this model are frozen")
        self.dtype = _DTYPES[settings.dtype] if settings.dtype else dtype_of(model)
        keep = mx.float32 if settings.master_weights else self.dtype
        trained = {name: array.astype(keep) for name, array in trained.items()}
        self._convert_frozen(trained)
        trained = self.communicator.keep(trained)
        # Elsewhere an update of each array by itself is as fast, and takes less memory.
        joins = self.compiled and settings.optimizer in ELEMENTWISE and self.communicator.alone
        self.packing = Packing(trained, JOINED if joins else 0)
        trained = self.packing.pack(trained)
        self.state: dict[str, Any] = {"parameters": trained}
        self.optimizer = Optimizer(settings, trained, self.packing)
        self.state["optimizer"] = self.optimizer.state
        if settings.ema_decay is not None:
            self.state["average"] = {name: array.astype(mx.float32) for name, array in trained.items()}
        mx.random.seed(self.communicator.seed(settings.seed))
        layers = max(len(stack.layers) for stack in (model.config.encoder, model.config.decoder) if stack is not None)
        # Set on this model alone, and taken back by `close`: no other model of the process is touched.
        every = settings.recompute_layers < 0 or self.communicator.recomputes
        model.recompute_layers(layers if every else settings.recompute_layers)
        self.shapes: set[tuple] = set()
        self._build()
        self.give_back()

    @property
    def compiled(self) -> bool:
        """Whether the step becomes one compiled function."""
        wanted = self.settings.compile
        usual = runtime.backend() != "cpu" and self.communicator.compiles
        return self.communicator.lazy and (usual if wanted is None else wanted)

    @property
    def parameters(self) -> Arrays:
        """The trained weights by name."""
        return self.packing.unpack(self.state["parameters"])

    @property
    def average(self) -> Arrays | None:
        """The moving average of the trained weights, where one is kept."""
        average = self.state.get("average")
        return None if average is None else self.packing.unpack(average)

    def take(self, parts: dict[str, Arrays]) -> None:
        """Take over "parameters", and where it is kept "average", each by name, in the dtypes of those here."""
        for part, arrays in parts.items():
            mine = self.state[part]
            mine.update({name: a.astype(mine[name].dtype) for name, a in self.packing.pack(arrays).items()})

    def __call__(self, batches: Sequence[dict[str, np.ndarray]], learning_rate: float) -> Outcome:
        """One update from all the batches together. Nothing is computed before the outcome is asked for."""
        self.optimizer.set_learning_rate(learning_rate)
        self.model.train()
        inputs = [self._arrays(batch, self.task) for batch in batches]
        try:
            if self.communicator.pipeline is not None:
                return Outcome(*self._update(self._piped(inputs)))
            if len(inputs) == 1:
                return Outcome(*self._whole(inputs[0]))
            sums = self._first(inputs[0])
            for batch in inputs[1:]:
                mx.eval(sums)  # one batch's activations at a time
                sums = self._next(sums, batch)
            return Outcome(*self._update(sums))
        finally:
            self._rest()

    def evaluate(self, batch: dict[str, np.ndarray]) -> tuple[float, int]:
        """Sum of losses and number of targets of a batch, with the averaged weights where they are kept."""
        self.model.eval()
        weights = self.state.get("average") or self.state["parameters"]
        try:
            loss, count = self._measure(weights, self._arrays(batch, self._evaluated))
            with self.communicator.waiting("an evaluation"):
                mx.eval(loss, count)
        finally:
            self._rest()
        return loss.item(), count.item()

    def give_back(self, averaged: bool = False) -> None:
        """Put the trained weights into the model, or their moving average, where one is kept."""
        weights = self.state["parameters"]
        if averaged and "average" in self.state:
            weights = {name: array.astype(weights[name].dtype) for name, array in self.state["average"].items()}
        weights = self.communicator.weights(self.packing.unpack(weights))
        self.model.update(tree_unflatten(list(weights.items())))

    @contextlib.contextmanager
    def held(self, averaged: bool = False) -> Iterator[None]:
        """`give_back` for a while, between steps."""
        self.give_back(averaged)
        try:
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        """Between steps the model holds what is kept of its weights. `Module.update` takes longer, in every step."""
        for name, array in self.parameters.items():
            *path, last = name.split(".")
            holder: Any = self.model
            for step in path:
                holder = holder[int(step)] if isinstance(holder, list) else holder[step]
            holder[last] = array

    def close(self) -> None:
        """Leave the model as a user wants it: trained (averaged) weights, evaluation mode, nothing recomputed."""
        self.give_back(averaged=True)
        self.model.recompute_layers(0)
        self.model.eval()

    def evaluate_state(self) -> None:
        """Compute all that is pending."""
        mx.eval(self.state, mx.random.state)

    def _build(self) -> None:
        captured = [self.state, mx.random.state]
        if self.settings.compile and not self.communicator.lazy:
            raise UsageError("compile needs communication that is part of MLX's graphs, which this mesh has not")

        def finish(function: Any, stateful: bool = True) -> Any:
            function = self.communicator.traced(function)
            if not self.compiled:
                return function
            return mx.compile(function, inputs=captured, outputs=captured) if stateful else mx.compile(function)

        self._whole = finish(lambda batch: self._apply(self._sums(batch)))
        self._first = finish(self._begin)
        self._next = finish(self._add)
        self._update = finish(self._apply)
        self._measure = finish(self._measured, stateful=False)

    def _arrays(self, batch: dict[str, np.ndarray], task: Task) -> Arrays:
        prepared = task.prepare(batch)
        self.shapes.add(tuple(sorted((name, array.shape) for name, array in prepared.items())))
        return {name: mx.array(array) for name, array in prepared.items()}

    def _loss_of(self, task: Task) -> Any:
        def loss(weights: Arrays, batch: Arrays) -> tuple[mx.array, mx.array]:
            self.model.update(tree_unflatten(list(self._computed(weights).items())))
            return task.loss(self.model, batch)

        return loss

    def _weights(self, kept: Arrays) -> Arrays:
        """By name, as the model computes with them, of what is kept."""
        return self.communicator.weights(self.packing.unpack(self._computed(kept)))

    def _computed(self, weights: Arrays) -> Arrays:
        """Weights in the dtype to compute in."""
        return {name: array.astype(self.dtype) for name, array in weights.items()}

    def _sums(self, batch: Arrays) -> dict[str, Any]:
        """Sum of losses, number of targets and gradient of the sum, in the dtype to compute in."""
        kept = self.state["parameters"]
        (loss, count), gradients = mx.value_and_grad(self._loss_of(self.task))(self._weights(kept), batch)
        gradients = self.packing.pack(self.communicator.collect(gradients, kept))
        return {"loss": loss, "count": count, "gradients": gradients}

    def _measured(self, kept: Arrays, batch: Arrays) -> tuple[mx.array, mx.array]:
        weights, loss = self._weights(kept), self._loss_of(self._evaluated)
        pipeline = self.communicator.pipeline
        sums = loss(weights, batch) if pipeline is None else pipeline.loss(loss, weights, batch)
        return self.communicator.measure(*sums)

    def _piped(self, batches: list[Arrays]) -> dict[str, Any]:
        """The sums of all batches, which go through the stages of a pipeline one behind the other."""
        kept = self.state["parameters"]
        weights = self._weights(kept)
        sums = self.communicator.pipeline.sums(self._loss_of(self.task), weights, batches)
        return sums | {"gradients": self.communicator.collect(sums["gradients"], kept)}

    def _begin(self, batch: Arrays) -> dict[str, Any]:
        """The sums of the first of several batches, of which the gradient is kept in the dtype of the weights."""
        sums = self._sums(batch)
        weights = self.state["parameters"]
        return sums | {"gradients": {n: array.astype(weights[n].dtype) for n, array in sums["gradients"].items()}}

    def _add(self, sums: dict[str, Any], batch: Arrays) -> dict[str, Any]:
        more = self._sums(batch)
        gradients = {name: array + more["gradients"][name] for name, array in sums["gradients"].items()}
        return {"loss": sums["loss"] + more["loss"], "count": sums["count"] + more["count"], "gradients": gradients}

    def _apply(self, sums: dict[str, Any]) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Divide by the number of all targets, clip, update; leave everything as it was when that isn't possible."""
        sums = self.communicator.reduce(sums)
        gradients, count = sums["gradients"], sums["count"]
        norm = mx.sqrt(self.communicator.squares(gradients, _square_sum)) / mx.maximum(count, 1)
        valid = mx.isfinite(norm) & (count > 0)
        scale = 1.0 / mx.maximum(count, 1)
        if self.settings.clip_norm is not None:
            scale = scale * mx.minimum(self.settings.clip_norm / (norm + 1e-6), 1.0)
        parameters = self.state["parameters"]
        updated = self.optimizer.apply(gradients, parameters, valid, scale)
        parameters.update(updated)
        decay = self.settings.ema_decay
        if decay is not None:
            average = self.state["average"]
            for name, array in updated.items():
                average[name] = mx.where(valid, decay * average[name] + (1.0 - decay) * array, average[name])
        return sums["loss"], count, norm, valid

    def _convert_frozen(self, trained: Arrays) -> None:
        frozen = []
        for name, array in tree_flatten(self.model.parameters()):
            quantized = name.rsplit(".", 1)[-1] in ("scales", "biases")
            if name in trained or quantized or not mx.issubdtype(array.dtype, mx.floating):
                continue
            if array.dtype != self.dtype:
                frozen.append((name, array.astype(self.dtype)))
        for name, array in frozen:
            mx.eval(array)
            self.model.update(tree_unflatten([(name, array)]))


def _square_sum(arrays: list[mx.array]) -> mx.array:
    """The sum of all squares, float32. Small arrays are joined first: one short operation for each instead of three,
    which decides the speed of a step with hundreds of adapters.
    """
    small: dict[mx.Dtype, list[mx.array]] = {}
    for array in arrays:
        if array.size <= JOINED:
            small.setdefault(array.dtype, []).append(array.reshape(-1))
    joined = [mx.concatenate(same).astype(mx.float32).square() for same in small.values()]
    large = [square_sums(array) for array in arrays if array.size > JOINED]
    return sum((array.sum() for array in [*joined, *([mx.concatenate(large)] if large else [])]), start=mx.zeros(()))


def dtype_of(model: Transformer) -> mx.Dtype:
    """The floating dtype of most of a model's values; scales of quantized weights stand for what they are."""
    sizes: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda dtype: sizes[dtype])
