"""Rollouts: the model's own answers to prompts, what they were worth, and batches to learn from them.

A `RolloutSource` stands where a reader of data does. Whenever its batches are used up it has the model, as it is then,
answer more prompts. What it holds goes into checkpoints, so that a resumed run goes on in the middle of an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxlm.alignment import advantages as worth
from mlxlm.alignment.answering import MULTIPLE, Prompt, answer, answered, example_of, scored
from mlxlm.alignment.log_probabilities import with_places
from mlxlm.alignment.reference import reference
from mlxlm.alignment.rewards import Reward, checked
from mlxlm.alignment.spreading import spread
from mlxlm.data import IGNORE, Batch, SupervisedSource, pad_examples, share_rows
from mlxlm.errors import DataError

if TYPE_CHECKING:
    from mlxlm.alignment.settings import AlignSettings
    from mlxlm.distributed import Joined
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


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


class RolloutSource:
    """Batches of rollouts, endless. A `BatchSource`.

    model: answers as it is whenever answers are needed.  prompts: taken in an order drawn anew for each pass over them.
    texts: for PPO-ptx, an endless source of batches of words.  joined: the processes that share prompts, and then the
    rows of each batch; all of them know all answers.

    numbers: of the newest iteration: reward, kl (nats an answer, the sum over its tokens of log pi - log ref), length,
    finished, beta.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], reward: Reward,
        settings: AlignSettings, joined: Joined, texts: SupervisedSource | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.prompts, self.reward = model, tokenizer, prompts, reward
        self.settings, self.joined, self.texts = settings, joined, texts
        self.epoch, self.num_tokens = 0, 0
        self.iteration, self.beta, self._next_prompt, self._index = 0, float(settings.beta or 0.0), 0, 0
        self.rollouts: list[Rollout] = []
        self._plain: list[dict[str, Any]] = []
        self._order: list[list[int]] = []
        self._shuffled: tuple[int, np.ndarray] = (-1, np.array([]))  # an epoch and its order of prompts
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
            if self._shuffled[0] != self.epoch:
                rng = np.random.default_rng((self.settings.tuning.seed, 3, self.epoch))
                self._shuffled = self.epoch, rng.permutation(len(self.prompts))
            chosen.append(int(self._shuffled[1][place]))
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

        def work(block: range) -> list[tuple[list[int], bool, float]]:
            prompts = [self.prompts[i] for i in chosen[block.start : block.stop]]
            first = (seed + block.start * size) % 2**64  # each answer has a seed of its own
            completions = answer(self.model, self.tokenizer, prompts, self.settings, first, size)
            told = [answered(self.tokenizer, prompts[n // size], one) for n, one in enumerate(completions)]
            rewards = checked(self.reward, told)
            return [(list(c.tokens), one.finished, r) for c, one, r in zip(completions, told, rewards, strict=True)]

        found = spread(self.joined, len(chosen), work, "answers")
        made = [Rollout(chosen[n // size], *one) for n, one in enumerate(found)]
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

        def work(block: range) -> list[tuple[list[float], list[float], list[float]]]:
            part = self.rollouts[block.start : block.stop]
            size = -(-self.settings.tuning.batch_size // self.joined.world.size)
            prompts, answers = [self.prompts[one.prompt].tokens for one in part], [one.tokens for one in part]
            mine = scored(self.model, prompts, answers, size)
            with reference(self.model):
                theirs = scored(self.model, prompts, answers, size)
            return [(log_p, values, log_ref) for (log_p, values), (log_ref, _) in zip(mine, theirs, strict=True)]

        found = spread(self.joined, len(self.rollouts), work, "log probabilities of answers")
        for one, (log_p, values, log_ref) in zip(self.rollouts, found, strict=True):
            one.old, one.values, one.reference = log_p, values, log_ref
        kl = float(np.mean([sum(one.old) - sum(one.reference) for one in self.rollouts]))
        self.numbers = {**self.numbers, "kl": kl, "beta": self.beta}
        if self.settings.kl_target:
            self.beta = worth.steered(self.beta, kl, self.settings.kl_target)

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

    def _batch(self, whole: Sequence[Rollout]) -> Batch:
        """This process's share of a batch, see `PolicyLoss`. Without a row of its own it has one with nothing to learn
        in it, so that it can take the step with all others.
        """
        index, size = self.joined.world.rank, self.joined.world.size
        chosen = list(whole[index::size])
        rows = len(chosen)
        chosen = chosen or [whole[-1]]
        prompts = [self.prompts[one.prompt].tokens for one in chosen]
        examples = [example_of(prompt, one.tokens) for prompt, one in zip(prompts, chosen, strict=True)]
        batch = with_places(pad_examples(examples, 2**31 - 1, MULTIPLE))
        batch["answers"] = np.array(rows, dtype=np.int32)
        learned = [bool(rows) and self._learned(one) for one in chosen]
        batch["mask"] = (batch["targets"] != IGNORE) & np.array(learned)[:, None]
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
        return batch if self.texts is None else {**batch, **self._texts(whole)}

    def _learned(self, one: Rollout) -> bool:
        """Whether anything is learned from an answer."""
        return one.finished or self.settings.overlong != "filter"

    def _texts(self, whole: Sequence[Rollout]) -> Batch:
        """This process's rows of the next texts, and what the sum of their losses is to be multiplied with so that,
        divided by the number that losses of answers are divided by, it is the mean of all processes' texts.
        """
        assert self.texts is not None
        texts = self.texts.next()
        assert texts is not None
        targets = max(int((texts["targets"] != IGNORE).sum()), 1)
        learned = [one for one in whole if self._learned(one)]
        counts = {"token": sum(len(one.tokens) for one in learned), "sequence": len(learned), "constant": len(whole)}
        mine = share_rows(texts, self.joined.world.rank, self.joined.world.size)
        share = np.array(counts[self.settings.normalisation or "token"] / targets, dtype=np.float32)
        return {"texts_share": share} | {f"texts_{name}": array for name, array in with_places(mine).items()}
