"""Flags about caches and guessing ahead: the same answers, and one clear line for what doesn't go."""

from __future__ import annotations

import pytest

BASE = ["generate", "--max-tokens", 24, "--logit-bias", '{"2": -1000}']


def answer(command, directory, prompt, *arguments):
    status, out, err = command(*BASE, "--model", directory, "--prompt", prompt, *arguments)
    assert status == 0, err
    return out


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt-lookup", 3],
        ["--early-exit", 1, "--num-draft-tokens", 2],
        ["--draft-model", "{tiny}"],
        ["--max-kv-size", 60],
    ],
    ids=lambda flags: flags[0],
)
def test_the_answer_stays_the_same(mlxlm_command, tiny_directory, flags):
    wanted = answer(mlxlm_command, tiny_directory, "so so so")
    flags = [str(flag).replace("{tiny}", str(tiny_directory)) for flag in flags]
    assert answer(mlxlm_command, tiny_directory, "so so so", *flags) == wanted


def test_quantized_caches_answer_too(mlxlm_command, tiny_directory):
    assert answer(mlxlm_command, tiny_directory, "so", "--kv-bits", 8, "--kv-group-size", 32)


@pytest.mark.parametrize("flags", [[], ["--kv-bits", 8, "--kv-group-size", 32], ["--ignore-chat-template"]], ids=str)
def test_a_cached_prompt_is_continued(mlxlm_command, tiny_directory, tmp_path, flags):
    path = tmp_path / "story.safetensors"
    making = ["cache-prompt", "--model", tiny_directory, "--prompt", "Once upon a time", "--prompt-cache-file", path]
    status, out, err = mlxlm_command(*making, *flags)
    assert (status, out) == (0, "")
    assert "MB of cache" in err
    wanted = answer(mlxlm_command, tiny_directory, "Once upon a time there was", *flags)
    status, found, err = mlxlm_command(
        *BASE, "--model", tiny_directory, "--prompt", " there was", "--prompt-cache-file", path
    )
    assert (status, found) == (0, wanted)
    assert "cached)" in err


def test_chat_takes_the_same_flags(mlxlm_command, tiny_directory):
    arguments = ["chat", "--model", tiny_directory, "--max-tokens", 5]
    _, wanted, _ = mlxlm_command(*arguments, stdin="hi\nho\n")
    status, out, _ = mlxlm_command(*arguments, "--prompt-lookup", 2, "--max-kv-size", 60, stdin="hi\nho\n")
    assert status in (0, 2)
    status, out, _ = mlxlm_command(*arguments, "--prompt-lookup", 2, stdin="hi\nho\n")
    assert (status, out) == (0, wanted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-group-size", 32], "give --kv-bits too"),
        (["--kv-bits", 3], "can't have bits 3; valid: 4, 8"),
        (["--max-kv-size", 3], "has no room"),
        (["--num-draft-tokens", 3], "needs a way to guess ahead"),
        (["--prompt-lookup", 2, "--early-exit", 1], "--prompt-lookup and --early-exit are ways to guess ahead"),
        (["--prompt-lookup", 0], "prompt_lookup is 0"),
        (["--early-exit", 99], "valid are 1 to"),
        (["--prompt-lookup", 2, "--max-kv-size", 20], "without --max-kv-size"),
        (["--draft-model", "{seq2seq}"], "another tokenizer"),
        (["--num-beams", 2, "--kv-bits", 8], "beam search"),
        (["--prompt-cache-file", "{tmp}/none.safetensors"], "no such file"),
        (["--prompt-cache-file", "{tmp}/a.bin"], "is a .safetensors file"),
        (["--prompt-cache-file", "x.safetensors", "--kv-bits", 8], "says which cache"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[0],
)
def test_what_does_not_go_is_one_line(
    mlxlm_command, tiny_directory, tiny_seq2seq_directory, tmp_path, arguments, words
):
    places = {"{tmp}": tmp_path, "{seq2seq}": tiny_seq2seq_directory}
    for name, place in places.items():
        arguments = [str(argument).replace(name, str(place)) for argument in arguments]
    status, out, err = mlxlm_command(*BASE, "--model", tiny_directory, "--prompt", "x", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.strip().split("\n")[-1].startswith("error: ")
    assert "Traceback" not in err


def test_a_file_of_another_model_is_refused(mlxlm_command, tiny_directory, tmp_path):
    import shutil

    import mlx.core as mx

    path, other = tmp_path / "story.safetensors", tmp_path / "other"
    mlxlm_command("cache-prompt", "--model", tiny_directory, "--prompt", "Once", "--prompt-cache-file", path)
    shutil.copytree(tiny_directory, other)
    tensors, metadata = mx.load(str(other / "model.safetensors"), return_metadata=True)
    tensors = {name: array * 1.5 if "q_proj.weight" in name else array for name, array in tensors.items()}
    mx.save_safetensors(str(other / "model.safetensors"), tensors, metadata)
    arguments = ["generate", "--model", other, "--prompt", "x", "--prompt-cache-file", path]
    status, _, err = mlxlm_command(*arguments)
    assert status == 2
    assert "made with another model" in err
