"""The settings of an alignment run: those of fine-tuning, and those of the methods."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxlm.errors import ConfigError, UsageError, nearest
from mlxlm.training.finetune import METHOD_PRESETS, FinetuneSettings
from mlxlm.training.yaml_files import of_type, unknown_keys

_ROLLOUTS: dict[str, Any] = {
    "reward": None, "prompts_per_iteration": 16, "answers_per_prompt": 8, "max_tokens": 64, "temperature": 1.0,
    "passes": 1, "clip_low": 0.2, "clip_high": 0.2, "kl_target": 0.0, "normalisation": "sequence", "overlong": "keep",
    "overlong_buffer": 16,
}  # fmt: skip
_GROUPS = {**_ROLLOUTS, "beta": 0.04, "scale_advantages": True, "dynamic_sampling": 0}
_ANSWERS = {"reward": "", "max_tokens": 64}
_REFERENCE = {"reference_cache": "", **_ANSWERS}

# By method: the settings that it has, beside those of fine-tuning, and what they are when nobody says. A reward of None
# must be given.
METHODS: dict[str, dict[str, Any]] = {
    "reward": {"centering": 0.0},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "reference_free": False, **_REFERENCE},
    "ipo": {"beta": 0.1, "means": True, **_REFERENCE},
    "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, **_ANSWERS},
    "orpo": {"beta": 0.1, **_ANSWERS},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **_REFERENCE},
    "ppo": {
        **_ROLLOUTS, "prompts_per_iteration": 64, "answers_per_prompt": 1, "passes": 4, "normalisation": "token",
        "beta": 0.02, "discount": 1.0, "lam": 0.95, "value_weight": 0.1, "value_clip": 0.2, "whiten_rewards": False,
        "ptx_data": "", "ptx_weight": 27.8,
    },
    "grpo": _GROUPS,
    "dr-grpo": {**_GROUPS, "beta": 0.0, "normalisation": "constant", "scale_advantages": False},
    "dapo": {
        **_GROUPS, "beta": 0.0, "normalisation": "token", "clip_high": 0.28, "overlong": "filter", "dynamic_sampling": 3
    },
}  # fmt: skip
FROM_ROLLOUTS = ("ppo", "grpo", "dr-grpo", "dapo")
FROM_PAIRS = ("dpo", "ipo", "simpo", "orpo")
OVERLONG = ("keep", "filter", "penalise")
NORMALISATIONS = ("sequence", "token", "constant")
# Settings of fine-tuning that have no meaning here.
_NOT_HERE = (
    "label_smoothing", "loss_on", "mask_prompt", "chat_template_config", "packing", "exact_match", "sample_tokens",
    "best_by",
)  # fmt: skip
_SLOWER = 0.2  # learning rates are that share of those for fine-tuning


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """How to align.

    method: "reward" (a reward model), "dpo", "ipo", "simpo", "orpo" (from pairs), "kto" (from single answers), "ppo",
    "grpo", "dr-grpo", "dapo" (from rewards of the model's own answers).  tuning: everything that fine-tuning has, its
    method under the name of `fine_tune_type`; batch_size counts comparisons, or answers. The other settings belong to
    some methods, see `METHODS` for which and their defaults, and are None for the rest:

    beta: how strongly the model is held to the reference; lambda of orpo.  label_smoothing: share of pairs that are
    taken to be wrong.  reference_free: dpo without a reference.  gamma: margin of simpo.  means: ipo by log
    probabilities a token.  desirable_weight, undesirable_weight: of kto.  centering: of rewards around 0.
    reference_cache: a folder in which the reference's log probabilities are kept, default the run's own.

    reward: see `rewards.reward_of`; with pairs it is measured only.  prompts_per_iteration, answers_per_prompt,
    max_tokens, temperature: of rollouts.  passes: over each iteration's answers.  clip_low, clip_high, normalisation,
    scale_advantages: see `policies` and `advantages`.  overlong: answers without an end: "keep", "filter" (nothing is
    learned from them) or "penalise" (within `overlong_buffer` tokens of the most).  dynamic_sampling: rounds in which
    prompts whose answers are all worth the same are replaced.  kl_target: nats of divergence an answer; beta is
    steered to stay within them, and what is above them counts against weights when the best are told; 0 for a constant
    beta.

    discount, lam, value_weight, value_clip, whiten_rewards: of ppo's values.  ptx_data, ptx_weight: texts, or rows of
    any kind for fine-tuning, that are learned beside (PPO-ptx), and the weight of their mean loss.
    answers: held-out prompts that are answered at each evaluation, for reward, divergence and length.
    """

    method: str
    tuning: FinetuneSettings
    beta: float | None = None
    label_smoothing: float | None = None
    reference_free: bool | None = None
    gamma: float | None = None
    means: bool | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    centering: float | None = None
    reference_cache: str | None = None
    reward: str | None = None
    prompts_per_iteration: int | None = None
    answers_per_prompt: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    passes: int | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    normalisation: str | None = None
    scale_advantages: bool | None = None
    overlong: str | None = None
    overlong_buffer: int | None = None
    dynamic_sampling: int | None = None
    kl_target: float | None = None
    discount: float | None = None
    lam: float | None = None
    value_weight: float | None = None
    value_clip: float | None = None
    whiten_rewards: bool | None = None
    ptx_data: str | None = None
    ptx_weight: float | None = None
    answers: int = 16

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}{nearest(self.method, METHODS)}")
        mine = METHODS[self.method]
        given = [name for name in OWN if getattr(self, name) is not None]
        foreign = [name for name in given if name not in mine and name != "answers"]
        if foreign:
            raise UsageError(f"{self.method} has no {', '.join(foreign)}; it has {', '.join(mine) or 'no settings'}")
        for name, default in mine.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        problems = [
            f"{name} is {getattr(self, name)!r}; expected {expected}"
            for name, (holds, expected) in self._demands().items()
            if getattr(self, name) is not None and not holds
        ]
        problems += [
            f"{name} is {value}; expected a finite number" for name in OWN if _endless(value := getattr(self, name))
        ]
        if self.from_rollouts and not self.reward:
            problems.append(
                "reward is missing: arithmetic, regex:PATTERN, json-schema:FILE, model:FOLDER or MODULE:FUNC"
            )
        if self.from_rollouts and self.tuning.epochs is not None:
            problems.append("epochs are of rows; give the number of updates as iters")
        if self.answers_per_prompt == 1 and self.method in ("grpo", "dr-grpo", "dapo"):
            problems.append("answers_per_prompt is 1; a group has at least 2 answers to compare")
        if problems:
            raise UsageError("; ".join(problems))

    def _demands(self) -> dict[str, tuple[bool, str]]:
        def at_least(name: str, bound: float) -> bool:
            value = getattr(self, name)
            return value is None or value >= bound

        bounds = {
            "prompts_per_iteration": 1, "answers_per_prompt": 1, "max_tokens": 1, "passes": 1, "overlong_buffer": 1,
            "dynamic_sampling": 0, "kl_target": 0, "clip_low": 0, "clip_high": 0, "value_weight": 0, "ptx_weight": 0,
            "value_clip": 0, "centering": 0, "desirable_weight": 0, "undesirable_weight": 0, "answers": 0, "gamma": 0,
        }  # fmt: skip
        found = {name: (at_least(name, bound), f"at least {bound}") for name, bound in bounds.items()}
        needed = self.method in ("ipo", "simpo", "dpo", "kto")  # these divide by it, or learn nothing without
        found["beta"] = (self.beta is None or self.beta > 0 or (self.beta == 0 and not needed), "a number above 0")
        found["temperature"] = (self.temperature is None or self.temperature > 0, "a number above 0")
        smoothing = self.label_smoothing or 0.0
        found["label_smoothing"] = (0 <= smoothing < 0.5, "a number from 0 to below 0.5")
        for name in ("discount", "lam"):
            value = getattr(self, name)
            found[name] = (value is None or 0 <= value <= 1, "a number from 0 to 1")
        found["overlong"] = (self.overlong in (None, *OVERLONG), ", ".join(OVERLONG))
        found["normalisation"] = (self.normalisation in (None, *NORMALISATIONS), ", ".join(NORMALISATIONS))
        return found

    @property
    def from_rollouts(self) -> bool:
        """Whether the model learns from its own answers."""
        return self.method in FROM_ROLLOUTS

    @property
    def rate(self) -> float:
        """The learning rate at the peak: a fifth of what is usual for fine-tuning, unless it is given."""
        given = self.tuning.learning_rate
        return _SLOWER * METHOD_PRESETS[self.tuning.method]["learning_rate"] if given is None else given

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults included, without those that the method has not."""
        tuning = {name: value for name, value in self.tuning.to_json().items() if name not in _NOT_HERE}
        tuning["fine_tune_type"] = tuning.pop("method")
        own = {name: getattr(self, name) for name in OWN if getattr(self, name) is not None}
        return {"method": self.method, **own, **tuning}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AlignSettings:
        """Settings by name, those of fine-tuning among them. Raises ConfigError for unknown names and wrong types."""
        values = {str(name).replace("-", "_"): value for name, value in values.items()}
        fields = {one.name: str(one.type) for one in dataclasses.fields(cls) if one.name in OWN}
        own = {name: value for name, value in values.items() if name in OWN}
        rest = {name: value for name, value in values.items() if name not in OWN and name != "method"}
        theirs = [one.name for one in dataclasses.fields(FinetuneSettings) if one.name not in (*_NOT_HERE, "method")]
        problems = unknown_keys("", rest, [*theirs, *OWN, "fine_tune_type", "lora_parameters", "lora_layers"])
        for name, value in own.items():
            if not of_type(value, fields[name]):
                problems.append(f"{name} is {value!r}; expected {fields[name].replace('None', 'null')}")
        if "method" not in values:
            problems.append(f"method is missing: {', '.join(METHODS)}")
        if problems:
            raise ConfigError("; ".join(problems))
        own = {
            name: float(value) if "float" in fields[name] and isinstance(value, int) and value is not True else value
            for name, value in own.items()
        }
        return cls(method=values["method"], tuning=FinetuneSettings.from_json(rest), **own)


OWN = tuple(one.name for one in dataclasses.fields(AlignSettings) if one.name not in ("method", "tuning"))


def _endless(value: object) -> bool:
    return isinstance(value, float) and math.isinf(value)
