"""What comes before an alignment run: settings checked, rows read and encoded, the model with its head and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx import nn

from mlxlm import peft, runtime
from mlxlm.alignment import reference as references
from mlxlm.alignment.answering import Prompt, encode_prompts
from mlxlm.alignment.comparisons import Comparison, ComparisonSource, Lost, comparisons, with_reference
from mlxlm.alignment.measures import paced
from mlxlm.alignment.plan import Sizes, planned
from mlxlm.alignment.rewards import Reward, reward_of
from mlxlm.alignment.rollouts import RolloutSource
from mlxlm.alignment.run import HeldOut, Outcome, Run, Say
from mlxlm.alignment.settings import FROM_PAIRS, AlignSettings
from mlxlm.alignment.tasks import AnswerTask, DesirabilityLoss, PolicyLoss, PreferenceLoss, RewardLoss
from mlxlm.data import Encoding, Example, Rows, SupervisedSource, encode_rows, read_splits
from mlxlm.distributed import Joined, Mesh, connect
from mlxlm.errors import DataError, UsageError
from mlxlm.models import Transformer, load
from mlxlm.training import plan as plans
from mlxlm.training.finetune.data import length_limit, read_rows
from mlxlm.training.finetune.run import adapted, check_folder
from mlxlm.training.finetune.unshared import adapter_folder
from mlxlm.training.reporters import Reporter
from mlxlm.training.step import dtype_of

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

REWARD_LABEL = "reward"


def prepare(settings: AlignSettings, *, resume: bool = False, say: Say = print, joined: Joined | None = None) -> Run:
    """Everything that a run needs: rows checked, model with head and adapter, the reference's log probabilities.

    joined: processes that share the rows of every batch and the prompts of every iteration, see `Run`.
    Raises an error of `mlxlm.errors` for what can't work, before anything takes long.
    """
    tuning = settings.tuning
    if tuning.frugal:
        runtime.small_command_graphs()
    joined = joined or Joined(connect(alone=True), Mesh())
    with joined.world.first_alone():
        check_folder(tuning, resume)
    _check(settings, joined)
    mx.reset_peak_memory()
    reward = reward_of(settings.reward) if settings.reward else None
    texts = read_splits(str(Path(settings.ptx_data).expanduser()))["train"] if settings.ptx_data else None
    splits, said = read_rows(tuning)
    for text in said:
        say(text)
    if not settings.from_rollouts:
        _check_rows(settings, splits["train"])
    model, tokenizer = load(tuning.model, dtype=tuning.dtype, quantized=tuning.keeps_quantized)
    mx.random.seed(tuning.seed)
    labels = (REWARD_LABEL,) if settings.method == "reward" else ()
    model, _ = adapted(model, tokenizer, "sequence" if labels else "words", labels, tuning, say)
    if tuning.resume_adapter_file is not None and not labels:
        peft.load_adapter(model, adapter_folder(tuning.resume_adapter_file), name=references.REFERENCE)
        peft.activate(model, "default", trainable=True)
    parts = _Parts(settings, model, tokenizer, splits, reward, say, joined)
    run = _from_rollouts(parts, texts) if settings.from_rollouts else _from_comparisons(parts)
    training, tuning = run.train_settings, run.settings.tuning
    say(f"method  {settings.method} by {tuning.method}: {run.counts.trainable:,} parameters are trained "
        f"({run.counts.share:.2%})")  # fmt: skip
    say(f"learns  {training.steps} steps, learning rate {training.learning_rate:g}, {tuning.batch_size} "
        f"{'answers' if settings.from_rollouts else 'comparisons'} at once")  # fmt: skip
    say(f"memory  about {plans.readable(run.plan.peak)} predicted")
    return run


def align(
    settings: AlignSettings, reporters: Sequence[Reporter] = (), *, resume: bool = False, say: Say = print,
    joined: Joined | None = None,
) -> Outcome:  # fmt: skip
    """`prepare` and `Run.train` in one."""
    return prepare(settings, resume=resume, say=say, joined=joined).train(reporters, resume=resume)


def _check(settings: AlignSettings, joined: Joined) -> None:
    """Raise an error for settings that can't work, before rows or models are read."""
    tuning = settings.tuning
    if tuning.loss_chunk is not None:
        raise UsageError("loss_chunk has no effect on alignment, which takes the kernel's choice; leave it out")
    if tuning.method == "full" and tuning.format is not None:
        raise UsageError("format is of adapters; a model that is trained as a whole is saved as a model")
    if tuning.resume_adapter_file is not None:
        folder = adapter_folder(tuning.resume_adapter_file)
        if not (folder / "adapter_config.json").is_file():
            raise UsageError(f"resume_adapter_file is {tuning.resume_adapter_file}; expected an adapter's folder")
    tuning.peft_method()  # raises for settings that the method has not
    processes = joined.world.size
    if processes > 1 and tuning.memory in ("low", "auto"):
        raise UsageError(f"memory {tuning.memory} chooses settings for one process; give them yourself under --mesh")
    if tuning.batch_size < processes:
        raise UsageError(
            f"a batch of {tuning.batch_size} can't be shared by {processes} processes: --batch-size is that of all "
            f"together, at least {processes}"
        )


@dataclass(frozen=True)
class _Parts:
    """What a run is made of."""

    settings: AlignSettings
    model: Transformer
    tokenizer: Tokenizer
    splits: dict[str, Rows]
    reward: Reward | None
    say: Say
    joined: Joined


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


def _from_comparisons(parts: _Parts) -> Run:
    settings, model, joined = parts.settings, parts.model, parts.joined
    tuning, task = settings.tuning, task_of(settings)
    limit = length_limit(model, tuning.max_seq_length)
    encoding = Encoding(max_length=limit, truncation=tuning.truncation)  # type: ignore[arg-type]
    found: dict[str, list[Comparison]] = {}
    for split, rows in parts.splits.items():
        found[split], lost = comparisons(rows, parts.tokenizer, encoding, rewards=settings.method == "reward")
        parts.say(f"data    {_told(split, rows, found[split], lost)}")
    answers = max(len(one.answers) for one in found["train"])
    longest = max(len(example.tokens) for one in found["train"] for example in one.answers)
    settings, plan = planned(settings, model, Sizes(length=longest, answers=answers), joined.world.size)
    if getattr(task, "needs_reference", False):
        found = _with_reference(parts, found, settings.tuning.batch_size * answers)
    measured = next(split for split in ("test", "valid", "train") if split in found)
    epochs = None if tuning.iters is not None else tuning.epochs or 1

    def source(split: str, epochs: int | None, shuffle: bool) -> ComparisonSource:
        return ComparisonSource(
            found[split], settings.tuning.batch_size, max_length=limit, epochs=epochs, shuffle=shuffle,
            seed=tuning.seed, share=(joined.world.rank, joined.world.size),
        )  # fmt: skip

    def held_out(split: str) -> HeldOut:
        asked: list[Prompt] = []
        if settings.method != "reward":
            asked = encode_prompts(parts.splits[split], parts.tokenizer, limit)[: settings.answers]
        return HeldOut(
            split=split, count=len(found[split]), comparisons=lambda: source(split, 1, False), asked=asked
        )  # fmt: skip

    return Run(
        settings, model, parts.tokenizer, task, source("train", epochs, True),
        held_out("valid") if "valid" in found else None, held_out(measured), parts.reward,
        peft.count_parameters(model), plan, parts.say, joined,
    )  # fmt: skip


def _with_reference(parts: _Parts, found: dict[str, list[Comparison]], batch_size: int) -> dict[str, list[Comparison]]:
    """The comparisons of all splits with what the reference thinks of their answers."""
    settings = parts.settings
    cache = settings.reference_cache
    folder = Path(cache).expanduser() if cache else settings.tuning.folder / "reference"
    made = {}
    for split, given in found.items():
        every: list[Example] = [example for one in given for example in one.answers]
        told = paced(parts.say, f"reference: answers of {split} rows", -(-len(every) // parts.joined.world.size))
        values = references.reference_log_probabilities(parts.model, every, batch_size, parts.joined, folder, told)
        made[split] = with_reference(given, values.tolist())
    return made


def _told(split: str, rows: Rows, made: Sequence[Comparison], lost: Lost) -> str:
    """A line about a split: rows, and what was cut or dropped, or that nothing was."""
    text = f"{split}: {len(made)} comparisons of {len(rows)} rows ({rows.format})"
    same = f"{lost.same} left out, as answers of theirs are the same" if lost.same else ""
    report = lost.report
    if report.cut or report.dropped_long or report.dropped_empty:
        return "; ".join(part for part in (text, str(report), same) if part)
    return f"{text}, longest {report.longest} tokens, {same or 'nothing cut or dropped'}"


def _check_rows(settings: AlignSettings, rows: Rows) -> None:
    single = rows.format == "completion"
    if rows.format not in ("preference", "ranking", "completion") or single != (settings.method == "kto"):
        wanted = (
            "prompt, completion and label" if settings.method == "kto" else "prompt, chosen and rejected, or ranked"
        )
        raise DataError(
            f"{settings.method} learns from rows with {wanted}; those of {rows.name} are {rows.format} rows"
        )


def _from_rollouts(parts: _Parts, rows: Rows | None) -> Run:
    settings, model, tokenizer = parts.settings, parts.model, parts.tokenizer
    tuning = settings.tuning
    if settings.method == "ppo":
        add_value_head(model)
    room = length_limit(model, tuning.max_seq_length)
    limit = room - (settings.max_tokens or 0)
    if limit < 1:
        raise UsageError(f"max_tokens is {settings.max_tokens}, but prompt and answer have room for {room} tokens")
    found = {split: encode_prompts(rows, tokenizer, limit) for split, rows in parts.splits.items()}
    longest = max(len(prompt.tokens) for prompt in found["train"]) + (settings.max_tokens or 0)
    beside: list[Example] = []
    if rows is not None:  # texts of PPO-ptx: as many a batch as there are answers
        beside, _ = encode_rows(rows, tokenizer, Encoding(max_length=room))
    texts_length = max((len(example.tokens) for example in beside), default=0)
    settings, plan = planned(
        settings, model, Sizes(length=longest, texts_length=texts_length), parts.joined.world.size
    )  # fmt: skip
    texts = None
    if beside:
        texts = SupervisedSource(beside, settings.tuning.batch_size, max_length=room, seed=tuning.seed)
    assert parts.reward is not None
    source = RolloutSource(model, tokenizer, found["train"], parts.reward, settings, parts.joined, texts)

    def held_out(split: str) -> HeldOut:
        return HeldOut(split=split, asked=found[split][: max(settings.answers, 1)])

    measured = next(split for split in ("test", "valid", "train") if split in found)
    return Run(
        settings, model, tokenizer, task_of(settings), source, held_out("valid") if "valid" in found else None,
        held_out(measured), parts.reward, peft.count_parameters(model), plan, parts.say, parts.joined,
    )  # fmt: skip


def add_value_head(model: Transformer) -> None:
    """Give a decoder `value_head`, which expects 0 everywhere at first, in the dtype of its hidden states."""
    head = nn.Linear(model.config.dim, 1)
    head.weight, head.bias = mx.zeros_like(head.weight), mx.zeros_like(head.bias)
    head.set_dtype(dtype_of(model))
    model.value_head = head
