"""Which form of decoding steps is fastest on this device for a model: `mlxlm doctor --tune` measures, others follow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxlm import runtime
from mlxlm.generation.stepping import Stepping, decoding_cache, forget_steps, make_step, tuning_key
from mlxlm.kernels.attention import tuning

if TYPE_CHECKING:
    from mlxlm.models import Transformer

_FORMS = ("no", "pieces", "whole", "fused")


def tune_steps(model: Transformer, *, prompt: int = 512, tokens: int = 64) -> Iterator[str]:
    """Time steps of one row in every form after `prompt` tokens, and record the fastest; yields a line a form.
    A form that fails on this device is told of and not chosen.

    tokens: steps that are timed, after 8 that are not.
    """
    longest = model.config.max_length
    if longest is not None:
        prompt = max(1, min(prompt, longest - tokens - 8))
    times: dict[str, float] = {}
    for form in _FORMS:
        stepping = replace(Stepping(), compiled=form, ahead=1 if form == "no" else 2)  # type: ignore[arg-type]
        try:
            times[form] = _seconds(model, stepping, prompt, tokens)
        except (RuntimeError, ValueError) as error:  # a compiler's or a driver's refusal leaves the other forms
            if form == "no":
                raise
            yield f"decoding, {form}: failed ({' '.join(str(error).split())[:300]})"
            continue
        finally:
            forget_steps(model)
        yield f"decoding, {form}: {1 / times[form]:.0f} tokens/s"
    best = min(times, key=lambda form: times[form])
    backend = runtime.backend()
    known = tuning.record(backend)
    choices = dict(known.choices) | {tuning_key(model): f"compiled={best},ahead={1 if best == 'no' else 2}"}
    tuning.write_record(backend, disabled=known.disabled, choices=choices)
    yield f"decoding: chosen: {best}"


def _seconds(model: Transformer, stepping: Stepping, prompt: int, tokens: int) -> float:
    """Seconds a step, the median of four equal parts."""
    cache = decoding_cache(model, stepping=stepping)
    token = mx.argmax(model(mx.full((1, prompt), 1, dtype=mx.int32), cache=cache)[:, -1], axis=-1)
    cache.bound(prompt + tokens + 8)
    step = make_step(model, stepping)
    parts = []
    for count in (8, *[tokens // 4] * 4):
        start = time.perf_counter()
        launched: list[mx.array] = []
        for _ in range(count):
            token = mx.argmax(step(token, cache), axis=-1)
            mx.async_eval(token)
            launched.append(token)
            if len(launched) > stepping.ahead:
                mx.eval(launched[-1 - stepping.ahead])
        mx.eval(token)
        parts.append((time.perf_counter() - start) / count)
    return median(parts[1:])
