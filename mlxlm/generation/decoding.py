"""Autoregressive decoding: the prompt, then one token after another from the cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxlm.errors import PromptError, UsageError, nearest
from mlxlm.generation.batching import counted, run
from mlxlm.generation.contrastive import ContrastiveSearch, contrastive_decode
from mlxlm.generation.guidance import Guidance, GuidedSteps
from mlxlm.generation.requests import Likelihoods, Processor, Request, TokenChoice, added
from mlxlm.generation.sampler import Sampler
from mlxlm.generation.sampling import Sampling, chosen
from mlxlm.generation.scheduler import Scheduler
from mlxlm.generation.speculation import Speculation, speculative_decode
from mlxlm.generation.stepping import decoding_cache
from mlxlm.generation.steps import Steps, check_generates, check_ids, make_steps, room
from mlxlm.generation.stopping import StopStrings
from mlxlm.layers import Cache

if TYPE_CHECKING:
    from mlxlm.generation.constraint import Constraint
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
_PROMPTS = "but a prompt is text, a list of token ids, or a list of chat messages"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of an answer as it is generated.

    text: new text, may be empty.  token: the id behind it, None in a last piece that only ends the answer.
    finish_reason: None, "stop" (stop token or stop string) or "length" (max_tokens or the context is used up).
    prompt_tokens: of the whole prompt.  cached_tokens: of these, how many the given cache held already.
    generated_tokens: so far, a stop token included.
    prompt_seconds: until the first token was there.  decode_seconds: since then.
    log_probability, likeliest: of the token, where asked for; see `TokenChoice`.
    """

    text: str
    token: int | None
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prompt_seconds: float
    decode_seconds: float
    log_probability: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second, cached ones not counted."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prompt_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first."""
        return max(self.generated_tokens - 1, 0) / max(self.decode_seconds, 1e-9)


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text, ids, or chat messages (dicts with "role" and "content").

    Raises PromptError when there is nothing in it, UsageError when it is none of these.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty")
        tokens = tokenizer.encode(prompt)
    else:
        items = _items(prompt)
        if items and all(isinstance(item, Mapping) for item in items):
            tokens = tokenizer.encode_chat(items)
        else:
            tokens = [_token_id(item) for item in items]
    if not tokens:
        raise PromptError("the prompt is empty: it has no tokens")
    return tokens


def _items(prompt: Any) -> list[Any]:
    """What stands in a prompt that is no text: a sequence, or a one-dimensional array."""
    if isinstance(prompt, (mx.array, np.ndarray)) and prompt.ndim == 1:
        return prompt.tolist()  # type: ignore[return-value]
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise UsageError(f"the prompt is of type {type(prompt).__name__}, {_PROMPTS}")
    return list(prompt)


def _token_id(item: Any) -> int:
    """A token id of any integer type. A number with a fraction, or text of digits, is a mistake and no id."""
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise UsageError(f"the prompt holds {item!r:.40} of type {type(item).__name__}, {_PROMPTS}")
    return item.__index__()


def stream_generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 100,
    stop: Iterable[str] | str = (),
    stop_tokens: Iterable[int] = (),
    cache: Cache | None = None,
    speculation: Speculation | None = None,
    likelihoods: int | None = None,
    constraint: Constraint | None = None,
    processors: Sequence[Processor] = (),
    guidance: Guidance | None = None,
    contrastive: ContrastiveSearch | None = None,
    sampling: Sampling | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """Generate an answer piece by piece: what continues the prompt, or with an encoder-decoder what answers it.

    prompt: text, token ids or chat messages.  max_tokens: of the answer, default 100; it also ends where the model's
    context does.  stop: strings that end the answer and are not part of it.  stop_tokens: further token ids that end
    it, beside the tokenizer's own.  cache: from `model.make_cache()`; tokens it holds must begin the prompt, and it
    holds them and the answer afterwards, but for its last token when max_tokens ended it; only for models without an
    encoder.  speculation: guess tokens ahead, see `Speculation`; the answer is distributed as without.
    likelihoods: 0 to get the log probability of each token, n for those of the n likeliest too, default neither.
    constraint: what the answer must look like, see `json_schema` and `regex`.  processors: further changes to the
    logits, see `Processor`; new ones for each answer.  guidance: lean away from another prompt, see `Guidance`.
    None of the three goes with speculation.  contrastive: choose by contrastive search, see `ContrastiveSearch`, with
    an empty cache, and without speculation and guidance.
    sampling: see `Sampling`; or its fields as keywords (temperature=0.7 ...). A repetition penalty counts
    what the decoder reads: prompt and answer, or with an encoder-decoder the answer alone.

    Raises PromptError for an empty prompt or one that fills the context, SamplingError for bad options and
    UnsupportedModelError for a model that can't generate.
    """
    sampling = sampling_of(sampling, options)
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, but at least one token must be generated")
    check_generates(model)
    tokens = prompt_tokens(tokenizer, prompt)
    stops = StopStrings(stop)
    check_ids(model, tokens)
    cache = _cache(model, tokens, cache)
    sampler = make_sampler(model, tokenizer, tokens, sampling)
    limit = room(model, tokens, max_tokens)
    if constraint is not None:
        processors = (*processors, constraint.processor(sampler.vocab_size))
    _check_together(sampling, processors, speculation, guidance, contrastive)
    if guidance is not None:
        check_ids(model, guidance.negative)
        limit = room(model, guidance.negative, limit)
    common = (model, tokens, cache, sampler, limit)
    if contrastive is not None:
        choices = contrastive_decode(*common, contrastive, likelihoods, processors)
    elif speculation is not None:
        choices = speculative_decode(*common, speculation, likelihoods)
    else:
        choices = decode(*common, likelihoods, processors, guidance)
    return _pieces(tokenizer, tokens, cache.length, choices, stops, set(tokenizer.stop_ids) | set(stop_tokens), limit)


def _check_together(
    sampling: Sampling,
    processors: Sequence[Processor],
    speculation: Speculation | None,
    guidance: Guidance | None,
    contrastive: ContrastiveSearch | None,
) -> None:
    """Raise UsageError or SamplingError for ways to an answer that can't be combined."""
    if contrastive is not None:
        contrastive.check_sampling(sampling)
        if speculation is not None or guidance is not None:
            raise UsageError("contrastive search goes with no speculation and no guidance")
    if speculation is not None and (processors or guidance is not None):
        raise UsageError("speculation guesses tokens ahead: it goes with no constraint, no processors and no guidance")


def make_sampler(model: Transformer, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling) -> Sampler:
    """A sampler for one answer, over the words that both the model and the tokenizer have."""
    # Some heads have more rows than the tokenizer has words; those rows say nothing.
    words = min(tokenizer.vocab_size, model.config.embeddings.vocab_size)
    start = model.config.decoder_start
    return sampling.sampler(prompt if start is None else [start], words)


def _cache(model: Transformer, tokens: list[int], cache: Cache | None) -> Cache:
    if cache is None:
        return decoding_cache(model)
    if model.config.has_memory:
        raise UsageError("a cache can't be given to an encoder-decoder model: its encoder reads every prompt anew")
    if cache.length >= len(tokens):
        raise PromptError(f"the cache holds {cache.length} tokens; a prompt that continues it has more than that")
    return cache


def sampling_of(sampling: Sampling | None, options: dict[str, Any]) -> Sampling:
    """A sampling given as such, or by its fields as keywords. Raises UsageError for both and for unknown ones."""
    if sampling is not None:
        if options:
            raise UsageError(f"give either sampling or its fields, not both: {', '.join(options)}")
        return sampling
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}{nearest(name, known)}")
    return Sampling(**options)


def _pieces(
    tokenizer: Tokenizer,
    tokens: list[int],
    cached: int,
    choices: Iterator[TokenChoice],
    stops: StopStrings,
    stop_tokens: set[int],
    limit: int,
) -> Iterator[Piece]:
    """The pieces of an answer whose tokens come one by one.  tokens: of the prompt.  cached: of these."""
    detokenizer = tokenizer.detokenizer()
    start = time.perf_counter()
    first: float | None = None
    for count, choice in enumerate(choices, 1):
        token = choice.token
        now = time.perf_counter()
        first = now if first is None else first
        text, reason = "", None
        if token in stop_tokens:
            reason = "stop"
        else:
            text = stops.add(detokenizer.add(token))
            reason = "stop" if stops.stopped else "length" if count == limit else None
        if reason is not None and not stops.stopped:
            text += stops.add(detokenizer.finish())
            text += stops.finish()
        yield Piece(
            text=text,
            token=token,
            finish_reason=reason,
            prompt_tokens=len(tokens),
            cached_tokens=cached,
            generated_tokens=count,
            prompt_seconds=first - start,
            decode_seconds=now - first,
            log_probability=choice.log_probability,
            likeliest=choice.likeliest,
        )
        if reason is not None:
            return


def decode(
    model: Transformer,
    tokens: list[int],
    cache: Cache,
    sampler: Sampler,
    max_tokens: int,
    likelihoods: int | None = None,
    processors: Sequence[Processor] = (),
    guidance: Guidance | None = None,
) -> Iterator[TokenChoice]:
    """Up to max_tokens tokens that follow (or answer) `tokens`, of which the cache may hold the beginning.

    The next step is launched before a token is read, so that the device never waits for Python; unless there are
    processors, which must see a token before the next one is chosen. The cache holds the prompt and the tokens that
    were yielded, but for the last of max_tokens.
    """
    answer: list[int] = []

    def choose(logits: mx.array) -> tuple[mx.array, Likelihoods | None]:
        token = sampler(logits, added(processors, answer, sampler.vocab_size))
        known = None if likelihoods is None else Likelihoods.of(logits, token, sampler.vocab_size, likelihoods)
        mx.async_eval(token, *(known.arrays() if known else ()))
        return token, known

    steps: Steps | GuidedSteps = make_steps(model, cache)
    if guidance is not None:
        steps = GuidedSteps(steps, make_steps(model), guidance)
    if not model.config.has_memory:
        cache.bound(len(tokens) + max_tokens)
    # Whoever stops early finds no token in the cache that was not yielded, so those ahead must be forgotten.
    ahead = 0 if processors else 1 if model.config.has_memory else min(steps.stepping.ahead, cache.takes_back + 1)
    launched = deque([choose(steps.start([tokens]))])
    left, yielded = max_tokens - 1, 0
    try:
        while launched:
            while left and len(launched) <= ahead:
                launched.append(choose(steps.step(launched[-1][0])))
                left -= 1
            yielded += 1
            token, known = launched.popleft()
            score, likeliest = (None, ()) if known is None else known.read()[0]
            number = chosen(int(token.item()))
            answer.append(number)
            yield TokenChoice(number, score, likeliest)
            if processors and left:
                launched.append(choose(steps.step(token)))
                left -= 1
    finally:
        if len(launched) > 1 and not model.config.has_memory:
            cache.trim(len(tokens) + yielded)


def generate(model: Transformer, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> str:
    """The whole answer as text. Arguments as for `stream_generate`."""
    return "".join(piece.text for piece in stream_generate(model, tokenizer, prompt, **options))


def batch_generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 100,
    stop_tokens: Iterable[int] = (),
    batch_size: int = 16,
    constraint: Constraint | None = None,
    sampling: Sampling | None = None,
    **options: Any,
) -> list[str]:
    """The answer to each prompt, in order; batch_size of them are made at once.

    Prompts may have any length. In a decoder others join as soon as answers end (see `generate_tokens` for ids and log
    probabilities); an encoder-decoder takes prompts of like length together. A seed is that of the first prompt; the
    next ones count on from it. Other arguments as for `stream_generate`.
    """
    if isinstance(prompts, str):
        raise UsageError("prompts is one string; give a list of them, or use generate")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, but at least one token must be generated")
    sampling = sampling_of(sampling, options)
    check_generates(model)
    stops = frozenset(tokenizer.stop_ids) | frozenset(stop_tokens)
    rows = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    for row in rows:
        check_ids(model, row)
    words = min(tokenizer.vocab_size, model.config.embeddings.vocab_size)
    own = [counted(sampling, number) for number in range(len(rows))]
    if not model.config.has_memory:
        requests = [
            Request(
                tokens=tuple(row),
                max_tokens=max_tokens,
                stop_tokens=stops,
                sampling=one,
                processors=() if constraint is None else (constraint.processor(words),),
            )
            for row, one in zip(rows, own, strict=True)
        ]
        found = run(Scheduler(model, words, max_rows=batch_size, patient=True), requests)
        return [tokenizer.decode(one.answer) for one in found]
    if constraint is not None:
        raise UsageError("an encoder-decoder model takes no constraint for a batch; use generate, one prompt at a time")
    limits = [room(model, row, max_tokens) for row in rows]
    answers: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        sampler = Sampler(words)
        sampler.join([own[i] for i in batch], [[model.config.decoder_start]] * len(batch))
        made = _answers(model, [rows[i] for i in batch], sampler, [limits[i] for i in batch], stops)
        for index, answer in zip(batch, made, strict=True):
            answers[index] = answer
    return [tokenizer.decode(answer) for answer in answers]


def _answers(
    model: Transformer, rows: list[list[int]], sampler: Sampler, limits: list[int], stops: frozenset[int]
) -> list[list[int]]:
    """Token ids of the answers to a batch of prompts, stop tokens left out. Rows that are done leave the batch."""
    steps = make_steps(model)
    answers: list[list[int]] = [[] for _ in rows]
    logits, active = steps.start(rows), list(range(len(rows)))
    while True:
        picked = sampler(logits)
        left = []
        for i, (index, token) in enumerate(zip(active, picked.tolist(), strict=True)):
            if chosen(token) in stops:
                continue
            answers[index].append(token)
            if len(answers[index]) < limits[index]:
                left.append(i)
        if not left:
            return answers
        if len(left) < len(active):
            steps.take(left)
            sampler.take(left)
            picked, active = picked[mx.array(left)], [active[i] for i in left]
        logits = steps.step(picked)
