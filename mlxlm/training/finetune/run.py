"""A fine-tuning run from its settings to its result: everything made ready, trained, measured and saved."""

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
import yaml
from mlx import nn

from mlxlm import peft, runtime
from mlxlm.checkpoint import read_json, write_bytes_atomic, write_json_atomic
from mlxlm.distributed import Joined, Mesh, connect
from mlxlm.errors import UnsupportedModelError, UsageError
from mlxlm.generation import entities, head_labels
from mlxlm.models import SequenceHeadSpec, Transformer, load, save, with_classification_head
from mlxlm.peft.files import check_layout
from mlxlm.training import plan as plans
from mlxlm.training.checkpoints import Checkpoints
from mlxlm.training.evaluation import Evaluation, evaluate
from mlxlm.training.finetune import data as rows_of
from mlxlm.training.finetune.answers import (
    Comparison,
    Samples,
    answers,
    askable,
    comparisons,
    exact_matches,
    label_measures,
    shown,
)
from mlxlm.training.finetune.presets import MEMORY_PRESETS
from mlxlm.training.finetune.settings import MAY_CHANGE, FinetuneSettings
from mlxlm.training.finetune.unshared import adapter_folder, unshared
from mlxlm.training.plan_mesh import plan_here
from mlxlm.training.progress import Result
from mlxlm.training.reporters import Reporter
from mlxlm.training.settings import TrainSettings
from mlxlm.training.step import dtype_of
from mlxlm.training.tasks import LabelLoss, WordLoss
from mlxlm.training.trainer import Trainer
from mlxlm.training.yaml_files import read_yaml

if TYPE_CHECKING:
    from mlxlm.data import Rows
    from mlxlm.tokenizers import Tokenizer

Say = Callable[[str], None]
SETTINGS, BEFORE, RESULTS = "finetune.yaml", "before.json", "results.json"
# Settings of methods that are told before a run.
_TOLD = ("rank", "alpha", "dropout", "targets", "layers", "num_tokens", "num_layers", "init", "encoder", "reduction")
_LEAST_APART = 10  # steps between evaluations, unless told otherwise
# Methods that train the head in any case.
_WITH_HEAD = ("full", "last-layers")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    result: of the trainer.  kind: of what was learned.  counts: of parameters.  before, valid, test: measures by name,
    {} where there is none; before is of the validation rows.  rows: answers before and after.
    seconds: of training.  memory: peak, bytes.  settings: as they were used.
    """

    settings: FinetuneSettings
    result: Result
    kind: rows_of.Kind
    counts: peft.Counts
    before: dict[str, float]
    valid: dict[str, float]
    test: dict[str, float]
    rows: list[Comparison]
    seconds: float
    memory: int

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run before its time."""
        return self.result.stopped

    def to_json(self) -> dict[str, Any]:
        """All of it, as results.json has it."""
        return {
            "method": self.settings.method, "model": self.settings.model, "kind": self.kind,
            "reason": self.result.reason, "steps": self.result.step, "best_step": self.result.best_step,
            "train_loss": self.result.loss, "before": self.before, "valid": self.valid, "test": self.test,
            "trainable": self.counts.trainable, "parameters": self.counts.total, "seconds": self.seconds,
            "peak_memory": self.memory, "tokens": self.result.tokens,
            "answers": [dataclasses.asdict(row) for row in self.rows],
        }  # fmt: skip


@dataclass
class Run:
    """A run made ready by `prepare`.

    splits, examples: all rows, and what became of them.  counts: of parameters.  settings: with what the memory plan
    chose.  plan: in bytes, of this process.  joined: the processes that share model and rows; the first writes and
    tells.  method: with what it trains.
    """

    settings: FinetuneSettings
    model: Transformer
    tokenizer: Tokenizer
    splits: dict[str, Rows]
    examples: rows_of.Examples
    counts: peft.Counts
    plan: plans.MemoryPlan
    say: Say
    joined: Joined
    method: peft.Method

    @property
    def train_settings(self) -> TrainSettings:
        """What the trainer is told."""
        wanted, valid = self.settings, "valid" in self.examples.splits
        steps = wanted.iters
        if steps is None:
            source = self.examples.source(wanted)
            steps = math.ceil(source.num_batches(wanted.epochs or 3) / wanted.grad_accumulation_steps)
        every = self._evaluation_interval(steps) if wanted.steps_per_eval is None else wanted.steps_per_eval
        return replace(train_settings(wanted, steps, every if valid else 0, validated=valid), best_by=self._best_by)

    @property
    def _best_by(self) -> str:
        """The measure that tells the best weights, by the name that the trainer knows."""
        wanted, kind = self.settings.best_by, self.examples.kind
        if wanted == "loss":
            return wanted
        if kind not in ("sequence", "tokens") or "valid" not in self.examples.splits:
            raise UsageError(
                f"best_by is {wanted!r}, which is measured of labels on validation rows; here it is the loss"
            )
        if wanted == "accuracy":
            return wanted
        rows = self.examples.measured("valid", self.settings) if kind == "tokens" else []
        found = {label for example in rows for label in example.label if label >= 0}  # type: ignore[union-attr]
        return "entity_f1" if any(entities([self.examples.labels[label]]) for label in found) else "macro_f1"

    def _evaluation_interval(self, steps: int) -> int:
        """A tenth of the run and at least ten steps, or more where an evaluation takes longer than those in between."""
        if "valid" not in self.examples.splits:
            return 0
        batches = self.examples.measuring("valid", self.settings)().num_batches(1)
        passes = self.settings.grad_accumulation_steps
        return min(max(math.ceil(steps / 10), math.ceil(batches / passes), _LEAST_APART), steps)

    def train(self, reporters: Sequence[Reporter] = (), *, resume: bool = False) -> Outcome:
        """Train, take the best weights, measure and save. A signal ends it with a checkpoint and nothing saved."""
        settings, examples = self.settings, self.examples
        asked = self._asked()
        samples = Samples(
            settings.folder,
            lambda: self._answers(asked),
            [self._shown(example)[0] for example in asked],
            self.say if examples.kind in ("words", "seq2seq") else (lambda text: None),
            writes=self.joined.first,
        )
        trainer = self._trainer([*reporters, samples])
        keep_settings(settings.folder, SETTINGS, settings.to_json(), MAY_CHANGE, resume, self.joined.first)
        before = self._before(trainer, asked, resume)
        start = time.perf_counter()
        with contextlib.nullcontext() if settings.memory == "off" else plans.held_to(self.plan):
            result = trainer.run(resume=resume)
        seconds = time.perf_counter() - start
        done = Outcome(
            settings=settings, result=result, kind=examples.kind, counts=self.counts, before=before["valid"], valid={},
            test={}, rows=[], seconds=seconds, memory=runtime.memory().peak,
        )  # fmt: skip
        if done.stopped:
            return done
        self.save()
        wants_test = "test" in examples.splits if settings.test is None else settings.test
        done = replace(
            done,
            valid=self._measures(trainer, "valid") if "valid" in examples.splits else {},
            test=self._measures(trainer, "test", final=True) if wants_test else {},
            rows=comparisons([self._shown(one) for one in asked], before["answers"], self._answers(asked)),
        )
        if self.joined.first:
            write_json_atomic(settings.folder / RESULTS, done.to_json())
        return done

    def save(self) -> None:
        """Write the model's directory, where all of it was trained, or the adapter's; the first of several processes
        does, and the others give it their parts.
        """
        settings, joined = self.settings, self.joined
        if settings.method == "full":
            joined.save(self.model, lambda whole: save(whole, self.tokenizer, settings.folder))
            return
        joined.save(
            self.model,
            lambda whole: peft.save_adapter(whole, settings.folder, layout=settings.format),  # type: ignore[arg-type]
            like=lambda: unshared(self.model, self.method, self.tokenizer, settings.resume_adapter_file),
        )

    def _trainer(self, reporters: Sequence[Reporter]) -> Trainer:
        settings, examples = self.settings, self.examples
        labels = examples.kind in ("sequence", "tokens")
        valid = examples.measuring("valid", settings) if "valid" in examples.splits else None
        return Trainer(
            self.model,
            LabelLoss() if labels else WordLoss(chunk=settings.loss_chunk),
            self.joined.rows(examples.source(settings)),
            self.train_settings,
            settings.folder,
            valid=None if valid is None else (lambda: self.joined.rows(valid())),
            measure=(lambda: self._label_measures("valid")) if labels and valid else None,
            reporters=reporters,
            config=settings.to_json(),
            communicator=self.joined.parallel,
        )

    def _asked(self) -> list[Any]:
        """The rows that are answered before, while and after training."""
        split = next(name for name in ("test", "valid", "train") if name in self.examples.splits)
        return askable(self.examples.splits[split], self.examples.kind, self.settings.samples)

    def _shown(self, example: Any) -> tuple[str, str]:
        row = next(row for rows in self.splits.values() for where, row in rows.rows if where == example.where)
        return shown(self.tokenizer, self.examples.kind, self.examples.labels, example, row)

    def _answers(self, asked: list[Any]) -> list[str]:
        found = self.examples
        with self.joined.serving():
            return answers(self.model, self.tokenizer, found.kind, found.labels, asked, self.settings.sample_tokens)

    def _before(self, trainer: Trainer, asked: list[Any], resume: bool) -> dict[str, Any]:
        """Measures and answers of the model that the run began with; a resumed run has kept them."""
        path = self.settings.folder / BEFORE
        if self.joined.world.share(resume and path.is_file()):
            return read_json(path)
        valid = self._measures(trainer, "valid") if "valid" in self.examples.splits else {}
        found = {"valid": valid, "answers": self._answers(asked)}
        if self.joined.first:
            write_json_atomic(path, found)
        return found

    def _measures(self, trainer: Trainer, split: str, final: bool = False) -> dict[str, float]:
        examples, settings = self.examples, self.settings
        self.say(f"measuring on {len(examples.measured(split, settings))} rows ({split})")
        if examples.kind in ("sequence", "tokens"):
            made, scores = self._label_measures(split)
            return {"loss": made.loss, **scores}
        made = evaluate(trainer.step, self.joined.rows(examples.measuring(split, settings)()))
        trainer.step.give_back(averaged=True)
        found = {"loss": made.loss, "perplexity": made.perplexity}
        if final:
            kind, rows = examples.kind, examples.splits[split]
            with self.joined.serving():
                found |= exact_matches(self.model, self.tokenizer, kind, rows, settings.exact_match, self.say)
        return found

    def _label_measures(self, split: str) -> tuple[Evaluation, dict[str, float]]:
        rows = self.examples.measured(split, self.settings)
        with self.joined.serving():
            return label_measures(self.model, rows, self.examples.labels, self.settings.batch_size)


def train_settings(wanted: FinetuneSettings, steps: int, every: int, *, validated: bool) -> TrainSettings:
    """What the trainer is told.  steps: of the run.  every: so many of them it is evaluated.  validated: whether there
    is validation data, so that the best weights can be told.
    """
    warmup = min(100, steps // 20) if wanted.warmup_steps is None else wanted.warmup_steps
    return TrainSettings(
        steps=steps, accumulation=wanted.grad_accumulation_steps, optimizer=wanted.optimizer,
        learning_rate=wanted.rate, schedule=wanted.schedule, warmup_steps=warmup,
        weight_decay=wanted.weight_decay, clip_norm=wanted.clip_norm, label_smoothing=wanted.label_smoothing,
        ema_decay=wanted.ema_decay, dtype=wanted.dtype,
        recompute_layers=-1 if wanted.grad_checkpoint else wanted.recompute_layers, cache_limit=wanted.cache_limit,
        seed=wanted.seed, evaluate_every=every, val_batches=-1, save_every=wanted.save_every,
        report_every=wanted.steps_per_report, patience=wanted.patience, keep_last=1,
        final_weights="best" if validated else "last",
    )  # fmt: skip


def keep_settings(
    folder: Path, name: str, values: dict[str, Any], may_change: Sequence[str], resume: bool, first: bool = True
) -> None:
    """Write a run's settings into its folder as a YAML file, the first of several processes alone. Raises UsageError
    where a resumed run has others than it began with, but for those that may change.
    """
    if resume:
        then = read_yaml(folder / name, "expected the settings of a run")
        differ = [
            f"{key} was {then.get(key)!r}, is {values[key]!r}"
            for key in values
            if key not in may_change and then.get(key) != values[key]
        ]
        if differ:
            raise UsageError(f"{folder} holds a run with other settings: {'; '.join(differ)}")
    if not first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / name, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def prepare(settings: FinetuneSettings, *, resume: bool = False, say: Say = print, joined: Joined | None = None) -> Run:
    """Everything that a run needs: rows checked, model with head and adapter, memory planned. Nothing is written.

    say: shows a line to a person.  resume: the folder holds a run that is to go on.
    joined: processes that share model and rows, see `Run`.
    Raises an error of `mlxlm.errors` for what can't work, before anything takes long.
    """
    if settings.frugal:
        runtime.small_command_graphs()
    joined = joined or Joined(connect(alone=True), Mesh())
    with joined.world.first_alone():
        check_folder(settings, resume)
    mx.reset_peak_memory()
    splits, said = rows_of.read_rows(settings)
    for text in (*said, *rows_of.passed_over(splits["train"])):
        say(text)
    if settings.test and "test" not in splits:
        raise UsageError(f"{settings.data} has no test rows to measure on; it has {', '.join(splits)}")
    model, tokenizer = load(
        settings.model, dtype=settings.dtype, quantized=settings.keeps_quantized, lazy=not joined.alone
    )  # fmt: skip
    kind = rows_of.kind_of(splits["train"].format, model.config)
    if kind == "seq2seq" and splits["train"].format == "classification":
        say("an encoder-decoder writes the label as its answer")
        splits = {split: rows_of.as_pairs(rows) for split, rows in splits.items()}
    mx.random.seed(settings.seed)
    model, labels = adapted(model, tokenizer, kind, rows_of.names_of_labels(splits, kind), settings, say)
    joined.check(model.config, settings.batch_size)
    examples = rows_of.encode(splits, kind, labels, model, tokenizer, settings)
    counts, method = peft.count_parameters(model), peft.content_of(model).method
    settings, plan = fitted(settings, model, examples, joined)
    run = Run(settings, model, tokenizer, splits, examples, counts, plan, say, joined, method)
    for text in _lines(run):
        say(text)
    joined.share_model(model)
    return run


def finetune(
    settings: FinetuneSettings,
    reporters: Sequence[Reporter] = (),
    *,
    resume: bool = False,
    say: Say = print,
    joined: Joined | None = None,
) -> Outcome:
    """`prepare` and `Run.train` in one."""
    return prepare(settings, resume=resume, say=say, joined=joined).train(reporters, resume=resume)


def check_folder(settings: FinetuneSettings, resume: bool) -> None:
    """Raise UsageError where a run would overwrite another result, or there is none to go on with."""
    folder = settings.folder
    steps = Checkpoints(folder).steps()
    if resume and not steps:
        raise UsageError(f"{folder} holds no run with a checkpoint, so there is nothing to resume")
    if resume:
        return
    if steps:
        raise UsageError(
            f"{folder} holds a run of {steps[-1]} steps: --resume it, or choose another --adapter-path for a new one"
        )
    for name in ("adapter_config.json", "config.json"):
        if (folder / name).is_file():
            raise UsageError(f"{folder} holds a {name} already: choose another --adapter-path")


def adapted(
    model: Transformer,
    tokenizer: Tokenizer,
    kind: rows_of.Kind,
    labels: tuple[str, ...],
    settings: FinetuneSettings,
    say: Say,
) -> tuple[Transformer, tuple[str, ...]]:
    """The model with a head for labels, where there are any, and the adapter of the method, and the labels' names."""
    begun = None if settings.resume_adapter_file is None else adapter_folder(settings.resume_adapter_file)
    if begun is not None:
        model = peft.with_task_head(model, begun)
    mine = head_labels(model) if isinstance(model.config.head, SequenceHeadSpec) == (kind == "sequence") else ()
    if labels and mine and set(labels) <= set(mine):
        labels = mine
    elif labels:
        if begun is not None:
            raise UsageError(
                f"the adapter to begin with has the labels {', '.join(mine)}, the rows {', '.join(labels)}"
            )
        model = with_classification_head(model, kind, labels)  # type: ignore[arg-type]
    if not labels and not model.config.predicts_words:
        raise UnsupportedModelError("the rows ask for words, and this model's head is for labels, or it has none")
    if begun is not None:
        peft.load_adapter(model, begun, trainable=True)
        _check_same_method(peft.content_of(model).method.name, settings.method, begun)
    else:
        method = settings.peft_method()
        if settings.method == "qlora":
            _quantize(model, say)
        saved = method.modules_to_save
        if labels and settings.method not in _WITH_HEAD and saved is not None and "head" not in saved:
            method = replace(method, modules_to_save=(*saved, "head"))
        peft.apply(model, method, tokenizer=tokenizer)
    if settings.method == "full":
        if settings.format is not None:
            raise UsageError("format is of adapters; a model that is trained as a whole is saved as a model")
    else:
        check_layout(model, settings.format)
    return model, labels


def _quantize(model: Transformer, say: Say) -> None:
    """Quantize the linear layers of a float model to 4 bits in memory, as QLoRA has it (arXiv:2305.14314)."""
    if any(hasattr(module, "bits") for module in model.modules()):
        return

    def wanted(path: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and ".layers." in path and module.weight.shape[1] % 64 == 0

    count = sum(wanted(path, module) for path, module in model.named_modules())
    nn.quantize(model, group_size=64, bits=4, class_predicate=wanted)
    if count:
        say(f"this checkpoint is not quantized: {count} linear layers are quantized to 4 bits while training")


def _check_same_method(found: str, wanted: str, folder: Path) -> None:
    selective = ("full", "bitfit", "last-layers")  # one layout on disk
    if found != wanted and not (found in selective and wanted in selective):
        raise UsageError(f"{folder} holds an adapter of method {found}, but the method is {wanted}")


def fitted(
    settings: FinetuneSettings, model: Transformer, examples: rows_of.Examples, joined: Joined
) -> tuple[FinetuneSettings, plans.MemoryPlan]:
    """The settings as their `memory` says, and the plan. Raises MemoryPlanError for a run that can't fit.

    joined: where there are several processes, settings are not chosen, but only checked in each.
    """
    if not joined.alone and settings.memory in ("low", "auto"):
        raise UsageError(f"memory {settings.memory} chooses settings for one process; give them yourself under --mesh")
    if settings.memory == "low":
        preset = dict(MEMORY_PRESETS["low"])
        rows = settings.batch_size * settings.grad_accumulation_steps
        settings = replace(settings, **preset, grad_accumulation_steps=rows // preset["batch_size"])
    dtype = settings.dtype or str(dtype_of(model)).removeprefix("mlx.core.")
    length = examples.max_length if settings.packing else examples.longest
    wanted = plans.PlanSettings(
        batch_size=settings.batch_size, length=length, target_length=examples.longest_target,
        accumulation=settings.grad_accumulation_steps, dtype=dtype, optimizer=settings.optimizer,
        average=settings.ema_decay is not None, chunk=settings.loss_chunk,
        recompute_layers=-1 if settings.grad_checkpoint else settings.recompute_layers,
    )  # fmt: skip
    if not joined.alone:
        return settings, plan_here(model, wanted, joined, refuse=settings.memory == "check")
    if settings.memory == "auto":
        wanted = plans.fit(model, wanted)
        settings = replace(
            settings, batch_size=wanted.batch_size, grad_accumulation_steps=wanted.accumulation, grad_checkpoint=False,
            recompute_layers=wanted.recompute_layers, loss_chunk=wanted.chunk,
        )  # fmt: skip
    if settings.memory == "check":
        return settings, plans.check(model, wanted)
    return settings, plans.predict(model, wanted)


def _lines(run: Run) -> list[str]:
    """What a person should know before the run starts."""
    settings, model, examples, counts = run.settings, run.model, run.examples, run.counts
    method, source, training = peft.content_of(model).method, model.source, run.train_settings
    dtype = str(dtype_of(model)).removeprefix("mlx.core.")
    chosen = {one.name: getattr(method, one.name) for one in dataclasses.fields(method) if one.name in _TOLD}
    told = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in chosen.items() if value)
    head = " and the head" if examples.labels else ""
    layers = "all" if training.recompute_layers < 0 else training.recompute_layers
    again = f", {layers} layers computed again" if layers else ""
    times = f", {training.accumulation} times an update" if training.accumulation > 1 else ""
    epochs = settings.epochs or 3
    length = "" if settings.iters is not None else f" ({epochs} epoch{'s' if epochs > 1 else ''})"
    first, *rest = rows_of.described(run.splits, examples)
    return [
        f"model   {source.path.name}: {source.family.name}, {counts.total / 1e6:.1f}M parameters, {dtype}",
        f"data    {first}",
        *(f"        {line}" for line in rest),
        f"method  {method.name}{f' ({told})' if told else ''}{head}: {counts.trainable:,} parameters are trained "
        f"({counts.share:.2%})",
        f"learns  {training.steps} steps{length}, learning rate {training.learning_rate:g} ({training.schedule}) after "
        f"{training.warmup_steps} of warmup, {settings.batch_size} rows at once{times}",
        f"memory  about {plans.readable(run.plan.peak)} predicted{again}",
    ]


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
