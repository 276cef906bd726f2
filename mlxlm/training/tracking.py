"""Reporters for services that draw curves: TensorBoard and Weights & Biases. Neither is imported unless asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxlm.errors import UsageError, nearest
from mlxlm.training.reporters import Reporter


class TensorBoard(Reporter):
    """Scalars for TensorBoard in `folder/tensorboard`.

    Raises UsageError when neither `tensorboardX` nor `torch.utils.tensorboard` is installed.
    """

    def __init__(self, folder: str | Path):
        self._kind, self._folder, self._writer = _tensorboard_writer(), str(Path(folder) / "tensorboard"), None

    def on_start(self, trainer: Any) -> None:
        """Open a file. In a resumed run it says that what came after the checkpoint is not to be shown."""
        first = trainer.progress.step
        self._writer = self._kind(self._folder, purge_step=first + 1 if first else None)

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        """Write every number under train/."""
        self._write("train", metrics)

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """Write every number under valid/."""
        self._write("valid", metrics)

    def on_end(self, trainer: Any) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, group: str, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(f"{group}/{name}", value, metrics["step"])


class WeightsAndBiases(Reporter):
    """Metrics for Weights & Biases; the project is named by WANDB_PROJECT, default "mlxlm".

    folder: of the run; its name is the run's.  Raises UsageError when `wandb` is not installed.
    """

    def __init__(self, folder: str | Path):
        try:
            import wandb
        except ImportError:
            raise UsageError("the reporter 'wandb' needs the package wandb: pip install wandb") from None
        self._wandb, self._folder, self._run = wandb, Path(folder), None

    def on_start(self, trainer: Any) -> None:
        """Begin a run, or go on with the one of this folder."""
        import os

        name = self._folder.resolve().name
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mlxlm"), name=name, id=name, resume="allow",
            dir=str(self._folder), config={"settings": trainer.settings.to_json(), **trainer.config},
        )  # fmt: skip

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        """Log every number under train/."""
        self._log("train", metrics)

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """Log every number under valid/."""
        self._log("valid", metrics)

    def on_end(self, trainer: Any) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()

    def _log(self, group: str, metrics: dict[str, Any]) -> None:
        values = {f"{group}/{name}": value for name, value in metrics.items() if name != "step"}
        self._run.log(values, step=metrics["step"])


REPORTERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def reporter(name: str, folder: str | Path) -> Reporter:
    """A reporter by name. Raises UsageError for an unknown one and for one whose package is missing."""
    if name not in REPORTERS:
        raise UsageError(f"unknown reporter {name!r}{nearest(name, REPORTERS)}")
    return REPORTERS[name](folder)


def _tensorboard_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "the reporter 'tensorboard' needs a package that writes its files: pip install tensorboardX"
            ) from None
    return SummaryWriter
