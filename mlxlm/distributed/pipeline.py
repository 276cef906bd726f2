"""Pipeline schedules: forward and backward passes of several batches through the stages of a model.

"gpipe" sends all batches forward, then all backward (Huang et al. 2019, arXiv:1811.06965). "1f1b" goes backward as soon
as it can, so that stage s of p keeps the inputs of at most p - s batches instead of all (Narayanan et al. 2019,
arXiv:1806.03377; 2021, arXiv:2104.04473, section 2.2). A stage keeps what it was handed, nothing else, and computes its
activations again when gradients come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlxlm.distributed.communicator import Comm
from mlxlm.distributed.stages import StageTransformer
from mlxlm.errors import UsageError, nearest

Arrays = dict[str, mx.array]
Loss = Callable[[Arrays, Arrays], tuple[mx.array, mx.array]]

SCHEDULES = ("1f1b", "gpipe")
# Arrays of a batch that are no keywords of the model.
_NOT_INPUTS = ("tokens", "targets", "labels", "next_sentence_labels", "places")


def order(schedule: str, stages: int, stage: int, batches: int) -> Iterator[tuple[str, int]]:
    """("forward" or "backward", batch) in the order of a stage.  Raises UsageError for an unknown schedule."""
    if schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule {schedule!r}{nearest(schedule, SCHEDULES)}")
    ahead = batches if schedule == "gpipe" else min(stages - stage, batches)
    done = 0
    for batch in range(batches):
        yield "forward", batch
        if batch + 1 >= ahead:
            yield "backward", done
            done += 1
    for batch in range(done, batches):
        yield "backward", batch


class Pipeline:
    """The stages of one replica of a model, this process's among them.

    model: a stage.  comm: of the stages, in order.
    Attribute in_flight: the most batches whose inputs were kept at once.
    """

    def __init__(self, model: StageTransformer, comm: Comm, schedule: str = "1f1b"):
        next(order(schedule, 1, 0, 1))
        self.model, self.comm, self.schedule, self.in_flight = model, comm, schedule, 0
        self.is_first, self.is_last = comm.index == 0, comm.index == comm.size - 1

    def sums(self, loss: Loss, weights: Arrays, batches: Sequence[Arrays]) -> dict[str, Any]:
        """Sum of losses and count of targets, 0 in all stages but the last, and gradients of this stage's weights."""
        handed: dict[int, tuple[Arrays, mx.array]] = {}
        total: dict[str, Any] = {"loss": mx.zeros(()), "count": mx.array(0), "gradients": {}}
        for what, number in order(self.schedule, self.comm.size, self.comm.index, len(batches)):
            if what == "forward":
                key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
                mx.eval(key)
                given = self._receive(number)
                handed[number] = given, key
                self.in_flight = max(self.in_flight, len(handed))
                if not self.is_last:
                    self._send(self._forward(weights, given, batches[number], key), number)
                continue
            given, key = handed.pop(number)
            own, back = self._backward(loss, weights, given, batches[number], key, number, total)
            held = total["gradients"]
            total["gradients"] = {name: held[name] + array if name in held else array for name, array in own.items()}
            mx.eval(total, back)
            for name, array in () if self.is_first else sorted(back.items()):
                self.comm.send(array, self.comm.index - 1, f"gradient of {name} of batch {number}")
        return total

    def loss(self, loss: Loss, weights: Arrays, batch: Arrays) -> tuple[mx.array, mx.array]:
        """Sum of losses and count of targets of a batch, 0 in all stages but the last."""
        given = self._receive(0)
        if self.is_last:
            self.model._given = given
            return loss(weights, batch)
        self._send(self._forward(weights, given, batch, None), 0)
        return mx.zeros(()), mx.array(0)

    def _forward(self, weights: Arrays, given: Arrays, batch: Arrays, key: mx.array | None) -> Arrays:
        """What this stage hands on."""
        model = self.model
        model.update(tree_unflatten(list(weights.items())))
        model._given = given
        inputs = {name: array for name, array in batch.items() if name not in _NOT_INPUTS}
        return _with_key(key, lambda: model.handed_on(model.hidden(batch["tokens"], **inputs)))

    def _backward(
        self,
        loss: Loss,
        weights: Arrays,
        given: Arrays,
        batch: Arrays,
        key: mx.array,
        number: int,
        total: dict[str, Any],
    ) -> tuple[Arrays, Arrays]:
        """Gradients of weights and of what was handed to this stage; the last stage adds to the total loss."""
        if self.is_last:

            def run(weights: Arrays, given: Arrays) -> tuple[mx.array, mx.array]:
                self.model._given = given
                return _with_key(key, lambda: loss(weights, batch))

            (value, count), (own, back) = mx.value_and_grad(run, argnums=(0, 1))(weights, given)
            total["loss"], total["count"] = total["loss"] + value, total["count"] + count
            return own, back
        names, places = list(weights), list(given)

        def stage(*arrays: mx.array) -> list[mx.array]:
            own = dict(zip(names, arrays[: len(names)], strict=True))
            handed = dict(zip(places, arrays[len(names) :], strict=True))
            found = self._forward(own, handed, batch, key)
            return [found[name] for name in sorted(found)]

        on = self._handed_names()
        cotangents = [self.comm.receive(self.comm.index + 1, f"gradient of {name} of batch {number}") for name in on]
        _, found = mx.vjp(stage, [*weights.values(), *given.values()], cotangents)
        gradients = dict(zip([*names, *places], found, strict=True))
        return {name: gradients[name] for name in names}, {name: gradients[name] for name in places}

    def _handed_names(self) -> list[str]:
        """The names of what this stage hands on, sorted."""
        return sorted(self.model.handed_on(mx.array(0.0)))

    def _incoming(self) -> list[str]:
        """The names of what the stage before hands on, sorted."""
        plan, before = self.model._stages, self.comm.index - 1
        if not self.model.config.has_memory:
            return ["x"]
        if plan.layers(before, "decoder"):
            return ["memory", "x"]
        return ["memory" if plan.ends(before, "encoder") else "x"]

    def _receive(self, number: int) -> Arrays:
        if self.is_first:
            return {}
        return {name: self.comm.receive(self.comm.index - 1, f"{name} of batch {number}") for name in self._incoming()}

    def _send(self, arrays: Arrays, number: int) -> None:
        mx.eval(arrays)
        for name, array in sorted(arrays.items()):
            self.comm.send(array, self.comm.index + 1, f"{name} of batch {number}")


def _with_key(key: mx.array | None, function: Callable[[], Any]) -> Any:
    """What a function gives when MLX's random state is this key; the state goes on as if nothing had been drawn."""
    if key is None:
        return function()
    state = mx.random.state[0]
    before, state[:] = mx.array(state), key
    try:
        return function()
    finally:
        state[:] = before
