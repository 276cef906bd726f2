"""Virtual tokens before the input: prompt tuning and P-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import mlx.core as mx
from mlx import nn

from mlxlm.errors import UsageError
from mlxlm.layers import VirtualTokens
from mlxlm.layers.virtual import StackName
from mlxlm.peft.method import Content, Method, positive
from mlxlm.peft.places import bare

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


class PromptTokens(VirtualTokens):
    """Free vectors before the tokens.  weight (length, dim).  stack: the one that reads them."""

    def __init__(self, weight: mx.array, stack: StackName):
        super().__init__()
        self.weight, self.stack, self.length = weight, stack, weight.shape[0]

    def encoded(self) -> mx.array:
        """The vectors, (length, dim)."""
        return self.weight

    def offset(self, stack: StackName) -> int:
        """See `VirtualTokens.offset`: only the stack that reads the vectors has its tokens shifted."""
        return self.length if stack == self.stack else 0

    def vectors(self, stack: StackName) -> mx.array | None:
        """See `VirtualTokens.vectors`."""
        return self.encoded() if stack == self.stack else None


class EncodedPrompt(PromptTokens):
    """Vectors that a small network makes of free ones: MLP, or two-way LSTM and MLP.

    weight (length, dim): what goes in.  lstm: one pair of directions a layer.  linears: with ReLU between them.
    """

    def __init__(self, length: int, dim: int, hidden_dim: int, encoder: str, num_layers: int, stack: StackName):
        super().__init__(mx.random.normal((length, dim)), stack)
        if encoder == "lstm":
            widths = [dim] + [2 * hidden_dim] * (num_layers - 1)
            self.lstm = [[nn.LSTM(width, hidden_dim), nn.LSTM(width, hidden_dim)] for width in widths]
            sizes = [2 * hidden_dim, 2 * hidden_dim, dim]
        else:
            self.lstm = []
            sizes = [dim, hidden_dim, hidden_dim, dim]
        self.linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]

    def encoded(self) -> mx.array:
        """See `PromptTokens.encoded`."""
        x = self.weight[None]
        for forward, backward in self.lstm:
            there, back = forward(x)[0], backward(x[:, ::-1])[0][:, ::-1]
            x = mx.concatenate([there, back], axis=-1)
        for index, linear in enumerate(self.linears):
            x = linear(nn.relu(x) if index else x)
        return x[0]


def reading_stack(model: Transformer) -> StackName:
    """The stack that reads a model's input: the encoder where there is one."""
    return "decoder" if model.config.encoder is None else "encoder"


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Vectors before the input are all that is trained (Lester et al. 2021, arXiv:2104.08691): num_tokens * dim
    parameters. An encoder-decoder's encoder reads them.

    num_tokens: default 20.  init: "random" (normal, of the spread of the token table), "vocabulary" (the vectors of
    random tokens) or "text" (those of `text`, repeated or cut to fit); default "vocabulary".
    """

    name: ClassVar[str] = "prompt"
    num_tokens: int = 20
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    text: str | None = None

    def __post_init__(self) -> None:
        positive(num_tokens=self.num_tokens)
        if self.init not in ("random", "vocabulary", "text"):
            raise UsageError(f"init is 'random', 'vocabulary' or 'text', not {self.init!r}")
        if (self.init == "text") != bool(self.text):
            raise UsageError("init 'text' needs a text, and only that takes one")

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`. Raises UsageError for a text without a tokenizer."""
        table = bare(model.embeddings.token)
        dim, rows = model.config.dim, model.config.embeddings.vocab_size
        if self.init == "random":
            some = table(mx.random.randint(0, rows, (min(rows, 1000),))).astype(mx.float32)
            weight = mx.random.normal((self.num_tokens, dim)) * mx.std(some)
        elif self.init == "vocabulary":
            weight = table(mx.random.randint(0, rows, (self.num_tokens,)))
        else:
            if tokenizer is None:
                raise UsageError("init 'text' needs a tokenizer")
            ids = tokenizer.encode(self.text, add_special_tokens=False)
            if not ids:
                raise UsageError(f"the text {self.text!r} has no tokens")
            weight = table(mx.array((ids * (self.num_tokens // len(ids) + 1))[: self.num_tokens]))
        return Content(prompt=PromptTokens(weight.astype(mx.float32), reading_stack(model)))


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Vectors before the input that a small network makes (Liu et al. 2021, arXiv:2103.10385).

    num_tokens v: default 20.  encoder: "mlp" (three linear layers d-h-h-d, ReLU between) or "lstm" (two-way, then
    2h-2h-d), default "mlp".  hidden_dim h: default the model's d.  num_layers: of the LSTM, default 2.
    MLP: v d + d h + h + h h + h + h d + d parameters.
    """

    name: ClassVar[str] = "p-tuning"
    num_tokens: int = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden_dim: int | None = None
    num_layers: int = 2

    def __post_init__(self) -> None:
        positive(num_tokens=self.num_tokens, num_layers=self.num_layers, hidden_dim=self.hidden_dim or 1)
        if self.encoder not in ("mlp", "lstm"):
            raise UsageError(f"the prompt encoder is 'mlp' or 'lstm', not {self.encoder!r}")

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """See `Method.build`."""
        dim = model.config.dim
        hidden = self.hidden_dim or dim
        stack = reading_stack(model)
        return Content(prompt=EncodedPrompt(self.num_tokens, dim, hidden, self.encoder, self.num_layers, stack))
