"""`mlxlm generate`: answer one prompt."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlm.cli import answers, forms, ways
from mlxlm.cli import options as opt
from mlxlm.cli.answer_flags import (
    CACHE_FLAGS,
    ENDING_FLAGS,
    FORM_FLAGS,
    GUESSING_FLAGS,
    LOADING_FLAGS,
    PROMPT_FLAGS,
    SAMPLING_FLAGS,
    SEARCH_FLAGS,
)
from mlxlm.cli.flags import given_of, with_flags
from mlxlm.errors import PromptError, UsageError

if TYPE_CHECKING:
    from mlxlm.cli.ways import Way
    from mlxlm.generation import Beams
    from mlxlm.layers import CacheSpec

_ASKED = (*PROMPT_FLAGS, *SAMPLING_FLAGS, *ENDING_FLAGS, *FORM_FLAGS)
_FOUND = (*SEARCH_FLAGS, *GUESSING_FLAGS, *CACHE_FLAGS, *LOADING_FLAGS)


@with_flags((*_ASKED, *_FOUND))
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; - reads it from standard input.")],
    model: opt.ModelOrShipped = None,
    max_tokens: opt.MaxTokens = 256,
    mesh: opt.MeshFlag = None,
    **flags: Any,
) -> None:
    """Answer a prompt.

    The prompt is a chat message where the model has a chat template, else plain text: to be continued by a decoder,
    to be answered by an encoder-decoder ("translate English to German: ...").
    """
    given = given_of(flags)
    way = ways.way(given)
    spec = answers.cache_spec(given)
    schema = forms.read_schema(given.get("json_schema"))
    opt.parse_object("--chat-template-config", given.get("chat_template_config"))
    with opt.joined(mesh, axes=("tp", "pp")) as group:
        if not group.alone:
            ways.check_shared(given)
            way = replace(way, sampling=answers.alike(way.sampling, group))
        text = group.world.share(opt.read_text(prompt) if group.first else prompt)
        if not text:
            raise PromptError("the prompt is empty; give one with --prompt")
        start = time.perf_counter()
        network, tokenizer = answers.load(model, given, group)
        loaded = time.perf_counter() - start if group.first else None
        options = answers.options(tokenizer, given, max_tokens, way.sampling)
        options["constraint"] = forms.constraint(tokenizer, schema, given.get("regex"))
        _answer(network, tokenizer, text, given, way, spec, options, loaded)


def _answer(
    network: Any,
    tokenizer: Any,
    text: str,
    given: dict[str, Any],
    way: Way,
    spec: CacheSpec | None,
    options: dict[str, Any],
    loaded: float | None,
) -> None:
    """The answer to a text, found in that way, on stdout."""
    if "prompt_cache_file" in given:
        tokens, options["cache"] = _continued(network, tokenizer, given["prompt_cache_file"], text)
    else:
        tokens = answers.prompt_tokens(tokenizer, text, given)
        options["cache"] = None if spec is None else network.make_cache(spec)
    if way.beams is not None:
        _print_beams(network, tokenizer, tokens, way.beams, options)
    elif way.best_of is not None:
        _print_best(network, tokenizer, tokens, way.best_of, way.count, options)
    else:
        if way.guidance_scale is not None:
            options["guidance"] = _guidance(tokenizer, way.guidance_scale, given)
        _print_answer(network, tokenizer, tokens, loaded, contrastive=way.contrastive, **options)


def _print_answer(network: Any, tokenizer: Any, tokens: Any, loaded: float | None, **options: Any) -> None:
    """The answer as it is made, then figures on stderr unless `loaded`, seconds, is None."""
    from mlxlm.generation import stream_generate

    piece = None
    try:
        for piece in stream_generate(network, tokenizer, tokens, **options):
            print(piece.text, end="", flush=True)
    finally:
        if piece is not None:
            print(flush=True)
        if loaded is not None:
            opt.report(piece, loaded)


def _continued(network: Any, tokenizer: Any, path: str, text: str) -> tuple[list[int], Any]:
    """The tokens of a cached text and what continues it, and the cache that holds the beginning of them."""
    from mlxlm.generation import load_prompt_cache

    held = load_prompt_cache(path, network, tokenizer)
    tokens = held.continued(tokenizer, text)
    return tokens, held.begins(tokens)


def _guidance(tokenizer: Any, scale: float, given: dict[str, Any]) -> Any:
    """Guidance away from the negative prompt, which is dressed up as the prompt is."""
    from mlxlm.generation import Guidance
    from mlxlm.generation.decoding import prompt_tokens

    negative = prompt_tokens(tokenizer, answers.prompt_tokens(tokenizer, given["negative_prompt"], given))
    return Guidance(scale=scale, negative=tuple(negative))


def _print_beams(network: Any, tokenizer: Any, tokens: str | list[int], beams: Beams, options: dict[str, Any]) -> None:
    """The answers of a beam search; with their scores when there are several."""
    from mlxlm.generation import beam_search

    start = time.perf_counter()
    limits = {name: options[name] for name in ("max_tokens", "stop_tokens")}
    (found,) = beam_search(network, tokenizer, [tokens], beams=beams, **limits)
    _print_scored([(one.score, one.text) for one in found])
    seconds = time.perf_counter() - start
    print(f"{beams.num_beams} beams, {len(found[0].tokens)} tokens in {seconds:.2f} s", file=sys.stderr)


def _print_best(
    network: Any, tokenizer: Any, tokens: str | list[int], samples: int, count: int, options: dict[str, Any]
) -> None:
    """The likeliest of several answers; with the mean log probabilities of their tokens when several are printed."""
    from mlxlm.generation import best_of
    from mlxlm.generation.decoding import prompt_tokens

    if network.config.has_memory:
        raise UsageError("--best-of is for decoders, and this model has an encoder too; --num-beams serves it")
    start = time.perf_counter()
    (found,) = best_of(
        network,
        [prompt_tokens(tokenizer, tokens)],
        samples=samples,
        keep=count,
        max_tokens=options["max_tokens"],
        stop_tokens={*tokenizer.stop_ids, *options["stop_tokens"]},
        sampling=options["sampling"],
        words=min(tokenizer.vocab_size, network.config.embeddings.vocab_size),
    )
    _print_scored([(one.mean_log_probability, tokenizer.decode(one.answer)) for one in found])
    seconds = time.perf_counter() - start
    print(f"the best of {samples} answers, {len(found[0].tokens)} tokens, in {seconds:.2f} s", file=sys.stderr)


def _print_scored(found: list[tuple[float, str]]) -> None:
    """One answer as it is, several with their scores."""
    for score, text in found:
        print(text if len(found) == 1 else f"{score:.4f}\t{text}")
