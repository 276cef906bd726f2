"""What an answer is worth: by a reward model, by a function, or by a check that can be trusted.

reward = reward_of("arithmetic")                      # the number in the answer is the value that was asked for
reward = reward_of(r"regex:^\\s*yes\\b")                # 1 where the pattern is found, else 0
reward = reward_of("json-schema:person.json")         # 1 for JSON that the schema allows
reward = reward_of("model:runs/reward")               # a reward model, see `mlxlm align --method reward`
reward = reward_of("my_module:my_function")           # list[Answered] -> list of numbers
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxlm.alignment.tasks import answer_rewards
from mlxlm.checkpoint import read_json
from mlxlm.data import Encoding, Rows, encode_rows, pad_examples
from mlxlm.errors import DataError, MlxlmError, UsageError

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

Reward = Callable[[Sequence["Answered"]], Sequence[float]]
_NUMBER = re.compile(r"-?\d+(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?")
_OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_MODELS_BATCH = 16


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer to it.  row: what the data has with the prompt.  tokens: of the answer.
    finished: whether the model ended it, rather than the limit of tokens.
    """

    prompt: str
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    finished: bool = True


def reward_of(name: str) -> Reward:
    """The reward of a name, see the module. Raises UsageError for one that can't be found."""
    kind, _, value = name.partition(":")
    if name == "arithmetic":
        return _each(arithmetic)
    if kind == "regex":
        return _each(pattern(value))
    if kind == "json-schema":
        return _each(schema(value))
    if kind == "model":
        return RewardModel(value)
    if not value:
        raise UsageError(
            f"reward is {name!r}; expected arithmetic, regex:PATTERN, json-schema:FILE, model:FOLDER or MODULE:FUNCTION"
        )
    return _function(kind, value)


def checked(reward: Reward, answered: Sequence[Answered]) -> list[float]:
    """The rewards as numbers. Raises UsageError when there are not as many as answers, or one is no finite number."""
    try:
        found = list(reward(answered))
    except MlxlmError:
        raise
    except Exception as error:  # whatever somebody's function raises
        raise UsageError(f"the reward function failed with {type(error).__name__}: {error}") from error
    if len(found) != len(answered):
        raise UsageError(f"the reward function gave {len(found)} rewards for {len(answered)} answers")
    for one, value in zip(answered, found, strict=True):
        try:
            finite = not isinstance(value, str) and math.isfinite(value)
        except TypeError:
            finite = False
        if not finite:
            raise UsageError(f"the reward function gave {value!r} for the answer {one.answer[:60]!r}")
    return [float(value) for value in found]


def _each(check: Callable[[Answered], float]) -> Reward:
    return lambda answered: [check(one) for one in answered]


def _function(module: str, name: str) -> Reward:
    """A function of a module that can be imported from here."""
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"reward {module}:{name} can't be imported ({error}); the folder you are in is searched"
        ) from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise UsageError(f"reward {module}:{name} is no function")
    return found


def arithmetic(one: Answered) -> float:
    """1 where the last number in the answer is the right one: `row["answer"]`, else the value of the calculation that
    the prompt has, such as "12 + 30 * 2 = "; else 0. Raises DataError for a prompt without either.
    """
    wanted = one.row.get("answer")
    if wanted is None:
        wanted = value_of(one.prompt)
    numbers = _NUMBER.findall(one.answer)
    right = bool(numbers) and math.isclose(_plain(numbers[-1]), _plain(str(wanted)), rel_tol=1e-9, abs_tol=1e-9)
    return float(right)


def _plain(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        raise DataError(f"the answer wanted is {text!r}, and arithmetic expects a number") from None


def value_of(prompt: str) -> float:
    """The value of the last calculation in a text: numbers, + - * / // % and parentheses. Raises DataError for none."""
    found = [part.strip() for part in re.findall(r"[\d\s.()+\-*/%]+", prompt)]
    for part in sorted(
        (part for part in found if re.search(r"\d.*[+\-*/%].*\d", part)), key=prompt.rindex, reverse=True
    ):
        try:
            return _evaluate(ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", part), mode="eval").body)
        except (SyntaxError, ZeroDivisionError, KeyError, TypeError, RecursionError):
            continue
    raise DataError(f'the prompt {prompt[:60]!r} has no calculation, and its row no "answer"')


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return _OPERATIONS[type(node.op)](_evaluate(node.operand))
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise TypeError(type(node).__name__)


def pattern(text: str) -> Callable[[Answered], float]:
    """1 where a regular expression is found in the answer, else 0. Raises UsageError for what is none."""
    try:
        wanted = re.compile(text)
    except re.error as error:
        raise UsageError(f"reward regex:{text} is no regular expression: {error}") from None
    return lambda one: float(wanted.search(one.answer) is not None)


def schema(path: str) -> Callable[[Answered], float]:
    """1 where the answer is JSON that a schema in a file allows (2020-12 and before), else 0. Needs `jsonschema`."""
    try:
        import jsonschema
    except ImportError:
        raise UsageError("json-schema needs the package jsonschema: pip install jsonschema") from None
    wanted = read_json(Path(path).expanduser())
    kind = jsonschema.validators.validator_for(wanted)
    try:
        kind.check_schema(wanted)
    except jsonschema.SchemaError as error:
        raise UsageError(f"reward json-schema:{path} is no schema: {error.message}") from None
    validator = kind(wanted)

    def check(one: Answered) -> float:
        try:
            return float(validator.is_valid(json.loads(one.answer)))
        except ValueError:
            return 0.0

    return check


class RewardModel:
    """Rewards by a sequence classifier of one label, read from a folder: a model, or an adapter with its base.

    path: of a model's directory; or ADAPTER@MODEL for an adapter's folder and its base.
    """

    def __init__(self, path: str):
        from mlxlm.models import load
        from mlxlm.peft import load_with_adapter

        adapter, _, base = path.rpartition("@")
        if adapter:
            self.model, self.tokenizer = load_with_adapter(base, adapter=adapter)
        else:
            self.model, self.tokenizer = load(base)
        self.model.eval()

    def __call__(self, answered: Sequence[Answered]) -> list[float]:
        """The reward of each."""
        return score_answers(self.model, self.tokenizer, [(one.prompt, one.answer) for one in answered])


def score_answers(model: Transformer, tokenizer: Tokenizer, answered: Sequence[tuple[str, str]]) -> list[float]:
    """The reward that a reward model gives to answers, as it was trained to read them: prompt, answer and its end.

    An answer without a word counts as one of a blank.
    """
    rows = [(str(i), {"prompt": prompt, "completion": answer if answer.strip() else " "})
            for i, (prompt, answer) in enumerate(answered)]  # fmt: skip
    table = model.config.embeddings.positions
    limit = getattr(table, "limit", None) or model.config.max_length or 2**31 - 1
    examples, _ = encode_rows(
        Rows("answers", "completion", rows), tokenizer,
        Encoding(max_length=limit - model.virtual_length, truncation="cut-left"),
    )  # fmt: skip
    found: list[float] = [0.0] * len(answered)
    order = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(0, len(order), _MODELS_BATCH):
        part = order[start : start + _MODELS_BATCH]
        tokens = [example.tokens for example in part]
        batch = pad_examples([type(part[0])(ids, [False] * len(ids), label=0) for ids in tokens], 2**31 - 1, 8)
        values = answer_rewards(model, {name: mx.array(batch[name]) for name in ("tokens", "key_lengths")})
        for example, value in zip(part, values.tolist(), strict=True):  # type: ignore[arg-type]
            found[int(example.where)] = value
    return found
