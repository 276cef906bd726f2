"""The examples of other tasks: each file runs two steps on its own kind of rows, the drawn T5 is a sound checkpoint."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import mlxlm
from mlxlm.training.finetune import FinetuneSettings, finetune
from mlxlm.training.yaml_files import read_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "finetune_tasks"
TASKS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}

sys.path.insert(0, str(EXAMPLES / "synthetic_data"))
import generate  # noqa: E402


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Data of the dates task, and the model that is drawn for it."""
    spec = importlib.util.spec_from_file_location("draw_t5", FOLDER / "draw_t5.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("drawn")
    generate.write(generate.make_rows("dates", 3000), folder / "data")
    module.draw(folder / "data", folder / "model", width=16, layers=1)
    return folder


def test_there_is_a_file_for_each_task_of_labels_and_of_pairs():
    assert set(TASKS) == {"sentiment", "tagging", "dates"}


def test_the_tokenizer_of_the_drawn_model_gives_every_text_back(drawn):
    model, tokenizer = mlxlm.load(drawn / "model")
    assert model.config.embeddings.vocab_size == tokenizer.vocab_size
    for name in ("train", "test"):
        for line in (drawn / "data" / f"{name}.jsonl").read_text().splitlines():
            for text in json.loads(line).values():
                ids = tokenizer.encode(text)
                assert (tokenizer.decode(ids), ids[-1]) == (text, tokenizer.eos_id)
                assert tokenizer.unk_id not in ids


@pytest.mark.parametrize("task", TASKS)
def test_the_file_runs_two_steps(request, drawn, tmp_path, task):
    values = read_yaml(TASKS[task], "settings")
    values.pop("epochs")
    generate.write(generate.make_rows(task, 40), tmp_path / "data")
    model = drawn / "model" if task == "dates" else request.getfixturevalue("tiny_bert_directory")
    changed = {
        "model": str(model), "data": str(tmp_path / "data"), "adapter_path": str(tmp_path / "out"), "iters": 2,
        "batch_size": 4, "exact_match": 2, "sample_tokens": 4,
    }  # fmt: skip
    outcome = finetune(FinetuneSettings.from_json({**values, **changed}), say=lambda text: None)
    kind = {"sentiment": "sequence", "tagging": "tokens", "dates": "seq2seq"}[task]
    assert (outcome.kind, outcome.result.step) == (kind, 2)
    assert {"sequence": "accuracy", "tokens": "entity_f1", "seq2seq": "exact_match"}[kind] in outcome.test
