"""Alignment: from following instructions to what people prefer, or to what can be checked.

settings = AlignSettings(method="dpo", tuning=FinetuneSettings(model="path/or/id", data="folder", adapter_path="run"))
outcome = align(settings, [Console(), MetricsFile("run")])
print(outcome.before["accuracy"], outcome.after["accuracy"])

Losses by themselves are in `preferences` and `policies`; every method goes with every method of fine-tuning.
"""

from mlxlm.alignment.preparation import align, prepare
from mlxlm.alignment.rewards import Answered, Reward, RewardModel, reward_of
from mlxlm.alignment.run import Outcome, Run
from mlxlm.alignment.settings import METHODS, AlignSettings

__all__ = [
    "METHODS",
    "AlignSettings",
    "Answered",
    "Outcome",
    "Reward",
    "RewardModel",
    "Run",
    "align",
    "prepare",
    "reward_of",
]
