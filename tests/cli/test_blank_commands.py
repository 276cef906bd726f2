"""`mlxlm fill-mask` with a model that fills blanks of any length, and what it refuses."""

from __future__ import annotations

import mlxlm
from mlxlm.generation import fill_blanks

TEXT = "ab [MASK] cd [sMASK]"


def test_blanks_are_printed_a_line_each_and_then_the_text(mlxlm_command, tiny_blank_directory):
    status, out, _ = mlxlm_command("fill-mask", "--model", tiny_blank_directory, TEXT, "--max-tokens", 5)
    filled = fill_blanks(*mlxlm.load(tiny_blank_directory), TEXT, max_tokens=5)
    assert (status, out) == (0, "\n".join([*filled.blanks, filled.text]) + "\n")


def test_options_of_the_other_kind_of_model_are_refused(mlxlm_command, tiny_blank_directory, tiny_bert_directory):
    status, _, err = mlxlm_command("fill-mask", "--model", tiny_blank_directory, TEXT, "--top-k", 3)
    assert (status, "--top-k is for models that fill in one word" in err) == (2, True)
    status, _, err = mlxlm_command("fill-mask", "--model", tiny_bert_directory, "the [MASK]", "--max-tokens", 3)
    assert (status, "--max-tokens is for models that fill blanks" in err) == (2, True)
