"""An alignment run from its settings to its result: made ready, trained, measured before and after, saved."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx import nn

from mlxlm import peft, runtime
from mlxlm.alignment import reference as references
from mlxlm.alignment.comparisons import Comparison, ComparisonSource, comparisons, with_reference
from mlxlm.alignment.measures import measure_comparisons
from mlxlm.alignment.rewards import Reward, reward_of
from mlxlm.alignment.rollouts import Prompt, RolloutSource, answer, encode_prompts, measure_answers
from mlxlm.alignment.settings import FROM_PAIRS, AlignSettings
from mlxlm.alignment.tasks import AnswerTask, DesirabilityLoss, PolicyLoss, PreferenceLoss, RewardLoss
from mlxlm.checkpoint import read_json, write_json_atomic
from mlxlm.data import Encoding, Report, Rows, SupervisedSource, encode_rows, read_splits
from mlxlm.errors import DataError, UsageError
from mlxlm.models import Transformer, load, save
from mlxlm.training import Evaluation, Result, Trainer, TrainSettings
from mlxlm.training import plan as plans
from mlxlm.training.finetune.data import length_limit, read_rows
from mlxlm.training.finetune.run import adapted, check_folder, keep_settings, train_settings
from mlxlm.training.finetune.settings import MAY_CHANGE
from mlxlm.training.finetune.unshared import adapter_folder
from mlxlm.training.reporters import Reporter
from mlxlm.training.step import dtype_of

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

Say = Callable[[str], None]
SETTINGS, BEFORE, RESULTS = "align.yaml", "before.json", "results.json"
REWARD_LABEL = "reward"
_EVALUATIONS = 10  # of a run, unless told otherwise
_ITERATIONS = 50  # of rollouts, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    before, after: measures by name, of the validation rows, or where there are none of the training rows.  answers:
    prompt, answer before and after.  seconds: of training.  memory: peak, bytes.
    """

    settings: AlignSettings
    result: Result
    counts: peft.Counts
    before: dict[str, float]
    after: dict[str, float]
    answers: list[tuple[str, str, str]]
    seconds: float
    memory: int

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its time."""
        return self.result.reason.startswith("SIG")

    def to_json(self) -> dict[str, Any]:
        """All of it, as results.json has it."""
        return {
            "method": self.settings.method, "fine_tune_type": self.settings.tuning.method,
            "model": self.settings.tuning.model, "reason": self.result.reason, "steps": self.result.step,
            "best_step": self.result.best_step, "before": self.before, "after": self.after,
            "trainable": self.counts.trainable, "parameters": self.counts.total, "seconds": self.seconds,
            "peak_memory": self.memory, "answers": [list(row) for row in self.answers],
        }  # fmt: skip


@dataclass
class Run:
    """A run made ready by `prepare`.

    task: the loss.  source: of training.  valid: makes a source of the validation comparisons, None without.  asked:
    held-out prompts.  reward: of answers, None where none is measured.  validated: whether there are
    validation rows, of which the best weights can be told.
    """

    settings: AlignSettings
    model: Transformer
    tokenizer: Tokenizer
    task: AnswerTask
    source: Any
    valid: Callable[[], ComparisonSource] | None
    asked: list[Prompt]
    reward: Reward | None
    counts: peft.Counts
    plan: plans.MemoryPlan
    validated: bool

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
        every = math.ceil(steps / _EVALUATIONS) if wanted.steps_per_eval is None else wanted.steps_per_eval
        wanted = replace(wanted, learning_rate=settings.rate)
        return train_settings(wanted, steps, every if self.validated else 0, validated=self.validated)

    def train(self, reporters: Sequence[Reporter] = (), *, resume: bool = False) -> Outcome:
        """Train, take the best weights, measure and save. A signal ends it with a checkpoint and nothing saved."""
        settings, folder = self.settings, self.settings.tuning.folder
        trainer = Trainer(
            self.model, self.task, self.source, self.train_settings, folder,
            valid=(lambda: None) if self.validated else None, measure=self._measure if self.validated else None,
            reporters=reporters, config=settings.to_json(),
        )  # fmt: skip
        keep_settings(folder, SETTINGS, settings.to_json(), (*MAY_CHANGE, "answers"), resume)
        before = self._before(resume)
        start = time.perf_counter()
        with contextlib.nullcontext() if settings.tuning.memory == "off" else plans.held_to(self.plan):
            result = trainer.run(resume=resume)
        done = Outcome(
            settings=settings, result=result, counts=self.counts, before=before["measures"], after={}, answers=[],
            seconds=time.perf_counter() - start, memory=runtime.memory().peak,
        )  # fmt: skip
        if done.stopped:
            return done
        done = replace(done, after=self._measures(), answers=[
            (prompt.text, old, new)
            for prompt, old, new in zip(self._shown(), before["answers"], self._answers(), strict=True)
        ])  # fmt: skip
        self.save()
        write_json_atomic(folder / RESULTS, done.to_json())
        return done

    def save(self) -> None:
        """Write the model's directory, where all of it was trained, or the adapter's. The value head is not kept."""
        if "value_head" in self.model:
            del self.model.value_head
        if self.settings.tuning.method == "full":
            save(self.model, self.tokenizer, self.settings.tuning.folder)
        else:
            peft.save_adapter(self.model, self.settings.tuning.folder, layout=self.settings.tuning.format)  # type: ignore[arg-type]

    def _before(self, resume: bool) -> dict[str, Any]:
        """Measures and answers of the model that the run began with; a resumed run has kept them."""
        path = self.settings.tuning.folder / BEFORE
        if resume and path.is_file():
            return read_json(path)
        found = {"measures": self._measures(), "answers": self._answers()}
        write_json_atomic(path, found)
        return found

    def _measures(self) -> dict[str, float]:
        """All that is measured of the model as it is."""
        made, more = self._measure()
        return more if self.settings.from_rollouts else {"loss": made.loss, **more}

    def _measure(self) -> tuple[Evaluation, dict[str, float]]:
        """The loss of the validation comparisons, or minus the mean reward of answers to held-out prompts."""
        of_answers: dict[str, float] = {}
        if self.asked:
            of_answers = measure_answers(self.model, self.tokenizer, self.asked, self.settings, self.reward)
        if self.settings.from_rollouts:
            return Evaluation(-of_answers["reward"], len(self.asked)), of_answers
        assert self.valid is not None
        made, more = measure_comparisons(self.model, self.task, self.valid())
        return made, {**more, **of_answers}

    def _shown(self) -> list[Prompt]:
        different = {prompt.tokens: prompt for prompt in self.asked}
        return list(different.values())[: self.settings.tuning.samples]

    def _answers(self) -> list[str]:
        """The likeliest answers to a few prompts, for people."""
        if not self._shown():
            return []
        found = answer(self.model, self.tokenizer, self._shown(), self.settings, 0, greedy=True)
        return [self.tokenizer.decode(list(one.answer)).strip() for one in found]


def prepare(settings: AlignSettings, *, resume: bool = False, say: Say = print) -> Run:
    """Everything that a run needs: rows checked, model with head and adapter, the reference's log probabilities.

    Raises an error of `mlxlm.errors` for what can't work, before anything takes long.
    """
    tuning = settings.tuning
    check_folder(tuning, resume)
    mx.reset_peak_memory()
    reward = reward_of(settings.reward) if settings.reward else None
    splits, said = read_rows(tuning)
    for text in said:
        say(text)
    model, tokenizer = load(tuning.model, dtype=tuning.dtype, quantized=tuning.keeps_quantized)
    mx.random.seed(tuning.seed)
    labels = (REWARD_LABEL,) if settings.method == "reward" else ()
    model, _ = adapted(model, tokenizer, "sequence" if labels else "words", labels, tuning, say)
    if tuning.resume_adapter_file is not None and not labels:
        peft.load_adapter(model, adapter_folder(tuning.resume_adapter_file), name=references.REFERENCE)
        peft.activate(model, "default", trainable=True)
    if settings.from_rollouts:
        run = _from_rollouts(settings, model, tokenizer, splits, reward)
    else:
        run = _from_comparisons(settings, model, tokenizer, splits, reward, say)
    training = run.train_settings
    say(f"method  {settings.method} by {tuning.method}: {run.counts.trainable:,} parameters are trained "
        f"({run.counts.share:.2%})")  # fmt: skip
    say(f"learns  {training.steps} steps, learning rate {training.learning_rate:g}, {tuning.batch_size} "
        f"{'answers' if settings.from_rollouts else 'comparisons'} at once")  # fmt: skip
    say(f"memory  about {plans.readable(run.plan.peak)} predicted")
    return run


def align(
    settings: AlignSettings, reporters: Sequence[Reporter] = (), *, resume: bool = False, say: Say = print
) -> Outcome:
    """`prepare` and `Run.train` in one."""
    return prepare(settings, resume=resume, say=say).train(reporters, resume=resume)


def task_of(settings: AlignSettings) -> AnswerTask:
    """The loss that settings ask for."""
    fields = {name: getattr(settings, name) for name in ("beta", "label_smoothing", "gamma", "reference_free", "means")}
    given = {name: value for name, value in fields.items() if value is not None}
    if settings.method == "reward":
        return RewardLoss(centering=settings.centering or 0.0)
    if settings.method in FROM_PAIRS:
        return PreferenceLoss(method=settings.method, **given)  # type: ignore[arg-type]
    if settings.method == "kto":
        return DesirabilityLoss(
            beta=given["beta"], desirable_weight=settings.desirable_weight,  # type: ignore[arg-type]
            undesirable_weight=settings.undesirable_weight,  # type: ignore[arg-type]
        )  # fmt: skip
    values = {"value_weight": settings.value_weight, "value_clip": settings.value_clip,
              "pretraining_weight": settings.ptx_weight}  # fmt: skip
    return PolicyLoss(
        clip_low=settings.clip_low, clip_high=settings.clip_high, normalisation=settings.normalisation,  # type: ignore[arg-type]
        length=settings.max_tokens, **{name: value for name, value in values.items() if value is not None},
    )  # fmt: skip


def _from_comparisons(
    settings: AlignSettings, model: Transformer, tokenizer: Tokenizer, splits: dict[str, Rows], reward: Reward | None,
    say: Say,
) -> Run:  # fmt: skip
    tuning, task = settings.tuning, task_of(settings)
    _check_rows(settings, splits["train"])
    limit = length_limit(model, tuning.max_seq_length)
    encoding = Encoding(max_length=limit, truncation=tuning.truncation)  # type: ignore[arg-type]
    found: dict[str, list[Comparison]] = {}
    for split, rows in splits.items():
        found[split], report = comparisons(rows, tokenizer, encoding, rewards=settings.method == "reward")
        say(f"data    {_told(split, rows, found[split], report)}")
    answers = max(len(one.answers) for one in found["train"])
    longest = max(len(example.tokens) for one in found["train"] for example in one.answers)
    settings, plan = _planned(settings, model, longest, answers)
    if getattr(task, "needs_reference", False):
        folder = (
            Path(settings.reference_cache).expanduser() if settings.reference_cache else tuning.folder / "reference"
        )
        for split, given in found.items():
            every = [example for one in given for example in one.answers]
            values = references.reference_log_probabilities(model, every, settings.tuning.batch_size * answers, folder)
            found[split] = with_reference(given, values.tolist())
    measured = next(split for split in ("valid", "test", "train") if split in found)
    asked: list[Prompt] = []
    if settings.method != "reward":
        asked = encode_prompts(splits[measured], tokenizer, limit)[: settings.answers]
    epochs = None if tuning.iters is not None else tuning.epochs or 1

    def source(split: str, epochs: int | None, shuffle: bool) -> ComparisonSource:
        return ComparisonSource(
            found[split], settings.tuning.batch_size, max_length=limit, epochs=epochs, shuffle=shuffle,
            seed=tuning.seed,
        )  # fmt: skip

    return Run(
        settings, model, tokenizer, task, source("train", epochs, True), lambda: source(measured, 1, False), asked,
        reward, peft.count_parameters(model), plan, measured == "valid",
    )  # fmt: skip


def _told(split: str, rows: Rows, made: Sequence[Comparison], report: Report) -> str:
    """A line about a split: rows, and what was cut or dropped, or that nothing was."""
    text = f"{split}: {len(made)} comparisons of {len(rows)} rows ({rows.format})"
    if report.cut or report.dropped_long or report.dropped_empty:
        return f"{text}; {report}"
    return f"{text}, longest {report.longest} tokens, nothing cut or dropped"


def _check_rows(settings: AlignSettings, rows: Rows) -> None:
    single = rows.format == "completion"
    if rows.format not in ("preference", "ranking", "completion") or single != (settings.method == "kto"):
        wanted = (
            "prompt, completion and label" if settings.method == "kto" else "prompt, chosen and rejected, or ranked"
        )
        raise DataError(
            f"{settings.method} learns from rows with {wanted}; those of {rows.name} are {rows.format} rows"
        )


def _from_rollouts(
    settings: AlignSettings, model: Transformer, tokenizer: Tokenizer, splits: dict[str, Rows], reward: Reward | None
) -> Run:
    tuning = settings.tuning
    if settings.method == "ppo":
        add_value_head(model)
    room = length_limit(model, tuning.max_seq_length)
    limit = room - (settings.max_tokens or 0)
    if limit < 1:
        raise UsageError(f"max_tokens is {settings.max_tokens}, but prompt and answer have room for {room} tokens")
    found = {split: encode_prompts(rows, tokenizer, limit) for split, rows in splits.items()}
    longest = max(len(prompt.tokens) for prompt in found["train"]) + (settings.max_tokens or 0)
    settings, plan = _planned(settings, model, longest, 1)
    texts = _texts(settings, model, tokenizer) if settings.ptx_data else None
    assert reward is not None
    source = RolloutSource(model, tokenizer, found["train"], reward, settings, texts)
    held_out = found.get("valid") or found.get("test")
    asked = (held_out or found["train"])[: max(settings.answers, 1)]
    return Run(
        settings, model, tokenizer, task_of(settings), source, None, asked, reward, peft.count_parameters(model), plan,
        "valid" in found,
    )  # fmt: skip


def add_value_head(model: Transformer) -> None:
    """Give a decoder `value_head`, which expects 0 everywhere at first, in the dtype of its hidden states."""
    head = nn.Linear(model.config.dim, 1)
    head.weight, head.bias = mx.zeros_like(head.weight), mx.zeros_like(head.bias)
    head.set_dtype(dtype_of(model))
    model.value_head = head


def _texts(settings: AlignSettings, model: Transformer, tokenizer: Tokenizer) -> SupervisedSource:
    """Texts of PPO-ptx: as many a batch as there are answers."""
    limit = length_limit(model, settings.tuning.max_seq_length)
    rows = read_splits(str(Path(settings.ptx_data or "").expanduser()))["train"]
    examples, _ = encode_rows(rows, tokenizer, Encoding(max_length=limit))
    return SupervisedSource(examples, settings.tuning.batch_size, max_length=limit, seed=settings.tuning.seed)


def _planned(
    settings: AlignSettings, model: Transformer, longest: int, answers: int
) -> tuple[AlignSettings, plans.MemoryPlan]:
    """The settings as their `memory` says, and the plan.  answers: of a comparison, each of which is a row.

    Raises MemoryPlanError for a run that can't fit.
    """
    tuning = settings.tuning
    if tuning.memory == "low":
        tuning = replace(
            tuning, batch_size=1, grad_accumulation_steps=tuning.batch_size * tuning.grad_accumulation_steps,
            recompute_layers=-1, cache_limit=0,
        )  # fmt: skip
    if tuning.loss_chunk is not None:
        raise UsageError("loss_chunk has no effect on alignment, which takes the kernel's choice; leave it out")
    wanted = plans.PlanSettings(
        batch_size=tuning.batch_size * answers, length=longest, accumulation=tuning.grad_accumulation_steps,
        dtype=tuning.dtype or str(dtype_of(model)).removeprefix("mlx.core."), optimizer=tuning.optimizer,
        average=tuning.ema_decay is not None,
        recompute_layers=-1 if tuning.grad_checkpoint else tuning.recompute_layers,
    )  # fmt: skip
    if tuning.memory == "auto":
        wanted = plans.fit(model, wanted)
        at_once = max(1, wanted.batch_size // answers)
        times = math.ceil(tuning.batch_size * tuning.grad_accumulation_steps / at_once)
        tuning = replace(
            tuning, batch_size=at_once, grad_accumulation_steps=times, grad_checkpoint=False,
            recompute_layers=wanted.recompute_layers,
        )  # fmt: skip
        wanted = dataclasses.replace(wanted, batch_size=at_once * answers, accumulation=times)
    settings = replace(settings, tuning=tuning)
    return settings, plans.check(model, wanted) if tuning.memory == "check" else plans.predict(model, wanted)
