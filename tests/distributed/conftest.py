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


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """What each of `jobs.TWO` gave on two ranks, by its name: a list of dicts of arrays, one a rank.

    All of them are done in one start of the two processes, by the first worker of pytest that asks.
    """
    import jobs

    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-"):
        folder = folder.parent
    with open(folder / "two-ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / "two-ranks.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(jobs.run(2, jobs.TWO)))
        return pickle.loads(kept.read_bytes())
