"""AdamW as one operation a parameter: moments, decay, update and the switch that leaves all of it as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

Arrays = dict[str, mx.array]


class AdamW:
    """Adam with bias correction (Kingma and Ba 2014, arXiv:1412.6980) and decoupled weight decay (Loshchilov and Hutter
    2019, arXiv:1711.05101).

    learning_rate: of the first update.  betas: default (0.9, 0.999).  eps: added to the root, default 1e-8.

    `state` has the layout of `mlx.optimizers.Adam`: "step", "learning_rate", and "m" and "v" under each parameter's
    name. Computed in float32, kept in the dtype of the parameter.

    A step with hundreds of small parameters is as fast as its kernels are few, so an update compiles to one. That takes
    an update that must not happen to be one by nothing, which is exact; an update made of the moments as they are kept,
    rounded where they have 16 bits, since an array that is given out and used otherwise is written in between; and,
    since `mx.compile` follows at most 11 operations and takes an array up where the last of its uses is met, the longer
    way from the gradient, through the second moment, first.
    """

    def __init__(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = betas, eps
        self.state: dict[str, Any] = {
            "step": mx.array(0, mx.uint64), "learning_rate": mx.array(learning_rate, mx.float32)
        }  # fmt: skip

    @property
    def learning_rate(self) -> mx.array:
        """Of the next update."""
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, rate: float | mx.array) -> None:
        self.state["learning_rate"] = mx.array(rate, mx.float32)

    def init(self, parameters: Mapping[str, mx.array]) -> None:
        """Empty moments for these parameters."""
        for name, array in parameters.items():
            self.state[name] = {"m": mx.zeros_like(array), "v": mx.zeros_like(array)}

    def update(
        self, gradients: Mapping[str, mx.array], parameters: Mapping[str, mx.array], decay: Mapping[str, float],
        valid: mx.array, factor: mx.array | float = 1.0,
    ) -> Arrays:  # fmt: skip
        """The parameters after an update; the state moves on too. Where valid, a boolean scalar, is False, both stay.

        decay: weight decay by name, 0 where a name is missing.  factor: of all gradients, a scalar.
        """
        rate = self.learning_rate
        step = self.state["step"] + valid
        count = step.astype(mx.float32)
        (b1, b2), one = self.betas, mx.array(1.0)

        def when_valid(value: mx.array | float, otherwise: float) -> mx.array:
            return mx.where(valid, value, otherwise).astype(mx.float32)

        keep_m, take_m, keep_v, take_v = (
            when_valid(*pair) for pair in ((b1, 1.0), (1.0 - b1, 0.0), (b2, 1.0), (1.0 - b2, 0.0))
        )
        # rate * m' / (sqrt(v') + eps), m' = m / (1 - b1^t), v' = v / (1 - b2^t), with the corrections in two scalars
        root = mx.sqrt(one - mx.power(b2, count))
        size, floor = when_valid(rate * root / (one - mx.power(b1, count)), 0.0), when_valid(self.eps * root, 1.0)
        self.state["step"] = step
        updated: Arrays = {}
        for name, parameter in parameters.items():
            moments, kept = self.state[name], parameter.astype(mx.float32)
            # Not multiplied by 0: the gradient of an update that must not happen may be infinite.
            gradient = mx.where(valid, gradients[name].astype(mx.float32) * factor, 0.0)
            m = keep_m * moments["m"].astype(mx.float32) + take_m * gradient
            v = keep_v * moments["v"].astype(mx.float32) + take_v * gradient.square()
            moments["m"], moments["v"] = m.astype(moments["m"].dtype), v.astype(moments["v"].dtype)
            if decay.get(name):
                kept = kept * when_valid(1.0 - rate * decay[name], 1.0)
            m, v = moments["m"].astype(mx.float32), moments["v"].astype(mx.float32)
            new = kept - (one / (mx.sqrt(v) + floor)) * (size * m)
            updated[name] = new.astype(parameter.dtype)
        return updated
