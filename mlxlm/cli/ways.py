"""The ways in which `mlxlm generate` finds an answer, and which flags go together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxlm.cli import answers
from mlxlm.cli.answers import SAMPLING, Given
from mlxlm.cli.flags import flag_of
from mlxlm.errors import PromptError, UsageError

if TYPE_CHECKING:
    from mlxlm.generation import Beams, ContrastiveSearch, Sampling

_CACHES = ("kv_bits", "kv_group_size", "max_kv_size", "prompt_cache_file")
_GUESSES = ("draft_model", "num_draft_tokens", "prompt_lookup", "early_exit")
_FORMS = ("json_schema", "regex")
_GUIDED = ("guidance_scale", "negative_prompt")
# What a flag asks for, and the flags that can't be combined with it.
_GOES_WITHOUT = {
    "num_beams": (
        "a beam search", (*SAMPLING, "stop", "best_of", "contrastive_alpha", *_CACHES, *_GUESSES, *_FORMS, *_GUIDED),
    ),
    "best_of": ("a choice of the best answer", ("stop", "contrastive_alpha", *_CACHES, *_GUESSES, *_FORMS, *_GUIDED)),
    "contrastive_alpha": (
        "contrastive search", ("temp", "top_p", "min_p", "seed", "prompt_cache_file", *_GUESSES, *_GUIDED),
    ),
    "guidance_scale": ("guidance", ("prompt_cache_file", *_GUESSES)),
    "json_schema": ("a form of the answer", ("regex", *_GUESSES)),
    "regex": ("a form of the answer", _GUESSES),
    "prompt_cache_file": (
        "a prompt cache, which says which cache, system prompt and template it was made with,",
        ("kv_bits", "kv_group_size", "max_kv_size", "system_prompt", "chat_template_config", "ignore_chat_template"),
    ),
}  # fmt: skip
# Flags that say something about others, of which one must be there.
_BELONG_TO = {
    "length_penalty": ("beam search", ("num_beams",)),
    "early_stopping": ("beam search", ("num_beams",)),
    "num_return_sequences": ("beam search and of --best-of", ("num_beams", "best_of")),
    "negative_prompt": ("guidance", ("guidance_scale",)),
    "guidance_scale": ("guidance", ("negative_prompt",)),
}
# What processes that share a model can't do together.
_ALONE = (*_GUESSES, *_GUIDED, "prompt_cache_file", "contrastive_alpha", "best_of")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an answer is found; token by token by `sampling` where nothing else is said.

    best_of: answers to draw.  count: answers to print.
    """

    sampling: Sampling
    beams: Beams | None = None
    best_of: int | None = None
    contrastive: ContrastiveSearch | None = None
    guidance_scale: float | None = None
    count: int = 1


def check_together(given: Given) -> None:
    """Raise UsageError for flags that can't be combined, or that are about something that is not asked for."""
    from mlxlm.generation import Sampling

    plain = Sampling()
    for name, (what, without) in _GOES_WITHOUT.items():
        if name not in given:
            continue
        clashing = [
            other for other in without
            if other in given and (other not in SAMPLING or given[other] != getattr(plain, SAMPLING[other]))
        ]  # fmt: skip
        if clashing:
            raise UsageError(f"{what} ({flag_of(name)}) goes without {' and '.join(map(flag_of, clashing))}")
    for name, (what, owners) in _BELONG_TO.items():
        if name in given and not any(owner in given for owner in owners):
            raise UsageError(f"{flag_of(name)} is an option of {what}: give {' or '.join(map(flag_of, owners))} too")


def check_shared(given: Given) -> None:
    """Raise UsageError for what several processes that share a model can't do."""
    clashing = [name for name in _ALONE if name in given]
    if clashing:
        raise UsageError(f"several processes share a model without {' and '.join(map(flag_of, clashing))}")


def way(given: Given) -> Way:
    """How the answer is to be found. Raises UsageError and SamplingError for numbers that don't go."""
    check_together(given)
    count = given.get("num_return_sequences", 1)
    if "contrastive_alpha" in given:
        own = {name: value for name, value in given.items() if name != "top_k"}
        return Way(sampling=answers.sampling(own), contrastive=_contrastive(given))
    sampling = answers.sampling(given)
    if "num_beams" in given:
        return Way(sampling=sampling, beams=_beams(given, count), count=count)
    if "best_of" in given:
        return Way(sampling=sampling, best_of=_best_of(given["best_of"], count, sampling), count=count)
    scale = given.get("guidance_scale")
    if scale is not None and not math.isfinite(scale):
        raise UsageError(f"--guidance-scale is {scale}, but must be a finite number")
    if given.get("negative_prompt") == "":
        raise PromptError("--negative-prompt is empty; it stands where the prompt does")
    return Way(sampling=sampling, guidance_scale=scale)


def _contrastive(given: Given) -> ContrastiveSearch:
    from mlxlm.generation import ContrastiveSearch

    among = {"top_k": given["top_k"]} if "top_k" in given else {}
    return ContrastiveSearch(alpha=given["contrastive_alpha"], **among)


def _best_of(samples: int, count: int, sampling: Sampling) -> int:
    if samples < 1:
        raise UsageError(f"--best-of is {samples}, but must be at least 1")
    if not 1 <= count <= samples:
        raise UsageError(f"--num-return-sequences is {count}, but must be 1 to {samples}, as many as --best-of")
    if not sampling.temperature:
        raise UsageError("--best-of compares answers that are drawn at random: give --temp above 0")
    return samples


def _beams(given: Given, count: int) -> Beams:
    from mlxlm.generation import Beams

    early = given.get("early_stopping", "false")
    choices: dict[str, Any] = {"true": True, "false": False, "never": "never"}
    if early not in choices:
        raise UsageError(f"--early-stopping is true, false or never, not {early!r}")
    values = {"length_penalty": given["length_penalty"]} if "length_penalty" in given else {}
    return Beams(num_beams=given["num_beams"], num_return=count, early_stopping=choices[early], **values)
