"""The reference: the model that training began with, and what it thinks of answers.

Nothing is copied for it: with an adapter it is the base with the adapter off, and where all weights are trained the
arrays that they had before are still there. An adapter that training goes on with is loaded once more, at rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxlm import peft
from mlxlm.alignment.log_probabilities import answer_log_probabilities, with_places
from mlxlm.alignment.spreading import spread
from mlxlm.checkpoint import open_safetensors, save_safetensors
from mlxlm.data import Example, pad_examples
from mlxlm.errors import MlxlmError
from mlxlm.training.finetune.answers import untouched_chance

if TYPE_CHECKING:
    from mlxlm.distributed import Joined
    from mlxlm.models import Transformer

REFERENCE = "reference"  # name of the adapter that the reference has, where it has one
_SAMPLE = 4096  # values of each array that a fingerprint reads


@contextmanager
def reference(model: Transformer) -> Iterator[None]:
    """The model as it was before training, in evaluation mode; afterwards as it is, trainable parts included."""
    adapters = model.adapters
    trained, value_head = dict(adapters.active), getattr(model, "value_head", None)
    with untouched_chance(model):
        peft.activate(model, REFERENCE if REFERENCE in adapters.known else None)
        try:
            yield
        finally:
            peft.activate(model, trained, trainable=True)
            if value_head is not None:
                value_head.unfreeze()


def log_probabilities(
    model: Transformer, answers: Sequence[Example], batch_size: int, told: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """log p of each answer by the model as it is, (N,) float32, read in batches of like length.

    told: is given how many are done.
    """
    found = np.zeros(len(answers), dtype=np.float32)
    order = sorted(range(len(answers)), key=lambda index: len(answers[index].tokens))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = with_places(pad_examples([answers[index] for index in part], 2**31 - 1))
        found[part] = np.array(answer_log_probabilities(model, {k: mx.array(v) for k, v in batch.items()}))
        told(start + len(part))
    return found


def reference_log_probabilities(
    model: Transformer,
    answers: Sequence[Example],
    batch_size: int,
    joined: Joined,
    folder: Path | None = None,
    told: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """log p of each answer by the reference, (N,) float32. The processes of a run do a part each.

    folder: where they are kept, in a file named by a fingerprint of the model and the answers, and looked up first, by
    the first process alone.  told: is given how many of this process's part are done.
    """
    with reference(model):
        stem = "" if folder is None else f"reference-{fingerprint(model, answers)}"
        kept = None
        if folder is not None and joined.first:
            kept = _kept(folder / f"{stem}.safetensors", len(answers))
        kept = joined.world.share(None if kept is None else kept.tolist(), "the reference's log probabilities on disk")
        if kept is not None:
            return np.array(kept, dtype=np.float32)

        def work(block: range) -> list[float]:
            return log_probabilities(model, answers[block.start : block.stop], batch_size, told).tolist()

        every = spread(joined, len(answers), work, "the reference's log probabilities")
        found = np.array(every, dtype=np.float32)
    if folder is not None and joined.first:
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(folder, {"log_probabilities": mx.array(found)}, stem=stem)
    return found


def _kept(path: Path, count: int) -> np.ndarray | None:
    """What a file holds, None where there is none that is whole."""
    if not path.is_file():
        return None
    try:
        found = np.array(open_safetensors(path).load()["log_probabilities"])
    except (MlxlmError, KeyError):
        return None
    return found if found.shape == (count,) else None


def fingerprint(model: Transformer, answers: Sequence[Example]) -> str:
    """A hash of a model's weights, as they are now, and of answers: 32 hexadecimal digits. Adapters at rest don't
    count.

    Of each array the name, shape and dtype, the sum of all values and of their squares, and up to 4,096 values.
    """
    hashed = hashlib.blake2b(digest_size=16)
    resting = [f"adapters.{name}." for name in model.adapters.known if name not in model.adapters.active]
    for name, array in sorted(tree_flatten(model.parameters())):
        if any(part in name for part in resting):
            continue
        flat = array.reshape(-1)
        step = max(1, flat.size // _SAMPLE)
        values = flat.astype(mx.float32)
        numbers = mx.concatenate([mx.stack([values.sum(), values.square().sum()]), values[::step]])
        hashed.update(f"{name} {array.shape} {array.dtype}".encode() + np.array(numbers).tobytes())
    for answer in answers:
        hashed.update(np.array([len(answer.tokens), *answer.tokens], dtype=np.int32).tobytes())
        hashed.update(np.array(answer.scored, dtype=np.uint8).tobytes())
    return hashed.hexdigest()
