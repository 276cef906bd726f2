"""Sample answers of a run: kept once a step, cut where the run goes on, never half written."""

from __future__ import annotations

import json
from types import SimpleNamespace

from mlxlm.training.finetune.answers import Samples


def test_a_run_that_goes_on_keeps_what_was_said_before_and_nothing_twice(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"step": step, "answers": {"what": str(step)}} for step in (2, 4, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "ans')
    said: list[str] = []
    samples = Samples(tmp_path, lambda: ["again"], ["what"], said.append)
    samples.on_start(SimpleNamespace(progress=SimpleNamespace(step=4)))
    samples.on_evaluation({"step": 4})
    samples.on_evaluation({"step": 6})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *rows[:2],
        {"step": 6, "answers": {"what": "again"}},
    ]
    assert said == ["  what -> again"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.jsonl"]
