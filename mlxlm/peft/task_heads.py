"""Adapters of classifiers: the head that the base model must have before such an adapter fits, and its labels.

An adapter's own files name no labels, so they stand beside them: labels.json, {"id2label": {"0": "bad", ...}}.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxlm.checkpoint import open_safetensors, read_json, write_json_atomic
from mlxlm.errors import ConfigError, WeightsError
from mlxlm.models import SequenceHeadSpec, SpanHeadSpec, TokenHeadSpec, with_classification_head
from mlxlm.models.weights import hub_name

if TYPE_CHECKING:
    from mlxlm.models import Transformer

LABELS = "labels.json"
Kind = Literal["sequence", "tokens"]
# PEFT's names of the kinds of heads.
_TASKS: dict[str, Kind] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "tokens"}


def write_labels(model: Transformer, folder: Path) -> None:
    """Write labels.json beside an adapter, for a model whose head is for labels; nothing for any other."""
    head = model.config.head
    if not isinstance(head, TokenHeadSpec) or isinstance(head, SpanHeadSpec):
        return
    task = next(name for name, kind in _TASKS.items() if (kind == "sequence") == isinstance(head, SequenceHeadSpec))
    labels = {str(number): label for number, label in enumerate(head.labels)}
    write_json_atomic(
        folder / LABELS,
        {"task_type": task, "id2label": labels, "label2id": {name: int(n) for n, name in labels.items()}},
    )


def with_task_head(model: Transformer, folder: str | Path) -> Transformer:
    """The model, or one with its body and the classification head that the adapter of a folder is for.

    Labels are those of labels.json, else the model's own where it is such a classifier, else LABEL_0, LABEL_1 and so on
    as many as the adapter's head has. Raises WeightsError where neither the model nor the adapter has a head.
    """
    folder = Path(folder)
    values = read_json(folder / "adapter_config.json")
    named = read_json(folder / LABELS) if (folder / LABELS).is_file() else {}
    kind = _TASKS.get(named.get("task_type") or values.get("task_type") or "")
    if kind is None:
        return model
    mine = _labels_of(model, kind)
    labels = _named_labels(folder, named) or mine or _counted(model, kind, folder)
    return model if labels == mine else with_classification_head(model, kind, labels)


def _labels_of(model: Transformer, kind: Kind) -> tuple[str, ...]:
    wanted = SequenceHeadSpec if kind == "sequence" else TokenHeadSpec
    head = model.config.head
    return head.labels if type(head) is wanted else ()


def _named_labels(folder: Path, named: dict[str, Any]) -> tuple[str, ...]:
    found = named.get("id2label", {})
    if not isinstance(found, dict) or sorted(found) != sorted(map(str, range(len(found)))):
        raise ConfigError(f"{folder / LABELS}: id2label has the keys {sorted(found)}, expected 0, 1, ...")
    return tuple(str(found[str(number)]) for number in range(len(found)))


def _counted(model: Transformer, kind: Kind, folder: Path) -> tuple[str, ...]:
    """Names by number for the labels of an adapter that says nothing of them."""
    probe = with_classification_head(model, kind, ("LABEL_0", "LABEL_1"))
    name = hub_name(probe.source.family.rules(probe.config, "hub"), "head.output.weight")
    for path in sorted(folder.glob("*.safetensors")):
        tensors = open_safetensors(path).tensors
        for candidate, info in tensors.items():
            if candidate == name or candidate.endswith(f".{name}"):
                return tuple(f"LABEL_{number}" for number in range(info.shape[0]))
    raise WeightsError(
        f"{folder} is an adapter of a classifier, but the model has no such head, and the adapter has no {name}"
    )
