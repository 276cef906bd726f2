"""Answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxlm.errors import UsageError
from mlxlm.generation.requests import Completion, Request, TokenChoice
from mlxlm.generation.sampling import Sampling
from mlxlm.generation.scheduler import Scheduler
from mlxlm.generation.stepping import Stepping, forget_steps
from mlxlm.layers import CacheSpec

if TYPE_CHECKING:
    from mlxlm.models import Transformer


def generate_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int] = 100,
    samples: int = 1,
    stop_tokens: Iterable[int] = (),
    sampling: Sampling | None = None,
    likelihoods: int | None = None,
    words: int | None = None,
    batch_size: int = 16,
    chunk: int | None = None,
    spec: CacheSpec | None = None,
    cache_limit: int | None = None,
    stepping: Stepping | None = None,
) -> list[Completion]:
    """Answers to prompts of token ids, in order; `samples` of them to each prompt, one after another.

    The model's weights are used as they are now, so rollouts between updates need nothing but this call.

    max_tokens: of an answer, one for all or one a prompt.  sampling: default greedy. Its seed is that of the first
    answer; the next ones count on from it.  likelihoods: 0 also gives the log probability of each token (as the model
    has it, whatever the sampling), n those of the n likeliest ones too.  words: ids from there on are never chosen,
    default the model's vocabulary.  batch_size: answers made at once.  chunk, spec, cache_limit: see `Scheduler`.

    Raises PromptError for an empty prompt, one with a foreign id and one that fills the context.
    """
    requests = list(
        make_requests(
            prompts,
            max_tokens=max_tokens,
            stop_tokens=stop_tokens,
            sampling=sampling,
            likelihoods=likelihoods,
            samples=samples,
        )
    )
    if samples < 1 or batch_size < 1:
        raise UsageError("samples and batch_size are at least 1")
    scheduler = Scheduler(
        model,
        model.config.embeddings.vocab_size if words is None else words,
        max_rows=batch_size,
        chunk=chunk,
        spec=spec,
        cache_limit=cache_limit,
        stepping=stepping,
        patient=True,
    )
    try:
        return run(scheduler, requests, samples)
    finally:
        # The next thing to come may be an update, and compiled steps would keep the weights of today beside the new.
        forget_steps(model)


def best_of(
    model: Transformer, prompts: Sequence[Sequence[int]], *, samples: int, keep: int = 1, **options: Any
) -> list[list[Completion]]:
    """Of `samples` answers to each prompt the `keep` likeliest, best first.

    How likely an answer is: the mean log probability of its tokens by the model, whatever the sampling, its stop token
    included. Give a sampling with a temperature, or all answers are alike. Options as for `generate_tokens`.
    """
    if not 1 <= keep <= samples:
        raise UsageError(f"keep is {keep}, but must be 1 to {samples}, the number of samples")
    options.setdefault("likelihoods", 0)
    found = generate_tokens(model, prompts, samples=samples, **options)
    groups = [found[first : first + samples] for first in range(0, len(found), samples)]
    return [sorted(group, key=lambda one: -one.mean_log_probability)[:keep] for group in groups]


def make_requests(
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    stop_tokens: Iterable[int],
    sampling: Sampling | None,
    likelihoods: int | None = None,
    samples: int = 1,
) -> Iterator[Request]:
    """One request a prompt; its seed leaves room for `samples` answers. See `generate_tokens`."""
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(prompts):
        raise UsageError(f"{len(limits)} numbers of max_tokens for {len(prompts)} prompts")
    sampling, stops = sampling or Sampling(), frozenset(stop_tokens)
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        own = counted(sampling, number * samples)
        yield Request(tokens=tuple(prompt), max_tokens=limit, stop_tokens=stops, sampling=own, likelihoods=likelihoods)


def run(scheduler: Scheduler, requests: Sequence[Request], samples: int = 1) -> list[Completion]:
    """Answer requests with a scheduler, `samples` times each, one after another.

    With several samples the seed of a request is that of its first answer; the next ones count on from it.
    """
    made: list[list[TokenChoice]] = [[] for _ in range(len(requests) * samples)]
    # Prompts of like length are read and padded together, the longest first: what needs most memory comes at once.
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    for index in order:
        for first in range(0, samples, scheduler.max_rows):
            copies = min(scheduler.max_rows, samples - first)
            for number, row in enumerate(scheduler.add(requests[index], copies=copies), first):
                row.owner = index * samples + number
                row.request = replace(row.request, sampling=counted(row.request.sampling, number))
    while scheduler.busy:
        for row, choice in scheduler.step():
            if row.error is not None:
                raise row.error
            made[row.owner].append(choice)
    return [Completion.of(choices) for choices in made]


def counted(sampling: Sampling, number: int) -> Sampling:
    """The sampling of the answer with that number: its seed counts on, where there is one."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + number) % 2**64)
