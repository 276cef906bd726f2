"""The tests here share code with each other and with those of training, and what two ranks do in one start of them."""

from __future__ import annotations

import fcntl
import pickle
import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "training"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def done_once(tmp_path_factory, name, function):
    """What a function gives; of all workers of pytest the first that asks calls it, and the others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-"):
        folder = folder.parent
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / f"{name}.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(function()))
        return pickle.loads(kept.read_bytes())


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """What each of `jobs.TWO` gave on two ranks, by its name: a list of dicts of arrays, one a rank.

    All of them are done in one start of the processes.
    """
    import jobs

    return done_once(tmp_path_factory, "two", lambda: jobs.run(2, jobs.TWO))


@pytest.fixture(scope="session")
def slow_ranks(tmp_path_factory):
    """A function: number of ranks -> what each of `jobs.SLOW` gave on so many, as `two_ranks`."""
    import jobs

    def of(count):
        return done_once(tmp_path_factory, f"slow-{count}", lambda: jobs.run(count, jobs.SLOW[count], limit=400))

    return of
