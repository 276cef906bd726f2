"""An alignment run from its settings to its result: made ready, trained, measured before and after, saved."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlxlm import peft, runtime
from mlxlm.alignment.answering import Prompt, answer, measure_answers
from mlxlm.alignment.comparisons import ComparisonSource
from mlxlm.alignment.measures import measure_comparisons, paced
from mlxlm.alignment.rewards import Reward
from mlxlm.alignment.settings import AlignSettings
from mlxlm.alignment.tasks import AnswerTask, DesirabilityLoss
from mlxlm.checkpoint import read_json, write_json_atomic
from mlxlm.models import Transformer, save
from mlxlm.training import Evaluation, Result, Trainer, TrainSettings
from mlxlm.training import plan as plans
from mlxlm.training.finetune.run import keep_settings, train_settings
from mlxlm.training.finetune.settings import MAY_CHANGE
from mlxlm.training.reporters import Reporter

if TYPE_CHECKING:
    from mlxlm.distributed import Joined
    from mlxlm.tokenizers import Tokenizer

Say = Callable[[str], None]
SETTINGS, BEFORE, RESULTS = "align.yaml", "before.json", "results.json"
_EVALUATIONS = 10  # of a run, unless told otherwise
_LEAST_APART = 10  # steps between evaluations, unless told otherwise
_ITERATIONS = 50  # of rollouts, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    before, after: measures by name.  measured_on: the rows that they are of: "test", where there are none "valid", or
    "train".  answers: prompt, answer before and after.  seconds: of training.  memory: peak, bytes.
    """

    settings: AlignSettings
    result: Result
    counts: peft.Counts
    before: dict[str, float]
    after: dict[str, float]
    measured_on: str
    answers: list[tuple[str, str, str]]
    seconds: float
    memory: int

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its time."""
        return self.result.stopped

    def to_json(self) -> dict[str, Any]:
        """All of it, as results.json has it."""
        return {
            "method": self.settings.method, "fine_tune_type": self.settings.tuning.method,
            "model": self.settings.tuning.model, "reason": self.result.reason, "steps": self.result.step,
            "best_step": self.result.best_step, "measured_on": self.measured_on, "before": self.before,
            "after": self.after,
            "trainable": self.counts.trainable, "parameters": self.counts.total, "seconds": self.seconds,
            "peak_memory": self.memory, "answers": [list(row) for row in self.answers],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a model is measured on.

    split: the rows' name.  count: of comparisons.  comparisons: makes a source of this process's share of them, None
    where there are none.  asked: prompts to answer.
    """

    split: str
    count: int = 0
    comparisons: Callable[[], ComparisonSource] | None = None
    asked: list[Prompt]

    @property
    def told(self) -> str:
        """What there is, for a person."""
        parts = [f"{self.count} comparisons"] if self.comparisons is not None else []
        parts += [f"{len(self.asked)} answers"] if self.asked else []
        return f"{' and '.join(parts)} ({self.split} rows)"


@dataclass
class Run:
    """A run made ready by `prepare`.

    task: the loss.  source: of training.  valid: what the best weights are told by, None without validation rows.
    measured: what is measured before and after.  reward: of answers, None where none is measured.  joined: the
    processes that share all work; the first writes and tells.
    """

    settings: AlignSettings
    model: Transformer
    tokenizer: Tokenizer
    task: AnswerTask
    source: Any
    valid: HeldOut | None
    measured: HeldOut
    reward: Reward | None
    counts: peft.Counts
    plan: plans.MemoryPlan
    say: Say
    joined: Joined

    @property
    def train_settings(self) -> TrainSettings:
        """What the trainer is told."""
        settings, wanted = self.settings, self.settings.tuning
        steps = wanted.iters
        if steps is None and settings.from_rollouts:
            count = (settings.prompts_per_iteration or 1) * (settings.answers_per_prompt or 1)
            batches = math.ceil(count / wanted.batch_size) * (settings.passes or 1)
            steps = math.ceil(_ITERATIONS * batches / wanted.grad_accumulation_steps)
        elif steps is None:
            steps = math.ceil(self.source.num_batches(wanted.epochs or 1) / wanted.grad_accumulation_steps)
        every = wanted.steps_per_eval
        if every is None:
            every = min(max(math.ceil(steps / _EVALUATIONS), _LEAST_APART), steps)
        wanted, validated = replace(wanted, learning_rate=settings.rate), self.valid is not None
        return train_settings(wanted, steps, every if validated else 0, validated=validated)

    def train(self, reporters: Sequence[Reporter] = (), *, resume: bool = False) -> Outcome:
        """Train, take the best weights, measure and save. A signal ends it with a checkpoint and nothing saved."""
        settings, folder = self.settings, self.settings.tuning.folder
        trainer = self._trainer(reporters)
        first = self.joined.first
        keep_settings(folder, SETTINGS, settings.to_json(), (*MAY_CHANGE, "answers"), resume, first)
        before = self._before(resume)
        start = time.perf_counter()
        with contextlib.nullcontext() if settings.tuning.memory == "off" else plans.held_to(self.plan):
            result = trainer.run(resume=resume)
        done = Outcome(
            settings=settings, result=result, counts=self.counts, before=before["measures"], after={},
            measured_on=self.measured.split, answers=[], seconds=time.perf_counter() - start,
            memory=runtime.memory().peak,
        )  # fmt: skip
        if done.stopped:
            return done
        # Saved first: measuring takes time, and what was trained is not to hang on it.
        with self.joined.world.first_alone():
            if first:
                self.save()
        done = replace(done, after=self._measures("after"), answers=[
            (prompt.text, old, new)
            for prompt, old, new in zip(self._shown(), before["answers"], self._answers(), strict=True)
        ])  # fmt: skip
        if first:
            write_json_atomic(folder / RESULTS, done.to_json())
        return done

    def _trainer(self, reporters: Sequence[Reporter]) -> Trainer:
        parallel = self.joined.share_model(self.model)
        if parallel is not None and isinstance(self.task, DesirabilityLoss):
            self.task = replace(self.task, total=lambda array: parallel.data.sum(array, "divergence of kto"))
        valid = self.valid
        return Trainer(
            self.model, self.task, self.source, self.train_settings, self.settings.tuning.folder,
            valid=None if valid is None else (lambda: None),
            measure=None if valid is None else (lambda: self._measure(valid)),
            reporters=reporters, config=self.settings.to_json(), communicator=parallel,
        )  # fmt: skip

    def save(self) -> None:
        """Write the model's directory, where all of it was trained, or the adapter's. The value head is not kept."""
        value_head = self.model.pop("value_head", None)
        try:
            if self.settings.tuning.method == "full":
                save(self.model, self.tokenizer, self.settings.tuning.folder)
            else:
                peft.save_adapter(self.model, self.settings.tuning.folder, layout=self.settings.tuning.format)  # type: ignore[arg-type]
        finally:
            if value_head is not None:
                self.model.value_head = value_head

    def _before(self, resume: bool) -> dict[str, Any]:
        """Measures and answers of the model that the run began with; a resumed run has kept them."""
        path = self.settings.tuning.folder / BEFORE
        kept = read_json(path) if self.joined.first and resume and path.is_file() else None
        kept = self.joined.world.share(kept, "what was measured before")
        if kept is not None:
            return kept
        found = {"measures": self._measures("before"), "answers": self._answers()}
        if self.joined.first:
            write_json_atomic(path, found)
        return found

    def _measures(self, when: str) -> dict[str, float]:
        """All that is measured of the model as it is.  when: for a person, "before" or "after" training."""
        self.say(f"measures {self.measured.told} {when} training")
        made, more = self._measure(self.measured)
        return more if self.settings.from_rollouts else {"loss": made.loss, **more}

    def _measure(self, on: HeldOut) -> tuple[Evaluation, dict[str, float]]:
        """The loss of comparisons, or minus the mean reward of answers to held-out prompts and what divergence is above
        its target, as a share; and further numbers.
        """
        of_answers: dict[str, float] = {}
        processes = self.joined.world.size
        if on.asked:
            told = paced(self.say, "answers", math.ceil(len(on.asked) / processes))
            of_answers = measure_answers(
                self.model, self.tokenizer, on.asked, self.settings, self.reward, self.joined, told
            )
        if self.settings.from_rollouts:
            # Weights farther from the reference than the target are not the best, however much they are rewarded.
            target = self.settings.kl_target
            excess = max(0.0, of_answers["kl"] / target - 1) if target else 0.0
            return Evaluation(excess - of_answers["reward"], len(on.asked)), of_answers
        assert on.comparisons is not None
        told = paced(self.say, "comparisons", math.ceil(on.count / processes))
        made, more = measure_comparisons(self.model, self.task, on.comparisons(), self.joined, told)
        return made, {**more, **of_answers}

    def _shown(self) -> list[Prompt]:
        different = {prompt.tokens: prompt for prompt in self.measured.asked}
        return list(different.values())[: self.settings.tuning.samples]

    def _answers(self) -> list[str]:
        """The likeliest answers to a few prompts, for people."""
        if not self._shown():
            return []
        found = answer(self.model, self.tokenizer, self._shown(), self.settings, 0, greedy=True)
        return [self.tokenizer.decode(list(one.answer)).strip() for one in found]
