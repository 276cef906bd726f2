"""What ranks do in test_memory.py: training steps, and the bytes that MLX says are alive, at rest and at most."""

from __future__ import annotations

import gc

import mlx.core as mx
from small_models import batch_of
from training_cases import settings

from mlxlm.distributed import Joined, parse_mesh
from mlxlm.models import Transformer, family_of
from mlxlm.training.initialisation import initialise
from mlxlm.training.plan import PlanSettings
from mlxlm.training.plan_mesh import plan_here
from mlxlm.training.step import Step
from mlxlm.training.tasks import WordLoss

# Nearly all of it is in matrices of layers, which every mesh shares.
VALUES = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
          "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 64, "rms_norm_eps": 1e-5,
          "tie_word_embeddings": True}  # fmt: skip
ROWS, LENGTH = 4, 8


class Same:
    """A source of one batch."""

    epoch = num_tokens = 0

    def __init__(self, model):
        self.batch = batch_of(model, ROWS, LENGTH)

    def next(self):
        return self.batch


def measured(world, folder, *cases):
    """For each case "mesh zero": bytes of the model, of model and optimizer after steps, the peak, and the plan's."""
    limit = mx.set_memory_limit(1)  # each operation is then waited for, so that peaks are the same every time
    result = {}
    for case in cases:
        mesh, zero = case.split(" ")
        joined = Joined(world, parse_mesh(mesh, world.size), int(zero))
        result |= {f"{case}/{name}": size for name, size in of_steps(joined).items()}
    mx.set_memory_limit(limit)
    return result


def of_steps(joined):
    """See `measured`."""
    gc.collect()
    before = mx.get_active_memory()
    config = family_of(VALUES).read_config(VALUES)
    plan = plan_here(config, PlanSettings(batch_size=ROWS, length=LENGTH), joined, refuse=False)
    model = Transformer(config)
    initialise(model, 0)
    parallel = joined.share_model(model)
    mx.eval(model.parameters())
    gc.collect()
    weights = mx.get_active_memory() - before
    step = Step(model, WordLoss(), settings(accumulation=1), parallel)
    source = joined.rows(Same(model))
    for _ in range(2):
        mx.reset_peak_memory()
        outcome = step([source.next()], 1e-3)
        step.evaluate_state()
        mx.eval(outcome.loss)
    peak = mx.get_peak_memory() - before
    del outcome
    gc.collect()
    rest = mx.get_active_memory() - before
    step.close()
    with joined.world.waiting("the weights"):
        mx.eval(model.parameters())
    return {"weights": weights, "rest": rest, "peak": peak, "plan": plan.peak}


def refused(world, folder):
    """What each rank is told of a run that fits all but the second, and of one that would fit with other flags."""
    from mlxlm.training.plan import MemoryPlanError

    config, wanted = family_of(VALUES).read_config(VALUES), PlanSettings(batch_size=ROWS, length=LENGTH)
    joined = Joined(world, parse_mesh("dp=2", 2))
    need = plan_here(config, wanted, joined, refuse=False).peak
    said = []
    for limit in (need - (world.rank == 1), need // 10):
        try:
            plan_here(config, wanted, joined, refuse=True, limit=limit)
        except MemoryPlanError as error:
            said.append(str(error))
    return {"said": said, "fits": plan_here(config, wanted, joined, refuse=True, limit=need).peak == need}
