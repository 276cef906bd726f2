"""Answers of a model before, while and after it is trained, and how many of them are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxlm.data import IGNORE, Example
from mlxlm.generation import batch_generate, label_logits, marked, score_labels
from mlxlm.training.evaluation import Evaluation
from mlxlm.training.finetune.data import Kind, question
from mlxlm.training.reporters import Reporter, keep_until

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

_SHORT = 32  # tokens of a typical answer up to which right answers are counted unless told otherwise


@dataclass(frozen=True)
class Comparison:
    """What a model made of one row.  asked, wanted: the row's prompt and answer.  before, after: the model's."""

    asked: str
    wanted: str
    before: str
    after: str


@contextmanager
def untouched_chance(model: Transformer):
    """Evaluation mode, and afterwards the random state and the mode as they were, so that a run stays what it is."""
    training, state = model.training, mx.array(mx.random.state[0])
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        mx.random.state[0][:] = state


def answers(
    model: Transformer, tokenizer: Tokenizer, kind: Kind, labels: Sequence[str], examples: Sequence[Example], most: int
) -> list[str]:
    """What a model answers to examples: text of at most `most` tokens, the label, or the labels of the words."""
    if not examples:
        return []
    with untouched_chance(model):
        if kind in ("sequence", "tokens"):
            return [
                " ".join(labels[row.argmax()] for row in logits[marked(example)])
                if kind == "tokens"
                else labels[logits.argmax()]
                for example, logits in zip(examples, label_logits(model, examples), strict=True)
            ]
        asked = [_question(example)[0] for example in examples]
        return [text.strip() for text in batch_generate(model, tokenizer, asked, max_tokens=most)]


def shown(
    tokenizer: Tokenizer, kind: Kind, labels: Sequence[str], example: Example, row: Mapping[str, Any]
) -> tuple[str, str]:
    """A row's prompt and the answer wanted, as a person reads them, without what a chat template puts around them."""
    asked = _asked(row)
    if kind == "sequence":
        return asked, labels[example.label]  # type: ignore[index]
    if kind == "tokens":
        return asked, " ".join(labels[label] for label in example.label if label != IGNORE)  # type: ignore[union-attr]
    prompt, wanted = _question(example)
    whole = "text" in row and "label" not in row  # a text to go on with: its beginning is the prompt
    return tokenizer.decode(prompt) if whole else asked, tokenizer.decode(wanted).strip()


def _asked(row: Mapping[str, Any]) -> str:
    """What a row asks: of a chat the last thing that the user says before the last answer."""
    if "messages" in row:
        turns = row["messages"]
        last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
        said = [turn.get("content") for turn in turns[:last] if turn["role"] != "assistant"]
        return next((text for text in reversed(said) if isinstance(text, str)), "")
    if "tokens" in row:
        return " ".join(row["tokens"])
    return next((row[name] for name in ("prompt", "source", "text") if name in row), "")


def _question(example: Example) -> tuple[list[int], list[int]]:
    found = question(example)
    assert found is not None
    return found


def askable(examples: Sequence[Example], kind: Kind, count: int) -> list[Example]:
    """The first examples that ask something, spread over the labels where there are labels."""
    if kind == "sequence":
        groups: dict[Any, list[Example]] = {}
        for example in examples:
            groups.setdefault(example.label, []).append(example)
        rounds = max((len(group) for group in groups.values()), default=0)
        ordered = [group[i] for i in range(rounds) for group in groups.values() if i < len(group)]
        return ordered[:count]
    return [example for example in examples if kind == "tokens" or question(example) is not None][:count]


def label_measures(
    model: Transformer, examples: Sequence[Example], labels: Sequence[str], batch_size: int
) -> tuple[Evaluation, dict[str, float]]:
    """The mean loss of labels, and their accuracy and F1, see `LabelScores`, in one pass over the examples."""
    with untouched_chance(model):
        logits = label_logits(model, examples, batch_size=batch_size)
    right, given, loss, count = [], [], 0.0, 0
    for example, found in zip(examples, logits, strict=True):
        tagged = isinstance(example.label, list)
        scores = np.atleast_2d(found[marked(example)] if tagged else found).astype(np.float64)
        wanted = np.array(example.label).reshape(-1)
        wanted = wanted[wanted != IGNORE]
        top = scores.max(-1)
        of_right = scores[np.arange(len(wanted)), wanted]
        loss += float((top + np.log(np.exp(scores - top[:, None]).sum(-1)) - of_right).sum())
        count += len(wanted)
        names = [labels[i] for i in wanted], [labels[i] for i in scores.argmax(-1)]
        right.append(names[0] if tagged else names[0][0])
        given.append(names[1] if tagged else names[1][0])
    return Evaluation(loss / count, count), score_labels(right, given).to_json()


def exact_matches(
    model: Transformer,
    tokenizer: Tokenizer,
    kind: Kind,
    examples: Sequence[Example],
    wanted: int | None,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Share of the first `wanted` examples that are answered word for word, blanks around them aside; {} for none.

    wanted: None for 100 where the typical answer is short, and the rows say what is prompt and what is answer.  say:
    shows a line.
    """
    asked = askable(examples, kind, len(examples))
    if kind == "words":
        asked = [example for example in asked if not all(example.scored[1:])]
    if not asked or wanted == 0:
        return {}
    lengths = [len(_question(example)[1]) for example in asked]
    if wanted is None and np.median(lengths) > _SHORT:
        return {}
    chosen = asked[: 100 if wanted is None else wanted]
    most = max(lengths[: len(chosen)]) + 4
    say(f"answering {len(chosen)} of them, each in at most {most} tokens")
    found = answers(model, tokenizer, kind, (), chosen, most)
    right = [tokenizer.decode(_question(example)[1]).strip() for example in chosen]
    return {
        "exact_match": sum(a == b for a, b in zip(found, right, strict=True)) / len(chosen),
        "answered": float(len(chosen)),
    }


class Samples(Reporter):
    """Answers to a few rows at each evaluation: shown, and kept in FOLDER/samples.jsonl.

    ask: gives the answers of the model as it is.  asked: prompts, for people.  say: shows a line.  writes: whether this
    process keeps them; others that share the model ask with it.
    """

    everywhere = True

    def __init__(
        self, folder: Path, ask: Callable[[], list[str]], asked: Sequence[str], say: Callable[[str], None],
        *, writes: bool = True,
    ):  # fmt: skip
        self.path, self.ask, self.asked, self.say, self.writes = folder / "samples.jsonl", ask, asked, say, writes
        self.last = -1  # the step of the last line

    def on_start(self, trainer: Any) -> None:
        """Keep what was said up to the step where the run goes on."""
        if self.writes:
            self.last = max((row["step"] for row in keep_until(self.path, trainer.progress.step)), default=-1)

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        """Ask, show the first answer, keep all."""
        if not self.asked:
            return
        found = self.ask()
        if not self.writes:
            return
        self.say(f"  {brief(self.asked[0], 50)} -> {brief(found[0], 70)}")
        row = {"step": metrics["step"], "answers": dict(zip(self.asked, found, strict=True))}
        if row["step"] <= self.last:
            return  # a run that goes on measures its last step once more
        self.last = row["step"]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def brief(text: str, most: int) -> str:
    """A text in one line of at most `most` characters; of a longer one the end is left out."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def comparisons(asked: Sequence[tuple[str, str]], before: Sequence[str], after: Sequence[str]) -> list[Comparison]:
    """Rows beside what was answered before and after."""
    return [Comparison(*row, old, new) for row, old, new in zip(asked, before, after, strict=True)]
