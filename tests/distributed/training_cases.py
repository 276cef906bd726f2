"""What ranks do in test_training_parity.py: ten AdamW steps under a mesh."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from small_models import batch_of, small_model

STEPS = 10


class Batches:
    """A source of drawn batches, as many rows each as asked for."""

    def __init__(self, model, rows=4, length=12):
        self.model, self.rows, self.length, self.index, self.epoch, self.num_tokens = model, rows, length, 0, 0, 0

    def next(self):
        self.index += 1
        return batch_of(self.model, self.rows, self.length, seed=self.index)

    def state(self):
        return {"index": self.index}

    def restore(self, state):
        self.index = state["index"]


def settings(**changes):
    from mlxlm.training import TrainSettings

    # Where a gradient is all but zero, Adam divides its rounding by itself; eps keeps that out of the comparison.
    given = {"learning_rate": 1e-3, "eps": 1e-6, "weight_decay": 0.1, "clip_norm": 0.5, "accumulation": 2}
    return TrainSettings(steps=STEPS, **{**given, "compile": False, **changes})


def trained(name, communicator=None, model=None, source=None, **changes):
    """Mean losses of ten steps, and the step with its state at the end."""
    from mlxlm.training.step import Step
    from mlxlm.training.tasks import WordLoss

    model = small_model(name) if model is None else model
    source = Batches(model) if source is None else source
    chosen = settings(**changes)
    step, losses = Step(model, WordLoss(), chosen, communicator), []
    for _ in range(STEPS):
        outcome = step([source.next() for _ in range(chosen.accumulation)], chosen.learning_rate)
        step.evaluate_state()
        losses.append((outcome.loss / outcome.count).item())
        assert outcome.valid.item()
    return np.array(losses), step


def alone(name, **changes):
    """Losses and final weights of one process."""
    losses, step = trained(name, **changes)
    return losses, {key: np.array(array) for key, array in tree_flatten(step.model.parameters())}


def references(folder, cases):
    """Files with what one process makes of the model of each case, for the ranks to compare with."""
    for name in dict.fromkeys(case.split(" ")[0] for case in cases):
        losses, weights = alone(name)
        np.savez(folder / f"{name}.reference.npz", losses=losses, **{f"weights/{key}": a for key, a in weights.items()})


PREPARE = {"under_meshes": references}


def reference(folder, name):
    """What `references` wrote about a model."""
    with np.load(folder / f"{name}.reference.npz") as file:
        arrays = dict(file)
    losses = arrays.pop("losses")
    return losses, {key.removeprefix("weights/"): mx.array(array) for key, array in arrays.items()}


def under_meshes(world, folder, *cases):
    """For each case "model mesh zero": how far losses and weights are from those of one process, and what is held."""
    from mlxlm.distributed import Joined, parse_mesh

    result = {}
    for case in cases:
        name, mesh, zero, *schedule = case.split(" ")
        losses, weights = reference(folder, name)
        model = small_model(name)
        options = dict(zip(["schedule"], schedule, strict=False))
        joined = Joined(world, parse_mesh(mesh, world.size), int(zero), **options)
        parallel = joined.share_model(model)
        source = joined.rows(Batches(model))
        got, step = trained(name, parallel, model, source)
        result[f"{case}/losses"] = np.abs(got - losses).max()
        result[f"{case}/moved"] = abs(losses[-1] - losses[0])
        kept = step.parameters
        result[f"{case}/weights"] = max(distance(parallel.pieces[key], kept[key], weights[key]) for key in kept)
        result[f"{case}/count"] = sum(array.size for array in kept.values())
        result[f"{case}/state"] = sum(array.size for array in step.optimizer.arrays().values())
        result[f"{case}/model"] = sum(array.size for _, array in tree_flatten(model.parameters()))
        result[f"{case}/whole"] = sum(array.size for array in weights.values())
        loss, count = step.evaluate(source.next())
        result[f"{case}/evaluated"] = loss / count
        step.close()
    return result


def distance(piece, own, whole):
    """Of a part from the same part of the whole array; rows of zeros that fill up a shard are passed over."""
    part = piece.cut(whole)
    if not part.size:
        return 0.0
    own = own[tuple(slice(0, n) for n in piece.size)]
    return float(mx.abs(part - own).max())
