"""What a training step needs of other processes, and the case that there are none.

`mlxlm.distributed.Parallel` has the same face for the processes of a mesh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

Arrays = dict[str, mx.array]


class Communicator:
    """One process, which holds everything.

    lazy: whether a step with its communication can be compiled.  compiles: whether it is where nobody asks.
    recomputes: whether all layers must be computed again for gradients.  sharded: whether what is kept of trained
    weights differs from what the model computes with.
    alone: whether there is no other process, so that small weights may be kept joined and a step launched early.
    first: whether this process writes what is written once, and reports.  pipeline: the stages of the model, with
    `sums` and `loss`, where this process has only one of them.
    """

    lazy = True
    compiles = True
    recomputes = False
    sharded = False
    alone = True
    first = True
    pipeline: Any = None

    def check_optimizer(self, name: str) -> None:
        """Raise UsageError for an optimizer that can't work on what this process keeps."""

    def keep(self, trained: Arrays) -> Arrays:
        """What this process keeps and updates of the trained weights of its model."""
        return trained

    def weights(self, kept: Arrays) -> Arrays:
        """The weights that the model computes with, of what is kept."""
        return kept

    def collect(self, gradients: Arrays, kept: Arrays) -> Arrays:
        """What is kept from batch to batch of this process's gradients."""
        return gradients

    def reduce(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Loss, count of targets and gradients of all processes, from those of this one."""
        return sums

    def measure(self, loss: mx.array, count: mx.array) -> tuple[mx.array, mx.array]:
        """Sum of losses and number of targets of all processes, from those of this one."""
        return loss, count

    def squares(self, gradients: Arrays, square_sum: Callable[[list[mx.array]], mx.array]) -> mx.array:
        """The sum of squares of the whole gradient.  square_sum: of some arrays."""
        return square_sum(list(gradients.values()))

    def traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that may be compiled."""
        return function

    def total(self, tokens: int) -> int:
        """Tokens that all processes have read together."""
        return tokens

    def any_signal(self, number: int | None) -> int | None:
        """The number of a signal that any of the processes got, None when none did."""
        return number

    def waiting(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A stretch of work in which processes wait for each other."""
        return contextlib.nullcontext()

    def seed(self, seed: int) -> int:
        """The seed of what differs with the data."""
        return seed

    def random_states(self, state: list[int]) -> list[Any]:
        """What a checkpoint keeps of the random states of all processes."""
        return state

    def random_state(self, saved: Sequence[Any]) -> list[int]:
        """This process's, of what a checkpoint keeps."""
        return list(saved[0] if isinstance(saved[0], list) else saved)
