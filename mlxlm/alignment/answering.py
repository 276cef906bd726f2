"""Answers to prompts: encoded, drawn from the model as it is, scored by it and by the reference, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxlm.alignment.log_probabilities import read, token_log_probabilities, with_places
from mlxlm.alignment.reference import reference
from mlxlm.alignment.rewards import Answered, Reward, checked
from mlxlm.alignment.spreading import spread
from mlxlm.alignment.tasks import token_values
from mlxlm.data import Example, Rows, encode_pieces, pad_examples
from mlxlm.errors import DataError, PromptError
from mlxlm.generation import Completion, Sampling, generate_tokens
from mlxlm.training.finetune.answers import untouched_chance

if TYPE_CHECKING:
    from mlxlm.alignment.settings import AlignSettings
    from mlxlm.distributed import Joined
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

MULTIPLE = 8  # to which rows are padded: answers are often short
_LEAST_ROWS = 16
_AT_ONCE = 4  # batches of answers that are measured before progress is told


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens, and the row that it comes from."""

    text: str
    tokens: tuple[int, ...]
    row: dict[str, Any]


def encode_prompts(rows: Rows, tokenizer: Tokenizer, limit: int | None) -> list[Prompt]:
    """The prompts of rows, as a chat where the tokenizer has a template. Raises PromptError for one above the limit."""
    found = []
    for where, row in rows.rows:
        if not isinstance(row.get("prompt"), str):
            raise DataError(f"{where}: the row has no 'prompt' to answer")
        text = row["prompt"]
        if tokenizer.chat_template is not None:
            tokens = tokenizer.encode_chat([{"role": "user", "content": text}])
        else:
            tokens = encode_pieces(tokenizer, [(text, False)], add_special_tokens=True).tokens
        if limit is not None and len(tokens) > limit:
            raise PromptError(f"{where}: the prompt has {len(tokens)} tokens, and {limit} leave room for an answer")
        found.append(Prompt(text, tuple(tokens), dict(row)))
    return found


def rows_at_once(settings: AlignSettings) -> int:
    """Answers that are drawn at once."""
    return max(settings.tuning.batch_size, _LEAST_ROWS)


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: AlignSettings,
    seed: int,
    samples: int = 1,
    *,
    greedy: bool = False,
) -> list[Completion]:
    """`samples` answers to each prompt, drawn from the model as it is, or the likeliest token each time."""
    temperature = 0.0 if greedy else settings.temperature or 1.0
    with untouched_chance(model):
        return generate_tokens(
            model, [prompt.tokens for prompt in prompts], max_tokens=settings.max_tokens, samples=samples,  # type: ignore[arg-type]
            stop_tokens=tokenizer.stop_ids, sampling=Sampling(temperature=temperature, seed=seed),
            words=min(tokenizer.vocab_size, model.config.embeddings.vocab_size),
            batch_size=rows_at_once(settings),
        )  # fmt: skip


def answered(tokenizer: Tokenizer, prompt: Prompt, completion: Completion) -> Answered:
    """What a reward is told."""
    return Answered(
        prompt.text, tokenizer.decode(list(completion.answer)), prompt.row, len(completion.tokens),
        completion.finish_reason == "stop",
    )  # fmt: skip


def scored(
    model: Transformer, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int
) -> list[tuple[list[float], list[float]]]:
    """Of each answer the log probability of every token by the model as it is and, where it has a value head, what this
    expects at each; in evaluation mode, in batches of like length.
    """
    found: list[Any] = [None] * len(answers)
    order = sorted(range(len(answers)), key=lambda i: len(prompts[i]) + len(answers[i]))
    with untouched_chance(model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = with_places(pad_examples([example_of(prompts[i], answers[i]) for i in part], 2**31 - 1, MULTIPLE))
            arrays = {name: mx.array(array) for name, array in batch.items()}
            hidden = read(model, arrays)
            log_p = np.array(token_log_probabilities(model, arrays, hidden))
            values = np.array(token_values(model, hidden)) if "value_head" in model else None
            for row, i in enumerate(part):
                mine = slice(len(prompts[i]) - 1, len(prompts[i]) - 1 + len(answers[i]))
                found[i] = (log_p[row, mine].tolist(), [] if values is None else values[row, mine].tolist())
    return found


def example_of(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A prompt with an answer, of which every token is scored."""
    return Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def measure_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: AlignSettings,
    reward: Reward | None,
    joined: Joined,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """What one answer to each prompt comes to: reward (where there is one), kl from the reference in nats an answer,
    length in tokens, and the share that is finished. The same answers are drawn from the same model every time.

    told: is given how many of the prompts are done.
    """
    size = -(-settings.tuning.batch_size // joined.world.size)

    def work(block: range) -> list[list[float]]:
        found: list[list[float]] = []
        for at in range(block.start, block.stop, _AT_ONCE * size):
            part = range(at, min(at + _AT_ONCE * size, block.stop))
            chosen = prompts[part.start : part.stop]
            completions = answer(model, tokenizer, chosen, settings, part.start)
            given = [answered(tokenizer, prompt, one) for prompt, one in zip(chosen, completions, strict=True)]
            rewards = checked(reward, given) if reward is not None else [0.0] * len(part)
            tokens, asked = [list(one.tokens) for one in completions], [prompt.tokens for prompt in chosen]
            mine = scored(model, asked, tokens, size)
            with reference(model):
                theirs = scored(model, asked, tokens, size)
            for one, (log_p, _), (log_ref, _), worth in zip(given, mine, theirs, rewards, strict=True):
                found.append([worth, sum(log_p) - sum(log_ref), float(one.tokens), float(one.finished)])
            told(len(found))
        return found

    rows = np.array(spread(joined, len(prompts), work, "answers to held-out prompts"), dtype=np.float64)
    found = dict(zip(("reward", "kl", "length", "finished"), rows.mean(axis=0).tolist(), strict=True))
    return found if reward is not None else {name: value for name, value in found.items() if name != "reward"}
