"""Rollouts: the model's own answers to prompts, what they were worth, and batches to learn from them.

A `RolloutSource` stands where a reader of data does. Whenever its batches are used up it has the model, as it is then,
answer more prompts. What it holds goes into checkpoints, so that a resumed run goes on in the middle of an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxlm.alignment import advantages as worth
from mlxlm.alignment.log_probabilities import read, token_log_probabilities, with_places
from mlxlm.alignment.reference import reference
from mlxlm.alignment.rewards import Answered, Reward, checked
from mlxlm.alignment.tasks import token_values
from mlxlm.data import IGNORE, Batch, Example, Rows, SupervisedSource, encode_pieces, pad_examples
from mlxlm.errors import DataError, PromptError
from mlxlm.generation import Completion, Sampling, generate_tokens
from mlxlm.training.finetune.answers import untouched_chance

if TYPE_CHECKING:
    from mlxlm.alignment.settings import AlignSettings
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

_STEERING = 0.1  # share by which beta follows a divergence that is off its target (Ziegler et al. 2019, section 2.2)
_LEAST_BETA = 1e-4
_MULTIPLE = 8  # to which rows are padded: answers are often short


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as tokens, and the row that it comes from."""

    text: str
    tokens: tuple[int, ...]
    row: dict[str, Any]


@dataclass
class Rollout:
    """One answer and all that is known of it.

    prompt: its number among the prompts.  finished: whether the model ended it.  reward: as it was given.
    old, reference, values, advantages, returns: of each token of the answer; values and returns with PPO alone.
    """

    prompt: int
    tokens: list[int]
    finished: bool
    reward: float
    old: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


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
            batch_size=max(settings.tuning.batch_size, 16),
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
            batch = with_places(pad_examples([_example(prompts[i], answers[i]) for i in part], 2**31 - 1, _MULTIPLE))
            arrays = {name: mx.array(array) for name, array in batch.items()}
            hidden = read(model, arrays)
            log_p = np.array(token_log_probabilities(model, arrays, hidden))
            values = np.array(token_values(model, hidden)) if "value_head" in model else None
            for row, i in enumerate(part):
                mine = slice(len(prompts[i]) - 1, len(prompts[i]) - 1 + len(answers[i]))
                found[i] = (log_p[row, mine].tolist(), [] if values is None else values[row, mine].tolist())
    return found


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    return Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


class RolloutSource:
    """Batches of rollouts, endless. A `BatchSource`.

    model: answers as it is whenever answers are needed.  prompts: taken in an order drawn anew for each pass over them.
    texts: for PPO-ptx, an endless source of batches of words.

    numbers: of the newest iteration: reward, kl (nats an answer, the sum over its tokens of log pi - log ref), length,
    finished, beta.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], reward: Reward,
        settings: AlignSettings, texts: SupervisedSource | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.prompts, self.reward = model, tokenizer, prompts, reward
        self.settings, self.texts = settings, texts
        self.epoch, self.num_tokens = 0, 0
        self.iteration, self.beta, self._next_prompt, self._index = 0, float(settings.beta or 0.0), 0, 0
        self.rollouts: list[Rollout] = []
        self._plain: list[dict[str, Any]] = []
        self._order: list[list[int]] = []
        self.numbers: dict[str, float] = {}

    def next(self) -> Batch:
        """The next batch; when none is left the model answers first."""
        if self._index >= len(self._order):
            self._roll()
        chosen = [self.rollouts[i] for i in self._order[self._index]]
        self._index += 1
        batch = self._batch(chosen)
        self.num_tokens += int(batch["key_lengths"].sum())
        return batch

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, the rollouts of this iteration included."""
        return {
            "iteration": self.iteration, "next_prompt": self._next_prompt, "index": self._index, "beta": self.beta,
            "num_tokens": self.num_tokens, "rollouts": self._plain, "numbers": self.numbers, "order": self._order,
            "prompts": len(self.prompts), "texts": None if self.texts is None else self.texts.state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises DataError when the prompts are others."""
        if state["prompts"] != len(self.prompts):
            raise DataError(f"the run was made with {state['prompts']} prompts, now there are {len(self.prompts)}")
        self.iteration, self._next_prompt, self._index = state["iteration"], state["next_prompt"], state["index"]
        self.beta, self.num_tokens, self.numbers = state["beta"], state["num_tokens"], state["numbers"]
        self._plain, self._order = state["rollouts"], state["order"]
        self.rollouts = [Rollout(**values) for values in self._plain]
        if self.texts is not None:
            self.texts.restore(state["texts"])

    def metrics(self) -> dict[str, float]:
        """The numbers of the newest iteration, for reports."""
        return dict(self.numbers)

    def _draw(self, count: int) -> list[int]:
        """Numbers of the next prompts."""
        chosen = []
        for _ in range(count):
            self.epoch, place = divmod(self._next_prompt, len(self.prompts))
            order = np.random.default_rng((self.settings.tuning.seed, 3, self.epoch)).permutation(len(self.prompts))
            chosen.append(int(order[place]))
            self._next_prompt += 1
        return chosen

    def _roll(self) -> None:
        """One iteration: answers, rewards, advantages, and the order in which they are learned from."""
        settings = self.settings
        self.rollouts = self._answer()
        self._score()
        if settings.method == "ppo":
            self._value()
        else:
            self._compare()
        rng = np.random.default_rng((settings.tuning.seed, 5, self.iteration))
        size, count = settings.tuning.batch_size, len(self.rollouts)
        self._order = []
        for _ in range(settings.passes or 1):
            order = rng.permutation(count).tolist()
            self._order += [order[at : at + size] for at in range(0, count, size)]
        self._plain = [vars(one) for one in self.rollouts]
        self.iteration, self._index = self.iteration + 1, 0

    def _answer(self) -> list[Rollout]:
        """Answers with their rewards. Of prompts whose answers are all worth the same others are tried, as often as
        `dynamic_sampling` says (DAPO, arXiv:2503.14476, section 3.2); then those that are left do.
        """
        settings = self.settings
        size, wanted = settings.answers_per_prompt or 1, settings.prompts_per_iteration or 1
        useful: list[list[Rollout]] = []
        idle: list[list[Rollout]] = []
        rounds = 1 + (settings.dynamic_sampling or 0)
        for number in range(rounds):
            groups = self._groups(self._draw(wanted - len(useful)), size, number)
            for group in groups:
                varied = len({one.reward for one in group}) > 1 or not settings.dynamic_sampling
                (useful if varied else idle).append(group)
            if number == 0:
                self._tell([one for group in groups for one in group])
            if len(useful) == wanted:
                break
        return [one for group in [*useful, *idle[: wanted - len(useful)]] for one in group]

    def _groups(self, chosen: list[int], size: int, round_number: int) -> list[list[Rollout]]:
        seed = int(np.random.default_rng((self.settings.tuning.seed, 7, self.iteration, round_number)).integers(2**62))
        prompts = [self.prompts[i] for i in chosen]
        completions = answer(self.model, self.tokenizer, prompts, self.settings, seed, size)
        told = [answered(self.tokenizer, prompts[n // size], one) for n, one in enumerate(completions)]
        made = [
            Rollout(chosen[n // size], list(one.tokens), one.finish_reason == "stop", reward)
            for n, (one, reward) in enumerate(zip(completions, checked(self.reward, told), strict=True))
        ]
        return [made[at : at + size] for at in range(0, len(made), size)]

    def _tell(self, first: list[Rollout]) -> None:
        """Numbers of the answers before any were left out."""
        self.numbers = {
            "reward": float(np.mean([one.reward for one in first])),
            "length": float(np.mean([len(one.tokens) for one in first])),
            "finished": float(np.mean([one.finished for one in first])),
        }

    def _score(self) -> None:
        """Log probabilities by the model that answered and by the reference, and beta for the next iteration."""
        prompts = [self.prompts[one.prompt].tokens for one in self.rollouts]
        answers, size = [one.tokens for one in self.rollouts], self.settings.tuning.batch_size
        mine = scored(self.model, prompts, answers, size)
        with reference(self.model):
            theirs = scored(self.model, prompts, answers, size)
        for one, (log_p, values), (log_ref, _) in zip(self.rollouts, mine, theirs, strict=True):
            one.old, one.values, one.reference = log_p, values, log_ref
        kl = float(np.mean([sum(one.old) - sum(one.reference) for one in self.rollouts]))
        self.numbers = {**self.numbers, "kl": kl, "beta": self.beta}
        target = self.settings.kl_target
        if target:
            error = float(np.clip(kl / target - 1, -0.2, 0.2)) / 0.2
            self.beta = max(self.beta, _LEAST_BETA) * (1 + _STEERING * error)

    def _compare(self) -> None:
        """Advantages of GRPO and its variants: one for all tokens of an answer."""
        settings = self.settings
        rewards = np.array([one.reward for one in self.rollouts])
        if settings.overlong == "penalise":
            lengths = np.array([len(one.tokens) for one in self.rollouts])
            rewards = rewards + worth.overlong_penalties(
                lengths,
                longest=settings.max_tokens,
                buffer=min(settings.overlong_buffer, settings.max_tokens),  # type: ignore[arg-type, type-var]
            )
        gains = worth.group_advantages(
            rewards, settings.answers_per_prompt or 1, scaled=bool(settings.scale_advantages)
        )
        for one, gain in zip(self.rollouts, gains.tolist(), strict=True):
            one.advantages = [gain] * len(one.tokens)

    def _value(self) -> None:
        """Advantages and returns of PPO, from rewards a token and the values that were expected."""
        settings = self.settings
        mask = np.zeros((len(self.rollouts), max(len(one.tokens) for one in self.rollouts)), dtype=bool)
        old, log_ref, values = (np.zeros(mask.shape) for _ in range(3))
        rewards = np.array([one.reward for one in self.rollouts])
        for row, one in enumerate(self.rollouts):
            n = len(one.tokens)
            mask[row, :n], old[row, :n], log_ref[row, :n], values[row, :n] = True, one.old, one.reference, one.values
            if settings.overlong == "penalise" and not one.finished:
                rewards[row] -= 1
        each = worth.token_rewards(rewards, old, log_ref, mask, beta=self.numbers["beta"])
        if settings.whiten_rewards:
            each = worth.whitened(each, mask, centred=False)
        gains, returns = worth.generalised_advantages(each, values, mask, gamma=settings.discount, lam=settings.lam)  # type: ignore[arg-type]
        gains = worth.whitened(gains, mask)
        for row, one in enumerate(self.rollouts):
            n = len(one.tokens)
            one.advantages, one.returns = gains[row, :n].tolist(), returns[row, :n].tolist()

    def _batch(self, chosen: Sequence[Rollout]) -> Batch:
        """See `PolicyLoss`."""
        prompts = [self.prompts[one.prompt].tokens for one in chosen]
        examples = [_example(prompt, one.tokens) for prompt, one in zip(prompts, chosen, strict=True)]
        batch = with_places(pad_examples(examples, 2**31 - 1, _MULTIPLE))
        batch["mask"] = batch["targets"] != IGNORE
        if self.settings.overlong == "filter":
            batch["mask"] &= np.array([one.finished for one in chosen])[:, None]
        names = ["old", "advantages"]
        if self.settings.method == "ppo":
            names += ["values", "returns"]
        elif self.beta or self.settings.kl_target:
            names.append("reference")
            batch["beta"] = np.array(self.numbers["beta"], dtype=np.float32)
        for name in names:
            table = np.zeros(batch["targets"].shape, dtype=np.float32)
            for row, (prompt, one) in enumerate(zip(prompts, chosen, strict=True)):
                table[row, len(prompt) - 1 : len(prompt) - 1 + len(one.tokens)] = getattr(one, name)
            batch["old_values" if name == "values" else name] = table
        if self.texts is not None:
            texts = self.texts.next()
            assert texts is not None
            batch |= {f"texts_{name}": array for name, array in with_places(texts).items()}
        return batch


def measure_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: AlignSettings,
    reward: Reward | None,
    seed: int = 0,
) -> dict[str, float]:
    """What one answer to each prompt comes to: reward (where there is one), kl from the reference in nats an answer,
    length in tokens, and the share that is finished. The same seed draws the same answers from the same model.
    """
    completions = answer(model, tokenizer, prompts, settings, seed)
    tokens, asked = [list(one.tokens) for one in completions], [prompt.tokens for prompt in prompts]
    mine = scored(model, asked, tokens, settings.tuning.batch_size)
    with reference(model):
        theirs = scored(model, asked, tokens, settings.tuning.batch_size)
    found = {
        "kl": float(np.mean([sum(a) - sum(b) for (a, _), (b, _) in zip(mine, theirs, strict=True)])),
        "length": float(np.mean([len(one) for one in tokens])),
        "finished": float(np.mean([one.finish_reason == "stop" for one in completions])),
    }
    if reward is None:
        return found
    told = [answered(tokenizer, prompt, one) for prompt, one in zip(prompts, completions, strict=True)]
    return {"reward": float(np.mean(checked(reward, told))), **found}
