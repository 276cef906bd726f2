"""`mlxlm generate`: answer one prompt."""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlm.cli import caching, forms
from mlxlm.cli import options as opt
from mlxlm.errors import PromptError, UsageError

if TYPE_CHECKING:
    from mlxlm.generation import Beams


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; - reads it from standard input.")],
    model: opt.ModelOrShipped = None,
    system_prompt: opt.SystemPrompt = None,
    max_tokens: opt.MaxTokens = 256,
    temp: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    top_k: opt.TopK = 0,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    logit_bias: opt.LogitBias = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    extra_eos_token: opt.StopToken = None,
    json_schema: forms.JsonSchema = None,
    regex: forms.Regex = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    chat_template_config: Annotated[
        str | None, typer.Option("--chat-template-config", metavar="JSON", help="Variables for the chat template.")
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option("--num-beams", help="Search the likeliest answer as a whole, with that many beams.")
    ] = None,
    num_return_sequences: Annotated[
        int, typer.Option("--num-return-sequences", help="Answers of a beam search to print: score, tab, text.")
    ] = 1,
    length_penalty: Annotated[
        float | None, typer.Option("--length-penalty", help="Of a beam search; more favours longer answers, default 1.")
    ] = None,
    early_stopping: Annotated[
        str | None, typer.Option("--early-stopping", help="Of a beam search: true, false or never; default false.")
    ] = None,
    draft_model: caching.DraftModel = None,
    num_draft_tokens: caching.NumDraftTokens = None,
    prompt_lookup: caching.PromptLookup = None,
    early_exit: caching.EarlyExit = None,
    kv_bits: caching.KvBits = None,
    kv_group_size: caching.KvGroupSize = None,
    max_kv_size: caching.MaxKvSize = None,
    prompt_cache_file: caching.PromptCacheFile = None,
    adapter_path: opt.AdapterPath = None,
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    mesh: opt.MeshFlag = None,
) -> None:
    """Answer a prompt.

    The prompt is a chat message where the model has a chat template, else plain text: to be continued by a decoder,
    to be answered by an encoder-decoder ("translate English to German: ...").
    """
    from mlxlm.generation import Sampling

    sampling = Sampling(
        temperature=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        logit_bias=opt.parse_logit_bias(logit_bias),
        seed=seed,
    )
    beams = _beams(num_beams, num_return_sequences, length_penalty, early_stopping)
    if beams is not None and (sampling != Sampling() or stop):
        raise UsageError("a beam search takes the likeliest answers: it goes with no sampling option and no --stop")
    spec = caching.cache_spec(kv_bits, kv_group_size, max_kv_size)
    guessing = any(flag is not None for flag in (draft_model, num_draft_tokens, prompt_lookup, early_exit))
    if beams is not None and (spec is not None or guessing or prompt_cache_file is not None):
        raise UsageError("a beam search goes with no option of caches or of guessing ahead")
    schema = forms.read_schema(json_schema, regex, clash=beams is not None or guessing)
    variables = opt.parse_object("--chat-template-config", chat_template_config)
    if prompt_cache_file is not None and (spec or system_prompt is not None or variables or ignore_chat_template):
        raise UsageError("--prompt-cache-file says which cache, system prompt and template it was made with")
    with opt.joined(mesh, axes=("tp", "pp")) as group:
        if not group.alone and (guessing or prompt_cache_file is not None):
            raise UsageError("several processes share a model without guessing ahead and without a prompt cache")
        text = (sys.stdin.read() if sys.stdin is not None else "") if prompt == "-" and group.first else prompt
        text = group.world.share(text)
        if not text:
            raise PromptError("the prompt is empty; give one with --prompt")
        if not group.alone and sampling.seed is None:  # all processes draw alike
            sampling = replace(sampling, seed=group.world.share(secrets.randbits(32)))
        start = time.perf_counter()
        network, tokenizer = opt.load(model or opt.shipped_model(), dtype, revision, adapter_path, group=group)
        loaded = time.perf_counter() - start
        speculation = caching.speculation(tokenizer, draft_model, num_draft_tokens, prompt_lookup, early_exit, dtype)
        stop_tokens = opt.token_ids(tokenizer, extra_eos_token)
        if prompt_cache_file is not None:
            tokens, cache = _continued(network, tokenizer, prompt_cache_file, text)
        else:
            tokens = _tokens(tokenizer, text, system_prompt, ignore_chat_template, variables)
            cache = None if spec is None else network.make_cache(spec)
        if beams is not None:
            _print_beams(network, tokenizer, tokens, beams, max_tokens, stop_tokens)
            return
        options = {"stop": stop or (), "stop_tokens": stop_tokens, "sampling": sampling, "speculation": speculation}
        options["constraint"] = forms.constraint(tokenizer, schema, regex)
        _print_answer(
            network, tokenizer, tokens, loaded if group.first else None, max_tokens=max_tokens, cache=cache, **options
        )


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


def _tokens(
    tokenizer: Any, text: str, system_prompt: str | None, ignore_chat_template: bool, variables: dict[str, Any]
) -> str | list[int]:
    """The prompt: tokens of a chat, or plain text where there is no chat template or none is wanted."""
    if tokenizer.chat_template is not None and not ignore_chat_template:
        system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        messages = [*system, {"role": "user", "content": text}]
        tokens: list[int] = tokenizer.encode_chat(messages, add_generation_prompt=True, **variables)
        return tokens
    if system_prompt is not None:
        raise PromptError("--system-prompt needs a chat template, which this model doesn't have or was told to ignore")
    return text


def _continued(network: Any, tokenizer: Any, path: str, text: str) -> tuple[list[int], Any]:
    """The tokens of a cached text and what continues it, and the cache that holds the beginning of them."""
    from mlxlm.generation import load_prompt_cache

    held = load_prompt_cache(path, network, tokenizer)
    tokens = held.continued(tokenizer, text)
    return tokens, held.begins(tokens)


def _beams(
    num_beams: int | None, num_return: int, length_penalty: float | None, early_stopping: str | None
) -> Beams | None:
    """The search that the flags ask for, None without one. Raises UsageError for flags of a search that is not on."""
    from mlxlm.generation import Beams

    if num_beams is None:
        given = {
            "--num-return-sequences": num_return != 1,
            "--length-penalty": length_penalty is not None,
            "--early-stopping": early_stopping is not None,
        }
        for flag in (flag for flag, there in given.items() if there):
            raise UsageError(f"{flag} is an option of beam search: give --num-beams too")
        return None
    choices: dict[str, Any] = {"true": True, "false": False, "never": "never"}
    if early_stopping is not None and early_stopping not in choices:
        raise UsageError(f"--early-stopping is true, false or never, not {early_stopping!r}")
    return Beams(
        num_beams=num_beams,
        num_return=num_return,
        length_penalty=1.0 if length_penalty is None else length_penalty,
        early_stopping=choices[early_stopping or "false"],
    )


def _print_beams(
    network: Any, tokenizer: Any, tokens: str | list[int], beams: Beams, max_tokens: int, stop_tokens: list[int]
) -> None:
    """The answers of a beam search; with their scores when there are several."""
    from mlxlm.generation import beam_search

    start = time.perf_counter()
    (answers,) = beam_search(network, tokenizer, [tokens], beams=beams, max_tokens=max_tokens, stop_tokens=stop_tokens)
    for answer in answers:
        print(answer.text if beams.num_return == 1 else f"{answer.score:.4f}\t{answer.text}")
    seconds = time.perf_counter() - start
    print(f"{beams.num_beams} beams, {len(answers[0].tokens)} tokens in {seconds:.2f} s", file=sys.stderr)
