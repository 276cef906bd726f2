"""What ranks do in test_tensor_parallel.py: a shared model beside the whole one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from small_models import batch_of, small_model

from mlxlm.distributed.tensor_parallel import share_tensors
from mlxlm.distributed.tensor_plan import TensorPlan
from mlxlm.models import Transformer


def losses_and_gradients(model, task, batch):
    """Sum of losses, and gradients by name, of what is trainable."""
    arrays = {name: mx.array(array) for name, array in task.prepare(batch).items()}

    def loss(parameters):
        model.update(tree_unflatten(list(parameters.items())))
        return task.loss(model, arrays)[0]

    trained = dict(tree_flatten(model.trainable_parameters()))
    value, gradients = mx.value_and_grad(loss)(trained)
    mx.eval(value, gradients)
    model.update(tree_unflatten(list(trained.items())))
    return value, gradients


def difference(one, other):
    return float(mx.abs(one - other).max()) if one.size else 0.0


def shared(world, folder, *names):
    """For each model: how far loss, gradients and logits are from those of the whole one, and what is held."""
    from mlxlm.training.tasks import WordLoss

    comm, result = world.everyone, {}
    for name in names:
        whole, model = small_model(name), small_model(name)
        if name == "quantized":
            from mlxlm.peft import Lora, apply

            for each in (whole, model):
                mx.random.seed(3)
                apply(each, Lora(targets=("all-linear",)))
                drawn = np.random.default_rng(1)
                lora = [
                    (key, mx.array(drawn.normal(0, 0.1, array.shape).astype(np.float32)))
                    for key, array in sorted(tree_flatten(each.trainable_parameters()))
                ]
                each.update(tree_unflatten(lora))
        pieces, plan = share_tensors(model, comm), TensorPlan(model.config, comm.size, comm.index)
        batch, task = batch_of(whole), WordLoss(label_smoothing=0.1, z_loss=1e-3, chunk=17)
        expected, expected_gradients = losses_and_gradients(whole, task, batch)
        value, gradients = losses_and_gradients(model, task, batch)
        gradients = {key: plan.add_up(key, pieces[key], array, comm) for key, array in gradients.items()}
        inputs = {key: mx.array(array) for key, array in batch.items() if key not in ("tokens", "targets")}
        tokens = mx.array(batch["tokens"])
        scale = max(float(mx.abs(array).max()) for array in expected_gradients.values())
        result[f"{name}/loss"] = abs(value.item() - expected.item()) / abs(expected.item())
        result[f"{name}/gradients"] = (
            max(difference(pieces[key].cut(array), gradients[key]) for key, array in expected_gradients.items()) / scale
        )
        result[f"{name}/logits"] = difference(whole(tokens, **inputs), model(tokens, **inputs))
        result[f"{name}/names"] = len(expected_gradients) == len(gradients)
        held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        result[f"{name}/held"] = held / sum(array.nbytes for _, array in tree_flatten(whole.parameters()))
        if whole.config.decoder is not None:
            result[f"{name}/tokens"] = decoded(whole)
            result[f"{name}/shared-tokens"] = decoded(model)
    return result


def decoded(model: Transformer, count=8):
    """Greedy tokens after a prompt."""
    from mlxlm.generation.steps import make_steps

    steps, found = make_steps(model), []
    logits = steps.start([[3, 9, 4, 1, 7]])
    for _ in range(count):
        found.append(int(mx.argmax(logits[0]).item()))
        logits = steps.step(mx.array([found[-1]]))
    return np.array(found)


def generating(world, folder, mesh, *names):
    """For each model: greedy tokens and a beam search of the whole model and of this rank's part of it."""
    from mlxlm.distributed import Parallel, parse_mesh

    result = {}
    for name in names:
        whole, model = small_model(name), small_model(name)
        Parallel(world, parse_mesh(mesh, world.size), model).serve()
        result[f"{name}/tokens"] = decoded(whole)
        result[f"{name}/shared-tokens"] = decoded(model)
    return result
