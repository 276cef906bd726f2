"""The training loop: batches, steps, evaluation, checkpoints, and an end that loses nothing."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm import runtime
from mlxlm.errors import CheckpointError, DataError, TrainingError, UsageError, listing, nearest
from mlxlm.models import Transformer
from mlxlm.training.checkpoints import Checkpoints, TrainingState
from mlxlm.training.communicator import Communicator
from mlxlm.training.evaluation import Evaluation, EvaluationStopped, evaluate
from mlxlm.training.interruption import Interruption
from mlxlm.training.lock import locked
from mlxlm.training.progress import Clock, Progress, Result
from mlxlm.training.reporters import Reporter
from mlxlm.training.settings import TrainSettings
from mlxlm.training.step import Outcome, Step
from mlxlm.training.tasks import Task

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Begun:
    """A step, perhaps only its graph so far.

    number: of steps before it.  position: of the source after its batches.  tokens: in them.
    """

    number: int
    position: Any
    tokens: int
    outcome: Outcome


class Trainer:
    """Trains what is trainable in a model.

    model: its trainable parameters are updated, whatever chose them.  task: the loss.  source: gives batches, see
    `mlxlm.data`; if it has `metrics()`, these numbers are reported too.  folder: for checkpoints and metrics, None to
    keep nothing.  valid: makes a fresh source over the whole validation data.  reporters: are told what happens.
    save_model: called at the end with the folder `folder/model`, with the (averaged) weights in the model.  measure:
    gives the loss on the validation data and further numbers by name, of the weights in the model, instead of the
    task's own loss.  config: goes into checkpoints as it is.  communicator: other processes that train this model, a
    `mlxlm.distributed.Parallel`; their sources give them different rows, and the first of them reports.

    To take little memory on CUDA, with layers that are computed again, MLX must be told before its first operation,
    which this is too late for: see `mlxlm.runtime.small_command_graphs`. The commands do it.
    """

    def __init__(
        self,
        model: Transformer,
        task: Task,
        source: Any,
        settings: TrainSettings,
        folder: str | Path | None = None,
        *,
        valid: Callable[[], Any] | None = None,
        reporters: Sequence[Reporter] = (),
        save_model: Callable[[Path], None] | None = None,
        measure: Callable[[], tuple[Evaluation, dict[str, float]]] | None = None,
        config: dict[str, Any] | None = None,
        communicator: Communicator | None = None,
    ):
        self.model, self.source, self.settings, self.valid = model, source, settings, valid
        self.folder = None if folder is None else Path(folder)
        self.save_model, self.config = save_model, config or {}
        self.measure = measure
        self.progress = Progress()
        if settings.patience and (valid is None or not settings.evaluate_every):
            raise UsageError("patience needs validation data and evaluate_every")
        if settings.best_by != "loss" and measure is None:
            raise UsageError(f"best_by is {settings.best_by!r}, but only the loss is measured here")
        if settings.final_weights == "best" and (valid is None or folder is None):
            raise UsageError("final_weights 'best' needs validation data and a folder for checkpoints")
        self.step = Step(model, task, settings, communicator)
        self.communicator = self.step.communicator
        first = self.communicator.first
        self.reporters = [reporter for reporter in reporters if first or reporter.everywhere]
        self.checkpoints = None if self.folder is None else self._make_checkpoints(self.folder)
        self._position = source.state()
        self._clock = Clock()
        self._interruption = Interruption()
        self._last_loss: float | None = None
        self._told = -1  # step of the newest report
        self._saved: tuple[int, int] | None = None  # step of the newest checkpoint, and of the evaluation in it

    def _make_checkpoints(self, folder: Path) -> Checkpoints:
        if self.communicator.alone:
            return Checkpoints(folder, self.settings.keep_last)
        from mlxlm.training.checkpoint_pieces import SharedCheckpoints

        def layout() -> dict[str, dict[str, mx.array]]:
            return {**self._parts(), "optimizer": self.step.optimizer.arrays()}

        return SharedCheckpoints(folder, self.settings.keep_last, self.communicator, layout)

    def run(self, *, resume: bool = False, until: int | None = None) -> Result:
        """Train to the last step, or to step `until`.

        resume: go on from the newest whole checkpoint in the folder, exactly as if the run had not stopped. Damaged
        ones after it are told of and renamed.

        Raises UsageError when the folder holds a run and resume is False, TrainingError when gradients stay without
        a finite value, CheckpointError when the last checkpoint can't be written or all that there are are damaged.
        """
        with locked(self.folder if self.communicator.first else None):
            damaged = [] if self.checkpoints is None else self._take_over(self.checkpoints, resume)
            self._tell("on_start", self)
            for problem in damaged:
                self._tell("on_message", f"{problem}; the run goes on from the whole checkpoint before it")
            self._clock = Clock()
            try:
                with Interruption() as self._interruption, _cache_limit(self.settings.cache_limit):
                    reason = self._train(self.settings.steps if until is None else until)
            finally:
                self.step.close()
                self._tell("on_end", self)
        progress = self.progress
        return Result(
            progress.step, reason, self._last_loss, progress.best, progress.best_step, progress.tokens,
            progress.skipped, len(self.step.shapes),
        )  # fmt: skip

    def _take_over(self, checkpoints: Checkpoints, resume: bool) -> list[str]:
        """Take over what the folder holds of a run; what is wrong with checkpoints that had to be passed over."""
        checkpoints.recover()
        found = checkpoints.steps()
        if found and not resume:
            raise UsageError(
                f"{self.folder} holds a run of {found[-1]} steps: resume it, or choose another folder for a new one"
            )
        whole, damaged = checkpoints.newest_whole()
        if whole is None and damaged:
            raise CheckpointError(
                f"{damaged[0]}; no checkpoint of this run is whole, so it can't go on: put the file back from a copy, "
                "or start a new run in another folder (pretrain: --output, finetune and align: --adapter-path)"
            )
        if whole is not None:
            self._restore(whole)
        return damaged

    def _train(self, last: int) -> str:
        """The loop and what follows it; why it ended."""
        try:
            reason = self._loop(last)
            self._tell_interval(last=True)
            if self.valid is not None and reason in ("done", "data") and self.progress.evaluated != self.progress.step:
                self._evaluate()
        except EvaluationStopped:  # the resumed run begins with this evaluation
            reason = signal.Signals(self._signal()).name
            self._tell_interval(last=True)
        if self.checkpoints is not None and self.progress.step not in self.checkpoints.steps():
            self._save(final=True)
        if reason in ("done", "data", "early"):
            self._finish()
        return reason

    def _signal(self) -> int | None:
        """The number of the signal that asks this run to stop, any of its processes."""
        return self.communicator.any_signal(self._interruption.signal)

    def _finish(self) -> None:
        """Put the final weights into the model, the best ones where they are wanted, and save it."""
        best = None if self.checkpoints is None else self.checkpoints.best()
        if self.settings.final_weights == "best" and self.checkpoints is not None and best is not None:
            state = self.checkpoints.load(best)
            self.step.take({part: state.arrays[part] for part in self._parts()})
            why = "validation loss was lowest" if self.settings.best_by == "loss" else f"{self._best_by} was highest"
            self._tell("on_message", f"the weights are those of step {best}, whose {why}")
        self.step.give_back(averaged=True)
        if self.save_model is not None and self.folder is not None:
            self.save_model(self.folder / "model")

    def _parts(self) -> dict[str, dict[str, mx.array]]:
        """The weights and, where one is kept, their average, by the name that they have in checkpoints."""
        average = self.step.average
        return {"parameters": self.step.parameters} | ({} if average is None else {"average": average})

    def evaluate(self) -> Evaluation:
        """Loss over the validation data, `val_batches` of it, with the averaged weights where they are kept."""
        if self.valid is None:
            raise UsageError("there is no validation data to evaluate on")
        source, step = self.valid(), self.progress.step
        batches, _ = self._counts(source)

        def told(done: int) -> None:
            self._tell("on_evaluating", {"step": step, "done": done, "batches": batches})

        return evaluate(self.step, source, lambda: self._signal() is not None, most=batches, told=told)

    def validation_batches(self) -> tuple[int | None, int | None]:
        """Batches of an evaluation, and those that the validation data has; None where nothing says how many, and with
        a measure of the run's own.
        """
        return (None, None) if self.valid is None or self.measure is not None else self._counts(self.valid())

    def _counts(self, source: Any) -> tuple[int | None, int | None]:
        there, most = getattr(source, "batches_per_epoch", None), self.settings.val_batches
        if most < 0:
            return there, there
        return most if there is None else min(most, there), there

    def _loop(self, last: int) -> str:
        settings, progress = self.settings, self.progress
        if self._evaluation_due(progress.step) and progress.evaluated != progress.step and self._evaluate():
            return "early"
        batches, ahead = self._fetch(), None
        while progress.step < min(last, settings.steps):
            if not batches:
                if progress.step == 0:
                    raise DataError("the data has no batch to train on")
                return "data"
            begun = self._begin(batches, progress.step) if ahead is None else ahead
            self._launch(begun)
            # The next batches are made while the device works, and where nothing needs the weights of this step, the
            # graph of the next one. Where there is room for two it is launched, so that the device never waits for it.
            batches = self._fetch() if progress.step + 1 < settings.steps else []
            ahead = self._begin(batches, progress.step + 1) if batches and self._goes_on(last) else None
            if ahead is not None and 2 * mx.get_peak_memory() <= mx.get_memory_limit():
                self._launch(ahead)
            with self.communicator.waiting(f"step {progress.step + 1}"):
                self.step.evaluate_state() if ahead is None else mx.eval(vars(begun.outcome))
            tokens = self.communicator.total(begun.tokens)
            self._position = begun.position
            self._take_in(begun.outcome, tokens)
            if settings.report_every and progress.step % settings.report_every == 0:
                self._tell_interval()
            if ahead is not None:
                continue
            ending = progress.step >= settings.steps or not batches
            if ending:
                self._tell_interval(last=True)
            # At the end too before the checkpoint, which then has what came of it.
            due = self._evaluation_due(progress.step) or (ending and self.valid is not None)
            stop = due and self._evaluate()
            if settings.save_every and progress.step % settings.save_every == 0:
                self._save()
            stopped_by = self._signal()
            if stopped_by is not None:
                return signal.Signals(stopped_by).name
            if stop and not ending:
                return "early"
        return "done" if progress.step >= settings.steps else "until"

    def _begin(self, batches: list[Batch], number: int) -> _Begun:
        """The graph of the step after so many others. The source is at the end of its batches then."""
        return _Begun(number, self.source.state(), _tokens(batches), self.step(batches, self.settings.rate(number)))

    def _launch(self, begun: _Begun) -> None:
        """Let the device work on the step that was begun last, if it doesn't yet."""
        with self.communicator.waiting(f"step {begun.number + 1}"):
            mx.async_eval(self.step.state, vars(begun.outcome))

    def _goes_on(self, last: int) -> bool:
        """Whether the next step follows this one, and nothing between them needs the weights after this one."""
        settings, number = self.settings, self.progress.step + 1
        return (
            self.step.compiled
            and self.communicator.alone
            and settings.accumulation == 1
            and number < min(last, settings.steps)
            and not self._evaluation_due(number)
            and not (settings.save_every and number % settings.save_every == 0)
            and self._signal() is None
        )

    def _evaluation_due(self, number: int) -> bool:
        every = self.settings.evaluate_every
        return self.valid is not None and bool(every) and number > 0 and number % every == 0

    def _fetch(self) -> list[Batch]:
        """The batches of one update; fewer than asked for at the end of the data, so that none is left out."""
        batches: list[Batch] = []
        while len(batches) < self.settings.accumulation:
            batch = self.source.next()
            if batch is None:
                break
            batches.append(batch)
        return batches

    def _take_in(self, outcome: Outcome, tokens: int) -> None:
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.interval_tokens += tokens
        self._clock.tokens += tokens
        progress.norm = outcome.norm.item()
        if outcome.valid.item():
            progress.in_a_row = 0
            progress.targets += outcome.count.item()
            progress.loss += outcome.loss.item()
            progress.count += outcome.count.item()
            return
        progress.skipped += 1
        progress.in_a_row += 1
        why = "no target in the batch" if outcome.count.item() == 0 else f"gradient norm {progress.norm}"
        self._tell("on_message", f"step {progress.step}: update skipped ({why})")
        if progress.in_a_row > self.settings.max_skipped:
            raise TrainingError(
                f"{progress.in_a_row} updates in a row had to be skipped ({why}) up to step {progress.step}: lower "
                "learning_rate, set clip_norm, or look at the data there"
            )

    def _tell_interval(self, last: bool = False) -> None:
        """Report the steps since the last report. The sums go on after a last one, so that a resumed run has them."""
        progress = self.progress
        if progress.interval_tokens == 0 or self._told == progress.step:
            return
        self._told = progress.step
        speed = self._clock.lap()
        loss = progress.loss / progress.count if progress.count else math.nan
        self._last_loss = loss
        self._tell("on_metrics", {
            "step": progress.step,
            "loss": loss,
            "learning_rate": self.settings.rate(max(progress.step - 1, 0)),
            "gradient_norm": progress.norm,
            "tokens": progress.tokens,
            "tokens_per_second": speed,
            "memory": runtime.memory().peak,
            "skipped": progress.skipped,
            **(self.source.metrics() if hasattr(self.source, "metrics") else {}),
        })  # fmt: skip
        if not last:
            progress.loss, progress.count, progress.interval_tokens = 0.0, 0, 0

    def _evaluate(self) -> bool:
        """Measure, keep the best; whether patience has run out."""
        started, progress = time.perf_counter(), self.progress
        result, more = self._measured()
        progress.evaluated = progress.step
        metrics = {"valid_loss": result.loss, "perplexity": result.perplexity, "count": result.count}
        with self.step.held():
            self._tell("on_evaluation", {"step": progress.step, **metrics, **more})
        if self._is_better(result.loss, more):
            progress.best, progress.best_step, progress.stale = result.loss, progress.step, 0
            progress.best_measure = more.get(self.settings.best_by)
            if self.checkpoints is not None and self._save():
                self.checkpoints.mark_best(progress.step, result.loss)
        else:
            progress.stale += 1
        self._clock.paused += time.perf_counter() - started
        return bool(self.settings.patience) and progress.stale >= self.settings.patience

    @property
    def _best_by(self) -> str:
        return self.settings.best_by.replace("_", " ")

    def _is_better(self, loss: float, measures: dict[str, float]) -> bool:
        """Whether these weights are better than the best so far: by the measure that is named, then by the loss."""
        progress, by = self.progress, self.settings.best_by
        if by != "loss" and by not in measures:
            raise UsageError(f"best_by is {by!r}, which is not measured here{nearest(by, ['loss', *measures])}")
        if progress.best is None or progress.best_measure is None:
            return progress.best is None or loss < progress.best
        return (-measures[by], loss) < (-progress.best_measure, progress.best)

    def _measured(self) -> tuple[Evaluation, dict[str, float]]:
        """The loss on the validation data and further numbers, of the (averaged) weights."""
        if self.measure is None:
            return self.evaluate(), {}
        with self.step.held(averaged=True):
            return self.measure()

    def _save(self, final: bool = False) -> bool:
        """Write a checkpoint. A disk that refuses ends the run only at its end; before, the next one may succeed."""
        if self.checkpoints is None:
            return False
        state = self.progress.step, self.progress.evaluated
        if state == self._saved:
            return True
        started = time.perf_counter()
        try:
            self.checkpoints.save(self.progress.step, self._state())
            self._saved = state
            self.checkpoints.prune()
        except (CheckpointError, OSError) as error:
            if final:
                raise
            self._tell("on_message", f"step {self.progress.step}: no checkpoint ({error}); training goes on")
            return False
        finally:
            self._clock.paused += time.perf_counter() - started
        return True

    def _state(self) -> TrainingState:
        return TrainingState(
            {**self._parts(), "optimizer": self.step.optimizer.arrays()},
            {
                "step": self.progress.step,
                "progress": vars(self.progress),
                "position": self._position,
                "random": self.communicator.random_states(np.array(mx.random.state[0]).tolist()),
                "settings": self.settings.to_json(),
                "config": self.config,
            },
        )

    def _restore(self, number: int) -> None:
        """Take over a checkpoint. Raises CheckpointError when it is another model's or another optimizer's."""
        assert self.checkpoints is not None
        state = self.checkpoints.load(number)
        for part, mine in self._parts().items():
            given = state.arrays.get(part, {})
            unlike = sorted(
                name for name in {*mine, *given}
                if name not in mine or name not in given or mine[name].shape != given[name].shape
            )  # fmt: skip
            if unlike:
                raise CheckpointError(
                    f"{self.checkpoints.path(number)} is of another model or other settings; {part} that differ: "
                    f"{listing(unlike, 5)}"
                )
        self.step.take({part: state.arrays[part] for part in self._parts()})
        self.step.optimizer.restore(state.arrays["optimizer"])
        self.step.give_back()
        self.progress = Progress(**state.values["progress"])
        self._saved = self.progress.step, self.progress.evaluated
        self._position = state.values["position"]
        self.source.restore(self._position)
        mx.random.state[0][:] = mx.array(self.communicator.random_state(state.values["random"]), dtype=mx.uint32)
        self.checkpoints.set_aside_after(number)
        best = self.progress.best_step
        if best is not None and best in self.checkpoints.steps() and self.checkpoints.best() != best:
            self.checkpoints.mark_best(best, self.progress.best)  # the run ended between the checkpoint and its mark

    def _tell(self, event: str, value: Any) -> None:
        for reporter in self.reporters:
            getattr(reporter, event)(value)


@contextlib.contextmanager
def _cache_limit(limit: int | None) -> Iterator[None]:
    """MLX's limit of the cache of freed buffers, in bytes, set for a while and then put back; None leaves it."""
    if limit is None:
        yield
        return
    before = mx.set_cache_limit(limit)
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def _tokens(batches: Sequence[Batch]) -> int:
    """Tokens read in some batches, padding left out where lengths say what it is."""
    return sum(int(batch["key_lengths"].sum()) if "key_lengths" in batch else batch["tokens"].size for batch in batches)
