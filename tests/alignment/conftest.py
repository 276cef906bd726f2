"""What the tests of alignment share: a short run on a tiny model."""

from __future__ import annotations

import pytest
from alignment_runs import rows_for, settings_for, write

from mlxlm.alignment import align


@pytest.fixture
def run(tiny_directory, tmp_path):
    """A function: method and changed settings -> (outcome, the run's folder, what was said)."""

    def made(method, folder="out", rows=None, reporters=(), resume=False, model=None, **changes):
        data = tmp_path / "data"
        rows = rows or {"train": rows_for(method, 8), "valid": rows_for(method, 4, 1)}
        write(data, **rows)
        said = []
        settings = settings_for(method, model or tiny_directory, data, tmp_path / folder, **changes)
        outcome = align(settings, reporters, resume=resume, say=said.append)
        return outcome, tmp_path / folder, said

    return made
