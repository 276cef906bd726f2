"""The same operations and parity over MPI, whose own subgroups are used, as over the ring."""

from __future__ import annotations

import functools
import shutil

import jobs
import pytest
import test_communication
import test_finetune_meshes
import test_tensor_parallel
import test_training_parity
from processes import start_under_mpi

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun on the path"),
]

TRAINED = [*jobs.TRAINED, "llama dp=2 1", "llama-tied pp=2 0 gpipe", "bert dp=2 3", "t5 tp=2 0", "t5 pp=2 0"]
FOUR = ["llama dp=2,tp=2 2", "qwen3 dp=2,tp=2 3", "llama pp=2,tp=2 0 gpipe", "bert pp=2,dp=2 0", "llama sp=2,tp=2 0"]
run = functools.partial(jobs.run, start=start_under_mpi, limit=240)


def test_two_ranks():
    chosen = {name: jobs.TWO[name] for name in ("collectives", "gradients", "shared", "stages", "tuned")}
    found = run(2, {**chosen, "trained": ("training_cases", "under_meshes", TRAINED)})
    test_communication.check(found["collectives"], ["all"])
    for name in jobs.SHARED:
        test_tensor_parallel.check(found["shared"], name)
    for case in TRAINED:
        test_training_parity.check(found["trained"], case)
    for case in jobs.TUNED:
        test_finetune_meshes.check(found["tuned"][0], case)


def test_four_ranks_in_groups():
    wanted = {"some": ("communication_cases", "collectives", ["pairs", "crossed"])}
    found = run(4, {**wanted, "trained": ("training_cases", "under_meshes", FOUR)})
    test_communication.check(found["some"], ["pairs", "crossed"])
    for case in FOUR:
        test_training_parity.check(found["trained"], case)
