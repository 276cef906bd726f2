"""What the flags of `answer_flags` ask for, for the verbs that share them.

given: the flags that a person gave, by the names of their settings.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxlm.cli import options as opt
from mlxlm.cli.flags import flag_of
from mlxlm.errors import PromptError, UsageError

if TYPE_CHECKING:
    from mlxlm.distributed import Joined
    from mlxlm.generation import Sampling, Speculation
    from mlxlm.layers import CacheSpec
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

Given = Mapping[str, Any]
# Names of our flags, and what the library calls them.
SAMPLING = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "logit_bias": "logit_bias", "seed": "seed",
}  # fmt: skip
_OF_CHANCE = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # what they are where they are off
_WAYS_TO_GUESS = ("draft_model", "prompt_lookup", "early_exit")


def load(model: str | None, given: Given, group: Joined | None = None) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer; the shipped ones by default.  group: processes that share the model."""
    loading = given.get("dtype"), given.get("revision"), given.get("adapter_path")
    return opt.load(model or opt.shipped_model(), *loading, group=group)


def sampling(given: Given) -> Sampling:
    """How words are chosen. Raises UsageError for choices among tokens where the likeliest one is taken."""
    from mlxlm.generation import Sampling

    idle = [flag_of(name) for name, off in _OF_CHANCE.items() if given.get(name, off) != off]
    if idle and not given.get("temp"):
        has = "have" if len(idle) > 1 else "has"
        flags = " and ".join(idle)
        raise UsageError(
            f"{flags} {has} no effect at temperature 0, where the likeliest token is taken: give --temp too"
        )
    values = {SAMPLING[name]: value for name, value in given.items() if name in SAMPLING}
    if "logit_bias" in values:
        values["logit_bias"] = opt.parse_logit_bias(values["logit_bias"])
    return Sampling(**values)


def alike(chosen: Sampling, group: Joined) -> Sampling:
    """The same choices in all processes that share a model, which must draw the same numbers."""
    if group.alone or chosen.seed is not None:
        return chosen
    return replace(chosen, seed=group.world.share(secrets.randbits(32)))


def cache_spec(given: Given) -> CacheSpec | None:
    """The cache that is asked for, None without any. Raises UsageError for numbers that don't go."""
    from mlxlm.layers import CacheSpec

    names = {"kv_bits": "bits", "kv_group_size": "group_size", "max_kv_size": "max_length"}
    values = {names[name]: value for name, value in given.items() if name in names}
    if "group_size" in values and "bits" not in values:
        raise UsageError("--kv-group-size is about quantized caches: give --kv-bits too")
    return CacheSpec(**values) if values else None


def speculation(tokenizer: Tokenizer, given: Given) -> Speculation | None:
    """The guessing that is asked for, None without any. Loads the draft model.

    Raises UsageError for flags that contradict each other and for a draft model of another tokenizer.
    """
    from mlxlm.generation.speculation import Speculation, check_same_tokens

    values = {name: given[name] for name in _WAYS_TO_GUESS if name in given}
    count = given.get("num_draft_tokens")
    if len(values) > 1:
        raise UsageError(f"{' and '.join(map(flag_of, values))} are ways to guess ahead: give one of them")
    if not values:
        if count is not None:
            ways = ", ".join(map(flag_of, _WAYS_TO_GUESS))
            raise UsageError(f"--num-draft-tokens needs a way to guess ahead: {ways}")
        return None
    if "draft_model" in values:
        values["draft_model"], other = opt.load(values["draft_model"], given.get("dtype"), None)
        check_same_tokens(tokenizer, other)
    if count is not None:
        values["num_draft_tokens"] = count
    return Speculation(**values)


def options(tokenizer: Tokenizer, given: Given, max_tokens: int, chosen: Sampling) -> dict[str, Any]:
    """Keywords of `stream_generate` that all verbs have."""
    return {
        "max_tokens": max_tokens,
        "stop": given.get("stop", ()),
        "stop_tokens": opt.token_ids(tokenizer, given.get("extra_eos_token")),
        "sampling": chosen,
        "speculation": speculation(tokenizer, given),
    }


def prompt_tokens(tokenizer: Tokenizer, text: str, given: Given) -> str | list[int]:
    """The prompt: tokens of a chat, or plain text where there is no chat template or none is wanted."""
    system = given.get("system_prompt")
    if tokenizer.chat_template is not None and not given.get("ignore_chat_template"):
        first = [{"role": "system", "content": system}] if system is not None else []
        variables = opt.parse_object("--chat-template-config", given.get("chat_template_config"))
        messages = [*first, {"role": "user", "content": text}]
        tokens: list[int] = tokenizer.encode_chat(messages, add_generation_prompt=True, **variables)
        return tokens
    for name in ("system_prompt", "chat_template_config"):
        if name in given:
            raise PromptError(
                f"{flag_of(name)} needs a chat template, which this model doesn't have or was told to ignore"
            )
    return text
