"""A bridge to `lm_eval`, EleutherAI's evaluation harness: its tasks on our models, when it is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mlxlm.data import Example
from mlxlm.errors import MlxlmError, PromptError, UnsupportedModelError, UsageError, listing
from mlxlm.generation.choice import answer_example
from mlxlm.generation.decoding import stream_generate
from mlxlm.generation.perplexity import LONGEST_WINDOW, start_token, windows
from mlxlm.generation.sampling import Sampling
from mlxlm.generation.scoring import Score, context_limit, cut_left, score_examples
from mlxlm.generation.steps import check_generates

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer

_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}


class Requests:
    """The three kinds of request that the harness has, answered by a model; free of the harness itself.

    batch_size: requests at once.  max_length: tokens of context and answer, default the model's context and at most
    2048; longer contexts lose their beginning, as the harness has it.  max_tokens: of an answer where the task names
    none, default 256.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_tokens: int = 256,
    ):
        check_generates(model)
        limit = context_limit(model)
        if max_length is None:
            max_length = LONGEST_WINDOW if limit is None else min(limit, LONGEST_WINDOW)
        if max_length < 1 or (limit is not None and max_length > limit):
            raise UsageError(
                f"max_length is {max_length}; expected at least 1 and at most the model's context, {limit}"
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length, self.max_tokens = max_length, max_tokens

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Of the second text after the first, which may be empty: then the start token stands before it."""
        return score_examples(self.model, [self._pair(*pair) for pair in pairs], batch_size=self.batch_size)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log probability of each text as a whole, in windows that don't overlap but for the last one."""
        if self.model.config.has_memory:
            raise UnsupportedModelError("an encoder-decoder gives no likelihood of plain text")
        start, examples, owners = self._start(), [], []
        for number, text in enumerate(texts):
            ids = [start, *self.tokenizer.encode(text, add_special_tokens=False)]
            mine = list(windows(ids, self.max_length, self.max_length))
            examples += mine
            owners += [number] * len(mine)
        sums = [0.0] * len(texts)
        for owner, score in zip(owners, score_examples(self.model, examples, batch_size=self.batch_size), strict=True):
            sums[owner] += score.log_probability
        return sums

    def answer(self, context: str, options: dict[str, Any]) -> str:
        """The continuation of a context up to the first of the strings `until`, which is not part of it.

        Raises UsageError for options that are not implemented, naming all.
        """
        foreign = [f"{key} = {value!r}" for key, value in options.items() if key not in _KNOWN]
        if foreign:
            raise UsageError(f"the task asks for ways to generate that are not implemented: {listing(foreign)}")
        until = options.get("until") or []
        count = int(options.get("max_gen_toks") or self.max_tokens)
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
        sampling = Sampling(
            temperature=temperature,
            **{
                key: options[key] for key in ("top_p", "top_k", "min_p") if temperature and options.get(key) is not None
            },
        )
        tokens = self.tokenizer.encode(context) or [self._start()]
        room = self.max_length if self.model.config.has_memory else max(self.max_length - count, 1)
        pieces = stream_generate(
            self.model, self.tokenizer, tokens[-room:], max_tokens=count, sampling=sampling,
            stop=[until] if isinstance(until, str) else [text for text in until if text],
        )  # fmt: skip
        return "".join(piece.text for piece in pieces)

    def _pair(self, context: str, continuation: str) -> Example:
        if not continuation:
            raise PromptError("a task asks for the likelihood of an empty text")
        if not context:
            ids = self.tokenizer.encode(continuation, add_special_tokens=False)
            example = (
                Example([self._start()], [False], target=ids)
                if self.model.config.has_memory
                else Example([self._start(), *ids], [False] + [True] * len(ids))
            )
        else:
            # A space at the end of a context belongs to the word that follows it.
            bare = context.rstrip() if context.strip() else context
            example = answer_example(self.model, self.tokenizer, bare, context[len(bare) :] + continuation)
        return cut_left(example, self.max_length)

    def _start(self) -> int:
        start = start_token(self.tokenizer)
        if start is None:
            raise UnsupportedModelError(
                "the tokenizer has neither a bos nor an eos token, with which a text could begin"
            )
        return start


def harness_model(requests: Requests) -> Any:
    """An `lm_eval.api.model.LM` for `lm_eval.simple_evaluate(model=...)`. Raises UsageError without lm_eval."""
    LM = _import().api.model.LM

    class Model(LM):  # type: ignore[misc, valid-type]
        """Our model, as the harness sees one."""

        tokenizer_name = "mlxlm"

        def loglikelihood(self, asked: Any) -> list[tuple[float, bool]]:
            found = requests.log_likelihoods([one.args for one in asked])
            return self._kept("loglikelihood", asked, [(score.log_probability, score.greedy) for score in found])

        def loglikelihood_rolling(self, asked: Any) -> list[float]:
            return self._kept("loglikelihood_rolling", asked, requests.rolling([one.args[0] for one in asked]))

        def generate_until(self, asked: Any) -> list[str]:
            return self._kept("generate_until", asked, [requests.answer(*one.args) for one in asked])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return requests.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return (requests.tokenizer.chat_template or "") if chat_template else ""

        def _kept(self, kind: str, asked: Any, results: list[Any]) -> list[Any]:
            for one, result in zip(asked, results, strict=True):
                self.cache_hook.add_partial(kind, one.args, result)
            return results

    return Model()


def run_harness(
    requests: Requests,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Results of tasks of the harness by name, as it gives them.

    tasks: names that it knows, or that the folder include_path defines.  num_fewshot: examples before each question,
    default the task's.  limit: questions of each task.  chat: give questions as chats.  seed: of the examples.
    Raises UsageError without lm_eval, and for tasks that it doesn't know or can't run.
    """
    lm_eval = _import()
    manager = lm_eval.tasks.TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"lm_eval has no task {listing(map(repr, unknown))}; `lm_eval ls tasks` lists them")
    try:
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        found = lm_eval.simple_evaluate(
            model=harness_model(requests),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=False,
            **dict.fromkeys(seeds, seed),
        )
    except MlxlmError:
        raise
    except (ValueError, OSError, ConnectionError) as error:
        raise UsageError(f"lm_eval can't run {listing(tasks)}: {error}") from None
    return found["results"]


def check_harness() -> None:
    """Raises UsageError without lm_eval; does not import it, which takes seconds."""
    if "lm_eval" not in sys.modules and find_spec("lm_eval") is None:
        raise UsageError("tasks of the evaluation harness need lm_eval: pip install lm_eval")


def _import() -> Any:
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError as error:
        raise UsageError(f"tasks of the evaluation harness need lm_eval: pip install lm_eval ({error})") from None
    return lm_eval
