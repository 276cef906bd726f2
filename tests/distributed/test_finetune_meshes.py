"""Fine-tuning under every mesh: adapters, measures and answers are those of one process."""

from __future__ import annotations

import jobs
import pytest

# Method, mesh, zero, rows.
TWO_MORE = [
    "lora dp=2 3 words", "lora sp=2 0 words", "full dp=2 2 words", "full tp=2 0 words", "full pp=2 0 words",
    "full sp=2 0 words", "dora tp=2 0 words", "ia3 tp=2 0 words", "ia3 dp=2 3 words", "prompt tp=2 0 words",
    "p-tuning dp=2 1 words", "prefix dp=2 3 words", "last-layers pp=2 0 words", "houlsby tp=2 0 words",
    "pfeiffer pp=2 0 words", "qlora tp=2 0 quantized", "qlora pp=2 0 quantized", "qlora dp=2 3 quantized",
    "lora pp=2 0 labels", "lora tp=2 0 labels", "full dp=2 3 labels", "bitfit tp=2 0 tags", "lora pp=2 0 tags",
    "lora tp=2 0 seq2seq", "lora pp=2 0 seq2seq", "lora sp=2 0 seq2seq", "full dp=2 3 seq2seq",
]  # fmt: skip
FOUR = ["lora dp=2,tp=2 2 words", "lora pp=2,dp=2 3 words", "full pp=2,tp=2 0 labels"]


def check(got, case):
    assert got[f"{case}/names"]
    assert got[f"{case}/weights"] < 1e-5
    assert got[f"{case}/measures"] < 1e-5
    assert got[f"{case}/answers"]
    assert got[f"{case}/moved"] > 1e-6


@pytest.mark.parametrize("case", jobs.TUNED)
def test_two_ranks_learn_what_one_process_does(two_ranks, case):
    check(two_ranks["tuned"][0], case)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "cases"), [(2, TWO_MORE), (4, FOUR)])
def test_other_methods_and_meshes_learn_what_one_process_does(count, cases):
    (got, *_) = jobs.run(count, {"tuned": ("finetune_cases", "runs", cases)}, limit=200)["tuned"]
    for case in cases:
        check(got, case)
