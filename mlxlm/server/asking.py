"""What requests for text have in common: the options of an answer, and what the engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxlm.errors import MlxlmError
from mlxlm.generation import Constraint, CountPenalties, Processor, Request, Sampling
from mlxlm.generation.batching import counted
from mlxlm.server import fields as f
from mlxlm.server.fields import Fields
from mlxlm.server.problems import Problem
from mlxlm.server.settings import ServerSettings

# What the protocol has and this server has not; null, false and absence are fine.
REFUSED = (
    *("suffix", "echo", "audio", "modalities", "prediction", "reasoning_effort", "verbosity", "web_search_options"),
    *("functions", "function_call"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a request wants to be answered.

    max_tokens: of an answer.  copies: answers to each prompt.  stop: strings.  likelihoods: as in `Request`.
    penalties: frequency and presence.  stream: piece by piece.  usage: with a last chunk that counts tokens.
    """

    max_tokens: int
    copies: int
    stop: tuple[str, ...]
    sampling: Sampling
    stream: bool
    usage: bool
    penalties: tuple[float, float] = (0.0, 0.0)
    likelihoods: int | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the engine is to answer: prompts of token ids and how.

    words: to choose from.  constraint: of the answers.
    """

    prompts: tuple[tuple[int, ...], ...]
    options: Options
    stop_tokens: frozenset[int]
    words: int
    constraint: Constraint | None = None

    def requests(self) -> list[Request]:
        """One an answer: those to the first prompt, then those to the next."""
        options, found = self.options, []
        for prompt in self.prompts:
            for _ in range(options.copies):
                sampling = counted(options.sampling, len(found))
                found.append(
                    Request(
                        tokens=prompt,
                        max_tokens=options.max_tokens,
                        stop_tokens=self.stop_tokens,
                        sampling=sampling,
                        likelihoods=options.likelihoods,
                        processors=self._processors(),
                    )
                )
        return found

    def _processors(self) -> tuple[Processor, ...]:
        """New ones for one answer."""
        found: list[Processor] = []
        frequency, presence = self.options.penalties
        if frequency or presence:
            found.append(CountPenalties(self.words, frequency=frequency, presence=presence))
        if self.constraint is not None:
            found.append(self.constraint.processor(self.words))
        return tuple(found)


def read_options(fields: Fields, settings: ServerSettings, default_tokens: int) -> Options:
    """The options that completions and chats share."""
    limits = [fields.take(name, f.whole(1)) for name in ("max_tokens", "max_completion_tokens")]
    if None not in limits and limits[0] != limits[1]:
        raise Problem(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    limit = limits[0] or limits[1]
    if limit is not None and limit > settings.max_tokens:
        raise f.wrong("max_tokens", limit, f"at most {settings.max_tokens}, the limit of this server")
    streams = fields.take("stream", f.flag, False)
    given = fields.take("stream_options", f.mapping)
    usage = False
    if given is not None:
        if not streams:
            raise Problem(400, "stream_options goes with stream=true only", param="stream_options")
        inner = Fields(given, "stream_options")
        usage = inner.take("include_usage", f.flag, False)
        inner.take("include_obfuscation", f.one_of(False))
        inner.done()
    _read_harmless(fields)
    return Options(
        max_tokens=limit or min(default_tokens, settings.max_tokens),
        copies=fields.take("n", f.whole(1, settings.choices), 1),
        stop=_read_stop(fields),
        sampling=_read_sampling(fields),
        penalties=(
            fields.take("frequency_penalty", f.number(-2, 2), 0.0),
            fields.take("presence_penalty", f.number(-2, 2), 0.0),
        ),
        stream=streams,
        usage=usage,
    )


def _read_harmless(fields: Fields) -> None:
    """Fields that have no say in what is answered."""
    for name in ("user", "metadata", "safety_identifier", "prompt_cache_key"):
        fields.take(name, f.anything)
    fields.take("store", f.one_of(False))
    fields.take("service_tier", f.one_of("auto", "default"))


def _read_stop(fields: Fields) -> tuple[str, ...]:
    def read(name: str, value: Any) -> tuple[str, ...]:
        found = [value] if isinstance(value, str) else value
        valid = isinstance(found, list) and len(found) <= 16 and all(isinstance(one, str) and one for one in found)
        if not valid:
            raise f.wrong(name, value, "a string that is not empty, or a list of up to 16 of them")
        return tuple(found)

    return fields.take("stop", read, ())  # type: ignore[no-any-return]


def _read_bias(name: str, value: Any) -> dict[int, float]:
    read = f.number(-1e9, 1e9)
    bias = {}
    for token, amount in f.mapping(name, value).items():
        if not token.isascii() or not token.isdigit() or len(token) > 10:
            raise f.wrong(name, token, "an object of token ids and numbers")
        bias[int(token)] = read(f"{name}.{token}", amount)
    return bias


def _read_sampling(fields: Fields) -> Sampling:
    """The sampling: the protocol's fields, and as further ones top_k, min_p and repetition_penalty."""
    try:
        return Sampling(
            temperature=fields.take("temperature", f.number(0, 2), 1.0),
            top_p=fields.take("top_p", f.number(0, 1), 1.0),
            top_k=fields.take("top_k", f.whole(0), 0),
            min_p=fields.take("min_p", f.number(0, 1), 0.0),
            repetition_penalty=fields.take("repetition_penalty", f.number(0, 10), 1.0),
            logit_bias=fields.take("logit_bias", _read_bias, {}),
            seed=_seed(fields.take("seed", f.whole(-(2**63), 2**64 - 1))),
        )
    except MlxlmError as error:
        raise Problem(400, str(error), code="invalid_value") from None


def _seed(seed: int | None) -> int | None:
    """Seeds of the protocol may be negative."""
    return None if seed is None else seed % 2**64


def check_prompts(prompts: Sequence[Sequence[int]], copies: int, settings: ServerSettings) -> None:
    """Raise Problem for more answers, or for longer prompts, than the server allows."""
    if len(prompts) * copies > settings.choices:
        raise Problem(
            400, f"{len(prompts)} prompts with n={copies} are more than {settings.choices} answers", param="n"
        )
    longest = max(map(len, prompts))
    if settings.max_prompt_tokens is not None and longest > settings.max_prompt_tokens:
        raise Problem(
            400,
            f"the prompt has {longest} tokens, but this server takes at most {settings.max_prompt_tokens}",
            code="context_length_exceeded",
        )
