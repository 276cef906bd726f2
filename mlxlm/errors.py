"""What can go wrong through a user's input: one clear line each.

Every error below is a `ValueError` whose text says what was wrong, what was expected and the nearest valid
choice. The command line prints that text and exits with status 2; a traceback means a bug in mlxlm itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MlxlmError(ValueError):
    """Base of all errors that a user's input can cause. exit_status: of the command line that meets one."""

    exit_status = 2


class ModelNotFoundError(MlxlmError):
    """The path or hub id names no model: nothing there, no config.json, no weights, or not reachable."""


class UnsupportedModelError(MlxlmError):
    """The model is a model, but of an architecture, head or feature that mlxlm does not implement."""


class ConfigError(MlxlmError):
    """A configuration has an unknown key, a missing key, or a value outside its domain."""


class CheckpointError(MlxlmError):
    """A weight file is truncated, malformed, or of a type that can't be read."""


class WeightsError(MlxlmError):
    """Weights don't fit the model: missing, unexpected or of another shape. All of them are listed."""


class TokenizerError(MlxlmError):
    """A tokenizer file is missing, malformed or unknown, or a chat template can't be rendered."""


class PromptError(MlxlmError):
    """A prompt is empty or longer than the model's context."""


class SamplingError(MlxlmError):
    """A sampling parameter is outside its domain."""


class DataError(MlxlmError):
    """A data file has a row that can't be used; the text names file and line."""


class TrainingError(MlxlmError):
    """A training run can't go on: its gradients are no numbers, or its folder holds another run."""


class DistributedError(MlxlmError):
    """A process of a distributed run died, hangs or does not do what the others do; the text names its rank.

    The command line ends with `exit_status`, so that whoever started the processes can start them again.
    """

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: it may well succeed the next time


class AttentionError(MlxlmError):
    """Attention was called with shapes or options that are wrong, or that the forced implementation can't serve."""


class UsageError(MlxlmError):
    """A command-line flag or a function argument is wrong in itself or contradicts another one."""


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """A hint such as "; did you mean 'gelu'?", or the whole list of choices when nothing is close.

    name: what was given.  choices: what is valid.  limit: how many near choices to name, default 3.
    """
    names = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(name), names, n=limit, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(choice) for choice in close) + "?"
    if names:
        return "; valid: " + listing(names, 20)
    return ""


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names joined with commas, at most `limit` of them, then how many more there are."""
    names = list(names)
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
