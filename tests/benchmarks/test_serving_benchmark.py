"""The load test of the server, small: no wrong answer, nothing left over."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from character_tokenizer import write_character_tokenizer

import mlxlm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmarks import serving as benchmark

MODELS = Path(__file__).parent.parent / "fixtures" / "models"


def small(tmp_path):
    directory = tmp_path / "small"
    shutil.copytree(MODELS / "llama", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    write_character_tokenizer(directory)
    return mlxlm.load(directory)


SIZE = {"requests": 60, "at_once": 16, "tokens": 8, "prompts": 6, "rows": 4, "seed": 3}


def test_a_storm_of_requests_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "AGAIN", (0.02, 0.1))
    assert benchmark.run(*small(tmp_path), **SIZE) == []
    out = capsys.readouterr().out
    assert "60 requests, 16 at once" in out
    assert all(kind in out for kind in benchmark.KINDS)


def test_wrong_answers_are_noticed(tmp_path, monkeypatch):
    made = benchmark.expected

    def spoiled(*arguments):
        return [benchmark.Expected(one.prompt, one.text + "!", one.tokens) for one in made(*arguments)]

    monkeypatch.setattr(benchmark, "expected", spoiled)
    wrong = benchmark.run(*small(tmp_path), **{**SIZE, "requests": 8, "at_once": 4})
    assert any("gave" in line for line in wrong)
