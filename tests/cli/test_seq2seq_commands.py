"""`mlxlm generate` with encoder-decoder models and with beam search."""

from __future__ import annotations

import pytest

import mlxlm
from mlxlm.generation import Beams, beam_search

PROMPT = "translate: one, two"


def test_an_encoder_decoder_answers_a_prompt_with_its_task_prefix(mlxlm_command, tiny_seq2seq_directory):
    status, out, err = mlxlm_command(
        "generate", "--model", tiny_seq2seq_directory, "--prompt", PROMPT, "--max-tokens", 8
    )
    model, tokenizer = mlxlm.load(tiny_seq2seq_directory)
    assert (status, out) == (0, mlxlm.generate(model, tokenizer, PROMPT, max_tokens=8) + "\n")
    assert "tokens/s" in err


def test_one_answer_of_a_beam_search_is_printed_alone(mlxlm_command, tiny_seq2seq_directory):
    status, out, err = mlxlm_command(
        "generate", "--model", tiny_seq2seq_directory, "--prompt", PROMPT, "--max-tokens", 8, "--num-beams", 3
    )
    ((best,),) = beam_search(*mlxlm.load(tiny_seq2seq_directory), [PROMPT], beams=Beams(num_beams=3), max_tokens=8)
    assert (status, out) == (0, best.text + "\n")
    assert "3 beams" in err


def test_several_answers_come_with_their_scores(mlxlm_command, tiny_seq2seq_directory):
    flags = ["--num-beams", 4, "--num-return-sequences", 3, "--length-penalty", 0.5, "--early-stopping", "never"]
    status, out, _ = mlxlm_command(
        "generate", "--model", tiny_seq2seq_directory, "--prompt", PROMPT, "--max-tokens", 6, *flags
    )
    beams = Beams(num_beams=4, num_return=3, length_penalty=0.5, early_stopping="never")
    (found,) = beam_search(*mlxlm.load(tiny_seq2seq_directory), [PROMPT], beams=beams, max_tokens=6)
    assert (status, out) == (0, "".join(f"{one.score:.4f}\t{one.text}\n" for one in found))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length-penalty", "2"], "--length-penalty is an option of beam search"),
        (["--num-return-sequences", "2"], "--num-return-sequences is an option of beam search"),
        (["--num-beams", "2", "--num-return-sequences", "3"], "between 1 and the 2 beams"),
        (["--num-beams", "2", "--early-stopping", "maybe"], "true, false or never"),
        (["--num-beams", "2", "--temp", "0.5"], "goes without --temp"),
        (["--num-beams", "2", "--stop", "x"], "goes without --stop"),
        (["--best-of", "2", "--temp", "1"], "--best-of is for decoders"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_refused(mlxlm_command, tiny_seq2seq_directory, flags, message):
    status, out, err = mlxlm_command("generate", "--model", tiny_seq2seq_directory, "--prompt", PROMPT, *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
