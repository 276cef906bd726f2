"""The settings of a fine-tuning run: one flat record, whose names are the flags of `mlxlm finetune` and YAML keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxlm.data import LOSS_ON, TRUNCATIONS
from mlxlm.errors import ConfigError, UsageError, nearest
from mlxlm.peft import METHODS, Method
from mlxlm.peft.files import LAYOUTS
from mlxlm.training.finetune.presets import MEMORY_PRESETS, METHOD_PRESETS
from mlxlm.training.yaml_files import of_type, unknown_keys

# What mlx-lm calls otherwise.
_OTHER_NAMES = {"fine_tune_type": "method", "lora_layers": "num_layers"}
# Settings of methods that have a flag of their own.
_OF_METHODS = ("rank", "alpha", "dropout", "targets", "num_tokens")
BEST_BY = ("loss", "accuracy", "f1")
# What a resumed run may have otherwise than it had before.
MAY_CHANGE = (
    "adapter_path", "iters", "epochs", "patience", "steps_per_report", "steps_per_eval", "save_every", "exact_match",
    "test", "report_to", "memory", "format",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How to fine-tune.

    model: a checkpoint directory, .gguf file or hub id.  data: a folder with train.jsonl (valid.jsonl, test.jsonl), a
    file, or what `mlxlm.data.library_rows` reads, such as a data set of the hub.  columns: names that rows are to have,
    with those that they have instead.  adapter_path: the run's folder, where the result goes.
    method: a key of `mlxlm.peft.METHODS`.  rank, alpha, dropout, targets, num_tokens, set: of the method, None for
    its own defaults; `set` takes any of them by name.  num_layers: only the last ones, -1 for all.
    resume_adapter_file: an adapter to begin with.

    iters: updates, or epochs: passes over the data; default 3 epochs.  batch_size, grad_accumulation_steps: rows of a
    pass, passes of an update.  learning_rate: default the method's, see `presets`.  warmup_steps: default a twentieth
    of the updates, at most 100.  The rest as in `TrainSettings`.

    max_seq_length: tokens of an example, default the model's context, at most 2048.  truncation: of longer ones.
    loss_on: "assistant" (all its turns, or the completion), "completion" (the last one alone) or "all".
    chat_template_config: variables of the chat template, such as enable_thinking.  packing:
    several examples a row, which don't see each other.  valid_fraction: of the training rows held out where there is
    no validation file.

    val_batches: batches of an evaluation, -1 for all.  steps_per_eval: updates between evaluations, default a tenth of
    the run, and at least 10.  best_by: what tells the best weights, "loss", and for labels "accuracy" or "f1" (of
    entities where the labels are B- and I- tags, else the mean over the labels).  patience: evaluations without better
    weights after which to stop, 0 never.  save_every: updates between
    checkpoints besides those of evaluations.  test: measure on the test rows at the end, default if there are any.
    samples, sample_tokens: rows that are answered while training and compared at the end, and most tokens of an answer.
    exact_match: rows that are answered at the end to count right answers; default 100 where answers are short, else 0.

    memory: "check" refuses a run that can't fit, "auto" chooses what fits, "low" takes the least, "off".
    quantized: keep quantized weights, default as the method needs.  format: of the adapter on disk, "peft", "mlx",
    "adapters" or "mlxlm", default the first that has a form for the method.
    """

    model: str
    data: str
    columns: dict[str, str] = field(default_factory=dict)
    adapter_path: str = "adapters"
    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] | None = None
    num_tokens: int | None = None
    num_layers: int | None = None
    set: dict[str, Any] = field(default_factory=dict)
    resume_adapter_file: str | None = None
    iters: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    grad_accumulation_steps: int = 1
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup_steps: int | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    max_seq_length: int | None = None
    truncation: str = "cut-right"
    loss_on: str = "assistant"
    chat_template_config: dict[str, Any] = field(default_factory=dict)
    packing: bool = False
    valid_fraction: float = 0.1
    val_batches: int = -1
    steps_per_report: int = 10
    steps_per_eval: int | None = None
    save_every: int = 0
    best_by: str = "loss"
    patience: int = 0
    test: bool | None = None
    samples: int = 3
    sample_tokens: int = 48
    exact_match: int | None = None
    grad_checkpoint: bool = False
    recompute_layers: int = 0
    loss_chunk: int | None = None
    cache_limit: int | None = None
    memory: str = "check"
    dtype: str | None = None
    quantized: bool | None = None
    format: str | None = None
    report_to: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("targets", "report_to"):
            value = getattr(self, name)
            if isinstance(value, (str, list)):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        choices = {
            "method": METHODS, "loss_on": LOSS_ON, "best_by": BEST_BY, "truncation": TRUNCATIONS,
            "memory": MEMORY_PRESETS, **({} if self.format is None else {"format": LAYOUTS}),
        }  # fmt: skip
        problems = [
            f"unknown {name} {getattr(self, name)!r}{nearest(str(getattr(self, name)), known)}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]
        problems += [
            f"{name} is {getattr(self, name)!r}; expected {expected}"
            for name, (holds, expected) in self._demands().items()
            if not holds
        ]
        if self.iters is not None and self.epochs is not None:
            problems.append("iters and epochs are both given; expected one of them")
        if problems:
            raise UsageError("; ".join(problems))
        if "method" not in problems:
            self.peft_method()

    def _demands(self) -> dict[str, tuple[bool, str]]:
        least: dict[str, int] = {
            "iters": 1, "epochs": 1, "batch_size": 1, "grad_accumulation_steps": 1, "max_seq_length": 2,
            "warmup_steps": 0, "val_batches": -1, "steps_per_report": 0, "steps_per_eval": 0, "save_every": 0,
            "patience": 0, "samples": 0, "sample_tokens": 1, "exact_match": 0, "recompute_layers": -1, "loss_chunk": 1,
            "cache_limit": 0, "num_layers": -1,
        }  # fmt: skip
        values = {name: getattr(self, name) for name in least}
        demands = {
            name: (values[name] is None or values[name] >= bound, f"at least {bound}") for name, bound in least.items()
        }
        demands["num_layers"] = (self.num_layers != 0 and demands["num_layers"][0], "a number of layers, or -1 for all")
        demands["val_batches"] = (
            self.val_batches != 0 and demands["val_batches"][0],
            "a number of batches, -1 for all",
        )
        demands["valid_fraction"] = (0 <= self.valid_fraction < 1, "a number from 0 to below 1")
        return demands

    @property
    def frugal(self) -> bool:
        """Whether a run is to take little memory rather than little time."""
        return self.grad_checkpoint or self.recompute_layers != 0 or self.memory in ("auto", "low")

    def peft_method(self) -> Method:
        """The method with its settings. Raises UsageError for settings that it doesn't have, or of a wrong value."""
        kind = METHODS[self.method]
        fields = {one.name: str(one.type) for one in dataclasses.fields(kind)}
        chosen = {name: getattr(self, name) for name in _OF_METHODS if getattr(self, name) is not None}
        if self.num_layers is not None and self.num_layers != -1:
            name = "layers" if "layers" in fields else "num_layers" if self.method == "last-layers" else None
            if name is None:
                raise UsageError(f"num_layers: {self.method} has no choice of layers; leave it out, or use last-layers")
            chosen[name] = self.num_layers
        for name, value in self.set.items():
            if chosen.get(name, value) != value:
                raise UsageError(f"{name} is given twice: {chosen[name]!r}, and {value!r} in set")
            chosen[name] = value
        problems = unknown_keys("", chosen, fields)
        chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
        for name, value in chosen.items():
            if name in fields and "tuple" in fields[name] and isinstance(value, str):
                chosen[name] = (value,)
        if problems:
            raise UsageError(f"{self.method}: " + "; ".join(problems))
        try:
            return kind(**chosen)
        except TypeError as error:
            raise UsageError(f"{self.method}: a setting is of the wrong type ({error})") from None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.adapter_path).expanduser()

    @property
    def rate(self) -> float:
        """The learning rate at the peak."""
        return METHOD_PRESETS[self.method]["learning_rate"] if self.learning_rate is None else self.learning_rate

    @property
    def keeps_quantized(self) -> bool | None:
        """Whether quantized weights stay quantized, None for the device's default."""
        return METHOD_PRESETS[self.method]["quantized"] if self.quantized is None else self.quantized

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults included."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """Settings by name; hyphens are underscores, and names of mlx-lm are understood.

        Raises ConfigError that lists all unknown names and values of a wrong type, UsageError for values.
        """
        values = _understood(values)
        fields = {one.name: str(one.type) for one in dataclasses.fields(cls)}
        problems = unknown_keys("", values, fields)
        problems += [f"{name} is missing" for name in ("model", "data") if values.get(name) is None]
        for name, value in values.items():
            if name in fields and not _fits(value, fields[name]):
                problems.append(f"{name} is {value!r}; expected {_readable_type(fields[name])}")
        if problems:
            raise ConfigError("; ".join(problems))
        return cls(
            **{name: float(value) if _wants_float(fields[name], value) else value for name, value in values.items()}
        )


def _understood(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under our names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        name = str(name).replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        if name in found and found[name] != value:
            raise ConfigError(f"{name} is given twice: {found[name]!r} and {value!r}")
        found[name] = value
    mask = found.pop("mask_prompt", None)
    if mask is not None:
        wanted = "completion" if mask else "all"
        if found.get("loss_on", wanted) != wanted:
            raise ConfigError(f"mask_prompt says loss_on {wanted!r}, but loss_on is {found['loss_on']!r}")
        found["loss_on"] = wanted
    if found.pop("train", True) is not True:
        raise ConfigError("train is false: to measure only, use `mlxlm evaluate`")
    parameters = found.pop("lora_parameters", None)
    if parameters is not None:
        found["set"] = {**_lora_parameters(parameters), **(found.get("set") or {})}
    return found


def _lora_parameters(values: Any) -> dict[str, Any]:
    """mlx-lm's settings of LoRA as ours: its scale is applied as it is, ours is alpha / rank."""
    names = ("rank", "scale", "dropout", "keys")
    if not isinstance(values, Mapping):
        raise ConfigError(f"lora_parameters is {values!r}; expected a mapping with {', '.join(names)}")
    problems = unknown_keys("lora_parameters.", values, names)
    if problems:
        raise ConfigError("; ".join(problems))
    found = {name: values[name] for name in ("rank", "dropout") if name in values}
    if "scale" in values:
        found["alpha"] = float(values["scale"]) * values.get("rank", 8)
    if "keys" in values:
        found["targets"] = list(values["keys"])
    return found


def _fits(value: Any, kind: str) -> bool:
    if "dict" in kind:
        return isinstance(value, dict) and ("Any" in kind or all(isinstance(one, str) for one in value.values()))
    if "tuple" in kind:
        return (
            isinstance(value, str)
            or (isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value))
            or (value is None and "None" in kind)
        )
    return of_type(value, kind)


def _readable_type(kind: str) -> str:
    names = {
        "dict[str, Any]": "a mapping",
        "dict[str, str]": "a mapping of names",
        "tuple[str, ...]": "a list of names",
        "None": "null",
    }
    return " or ".join(names.get(part, part) for part in kind.split(" | "))


def _wants_float(kind: str, value: Any) -> bool:
    return "float" in kind and isinstance(value, int) and not isinstance(value, bool)
