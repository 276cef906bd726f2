"""Training: a compiled step, a loop, exact checkpoints, and reports of what happens.

trainer = Trainer(model, WordLoss(), source, TrainSettings(steps=1000), "runs/first", valid=make_valid_source)
result = trainer.run()                       # or trainer.run(resume=True)
"""

from mlxlm.training.checkpoints import Checkpoints, TrainingState
from mlxlm.training.evaluation import Evaluation, evaluate
from mlxlm.training.optimizers import Optimizer
from mlxlm.training.progress import Progress, Result
from mlxlm.training.reporters import Console, MetricsFile, Reporter, read_metrics
from mlxlm.training.schedules import SCHEDULES, learning_rate_schedule
from mlxlm.training.settings import TrainSettings
from mlxlm.training.step import Outcome, Step
from mlxlm.training.tasks import LabelLoss, Task, WordLoss
from mlxlm.training.trainer import Trainer

__all__ = [
    "SCHEDULES",
    "Checkpoints",
    "Console",
    "Evaluation",
    "LabelLoss",
    "MetricsFile",
    "Optimizer",
    "Outcome",
    "Progress",
    "Reporter",
    "Result",
    "Step",
    "Task",
    "TrainSettings",
    "Trainer",
    "TrainingState",
    "WordLoss",
    "evaluate",
    "learning_rate_schedule",
    "read_metrics",
]
