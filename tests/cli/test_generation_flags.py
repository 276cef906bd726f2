"""Flags about caches and guessing ahead: the same answers, and one clear line for what doesn't go."""

from __future__ import annotations

import pytest

import mlxlm
from mlxlm.generation import ContrastiveSearch, Guidance, Sampling, best_of

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
        (["--num-beams", 2, "--kv-bits", 8], "a beam search (--num-beams) goes without --logit-bias and --kv-bits"),
        (["--contrastive-alpha", 0.6, "--temp", 1], "contrastive search (--contrastive-alpha) goes without --temp"),
        (
            ["--contrastive-alpha", 0.6, "--num-beams", 2],
            "without --logit-bias and --contrastive-alpha",
        ),
        (["--contrastive-alpha", 0.6, "--top-k", 1], "valid are 2 to 256"),
        (["--contrastive-alpha", 6], "must be between 0 and 1"),
        (["--contrastive-alpha", 0.6, "--prompt-lookup", 2, "--best-of", 3], "goes without --contrastive-alpha"),
        (["--guidance-scale", 2], "--guidance-scale is an option of guidance: give --negative-prompt too"),
        (["--negative-prompt", "x"], "--negative-prompt is an option of guidance: give --guidance-scale too"),
        (["--negative-prompt", "", "--guidance-scale", 2], "--negative-prompt is empty"),
        (["--negative-prompt", "x", "--guidance-scale", "nan"], "--guidance-scale is nan"),
        (["--negative-prompt", "x", "--guidance-scale", 2, "--early-exit", 1], "guidance (--guidance-scale) goes"),
        (["--top-p", 0.9, "--min-p", 0.1], "--top-p and --min-p have no effect at temperature 0"),
        (["--top-k", 4, "--temp", 0], "--top-k has no effect at temperature 0, where the likeliest token is taken"),
        (
            ["--ignore-chat-template", "--chat-template-config", '{"a": 1}'],
            "--chat-template-config needs a chat template",
        ),
        (["--best-of", 3], "give --temp above 0"),
        (["--best-of", 0, "--temp", 1], "--best-of is 0"),
        (["--best-of", 2, "--temp", 1, "--num-return-sequences", 3], "--num-return-sequences is 3, but must be 1 to 2"),
        (["--best-of", 2, "--temp", 1, "--stop", "x"], "goes without --stop"),
        (["--prompt-cache-file", "{tmp}/none.safetensors"], "no such file"),
        (["--prompt-cache-file", "{tmp}/a.bin"], "is a .safetensors file"),
        (["--prompt-cache-file", "x.safetensors", "--kv-bits", 8], "goes without --kv-bits"),
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


CHAT = [{"role": "user", "content": "so so so"}]
BIAS = {2: -1000.0}


def test_contrastive_search_is_that_of_the_library(mlxlm_command, tiny_directory):
    model, tokenizer = mlxlm.load(tiny_directory)
    flags = ["--contrastive-alpha", 0.7, "--top-k", 6]
    search = ContrastiveSearch(alpha=0.7, top_k=6)
    wanted = mlxlm.generate(model, tokenizer, CHAT, max_tokens=24, logit_bias=BIAS, contrastive=search)
    assert answer(mlxlm_command, tiny_directory, "so so so", *flags) == wanted + "\n"
    assert answer(mlxlm_command, tiny_directory, "so so so", *flags, "--temp", 0, "--kv-bits", 8, "--kv-group-size", 32)


def test_guidance_leans_away_from_a_prompt_in_the_same_template(mlxlm_command, tiny_directory):
    model, tokenizer = mlxlm.load(tiny_directory)
    negative = tuple(tokenizer.encode_chat([{"role": "user", "content": "no"}], add_generation_prompt=True))
    guidance = Guidance(scale=1.8, negative=negative)
    wanted = mlxlm.generate(model, tokenizer, CHAT, max_tokens=24, logit_bias=BIAS, guidance=guidance)
    flags = ["--guidance-scale", 1.8, "--negative-prompt", "no"]
    assert answer(mlxlm_command, tiny_directory, "so so so", *flags) == wanted + "\n"
    assert answer(mlxlm_command, tiny_directory, "so so so") != wanted + "\n"


def test_the_best_answers_come_with_their_likelihoods(mlxlm_command, tiny_directory):
    model, tokenizer = mlxlm.load(tiny_directory)
    tokens = tokenizer.encode_chat(CHAT, add_generation_prompt=True)
    sampling = Sampling(temperature=1.4, seed=3, logit_bias=BIAS)
    options = {"max_tokens": 24, "sampling": sampling, "stop_tokens": tokenizer.stop_ids}
    (wanted,) = best_of(model, [tokens], samples=5, keep=2, **options)
    flags = ["--best-of", 5, "--temp", 1.4, "--seed", 3]
    lines = [f"{one.mean_log_probability:.4f}\t{tokenizer.decode(one.answer)}\n" for one in wanted]
    assert answer(mlxlm_command, tiny_directory, "so so so", *flags, "--num-return-sequences", 2) == "".join(lines)
    assert answer(mlxlm_command, tiny_directory, "so so so", *flags) == lines[0].split("\t", 1)[1]
