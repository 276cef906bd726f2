"""What ranks do in test_plan_traffic.py: a step under each mesh, counting the bytes given to every `Comm`."""

from __future__ import annotations

import numpy as np
from small_models import small_model
from training_cases import Batches, settings

GROUPS = {"data", "tensor", "stages", "sequence"}


def counted(kind, sizes):
    """Changes a class of communicators so that each operation adds its payload to `sizes`, by group and operation."""
    payload = {
        "sum": lambda comm, x: x.nbytes,
        "stack": lambda comm, x: comm.size * x.nbytes,
        "reduce_scatter": lambda comm, x: x.nbytes,
        "send": lambda comm, x: x.nbytes,
    }

    def wrap(name, original):
        def run(comm, x, *arguments, **keywords):
            if comm.size > 1 and x.size > 1:  # scalars are numbers of targets and the like
                group = "stages" if comm.name.startswith("tied") else comm.name
                sizes[f"{group}/{name}"] = sizes.get(f"{group}/{name}", 0) + payload[name](comm, x)
            return original(comm, x, *arguments, **keywords)

        return run

    for name in payload:
        setattr(kind, name, wrap(name, getattr(kind, name)))


def bytes_of_a_step(world, folder, *cases):
    """For each case "model mesh zero batches": bytes by group and operation of one step of this rank."""
    from mlxlm.distributed import Comm, Joined, parse_mesh
    from mlxlm.training.step import Step
    from mlxlm.training.tasks import WordLoss

    sizes = {}
    counted(Comm, sizes)
    result = {}
    for case in cases:
        name, mesh, zero, batches = case.split(" ")
        model = small_model(name)
        joined = Joined(world, parse_mesh(mesh, world.size), int(zero))
        parallel = joined.share_model(model)
        step = Step(model, WordLoss(), settings(accumulation=int(batches)), parallel)
        source = joined.rows(Batches(model))
        given = [source.next() for _ in range(int(batches))]
        step.evaluate_state()
        sizes.clear()
        step(given, 1e-3)
        step.evaluate_state()
        result |= {f"{case}/{key}": np.array(size) for key, size in sizes.items()}
        sizes.clear()
        step.close()
    return result
