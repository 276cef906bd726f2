"""Tensor parallelism: a built model whose ranks share its matrices (Shoeybi et al. 2019, arXiv:1909.08053).

`share_tensors` cuts the parameters of a model to this rank's part, and gives its attention, feed-forward and vocabulary
modules the class below that talks to the other ranks. Names and the tree of modules stay as they were, so that
optimizers, adapters and checkpoints go on as before.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.distributed.communicator import Comm
from mlxlm.distributed.pieces import Piece, share
from mlxlm.distributed.regions import entered, joined, left
from mlxlm.distributed.tensor_plan import ROW, TensorPlan
from mlxlm.errors import UsageError
from mlxlm.kernels.cross_entropy import VocabularyShard
from mlxlm.layers.alibi import Alibi
from mlxlm.layers.attention import Attention
from mlxlm.layers.feed_forward import FeedForward
from mlxlm.models import Transformer
from mlxlm.models.heads import LanguageModelHead, Projection


class SharedAttention(Attention):
    """Attention of this rank's heads; the output is the sum over the ranks."""

    def __call__(self, x: mx.array, scope: Any, cache: Any = None, memory: mx.array | None = None) -> mx.array:
        """See `Attention`."""
        memory = None if memory is None else entered(self._comm, memory)
        return super().__call__(entered(self._comm, x), scope, cache, memory)

    def join(self) -> None:
        """Nothing: one product for queries, keys and values is cut up by the heads of the whole model."""

    def project_out(self, out: mx.array) -> mx.array:
        """See `Attention`."""
        return left(self._comm, super().project_out(out))

    def _dropout(self) -> dict[str, Any]:
        options = super()._dropout()
        if options:  # another mask for the heads of every rank
            options["dropout_key"] = options["dropout_key"] + mx.array(self._comm.index, dtype=mx.uint32)
        return options


class SharedFeedForward(FeedForward):
    """A feed-forward layer with this rank's hidden features; the output is the sum over the ranks."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `FeedForward`."""
        return left(self._comm, super().__call__(entered(self._comm, x)))


class ShardDropout(nn.Dropout):
    """Dropout of features that each rank has others of, so each has a mask of its own."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `nn.Dropout`."""
        if self._p_1 == 1 or not self.training:
            return x
        # Every rank draws once from a random state that all have in common, which so stays common.
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32) + mx.array(self._comm.index, dtype=mx.uint32)
        return mx.random.bernoulli(self._p_1, x.shape, key=key) * x * (1 / self._p_1)


class RowLinear(nn.Linear):
    """The product of this rank's inputs with its columns, a part of a sum; the first rank adds the bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `nn.Linear`."""
        y = x @ self["weight"].T
        return y + self["bias"] if self._comm.index == 0 and "bias" in self else y


class RowQuantizedLinear(nn.QuantizedLinear):
    """`RowLinear` with quantized weights."""

    def __call__(self, x: mx.array) -> mx.array:
        """See `nn.QuantizedLinear`."""
        y = mx.quantized_matmul(
            x, self["weight"], scales=self["scales"], biases=self.get("biases"), transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode,
        )  # fmt: skip
        return y + self["bias"] if self._comm.index == 0 and "bias" in self else y


class _Words:
    """A token table of which this rank has the rows of some words."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Vectors (..., dim) of token ids: the rank that has a word gives its vector, the others zeros."""
        local = tokens - self._start
        here = (local >= 0) & (local < self["weight"].shape[0])
        own = super().__call__(mx.where(here, local, 0))
        return left(self._comm, mx.where(here[..., None], own, mx.array(0, dtype=own.dtype)))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of this rank's words."""
        return super().as_linear(entered(self._comm, x))


class WordsEmbedding(_Words, nn.Embedding):
    """See `_Words`."""


class WordsQuantizedEmbedding(_Words, nn.QuantizedEmbedding):
    """See `_Words`."""


class WordsLinear(nn.Linear):
    """The output matrix of a head, with the rows of this rank's words."""

    def __call__(self, x: mx.array) -> mx.array:
        """Logits of this rank's words."""
        return super().__call__(entered(self._comm, x))


class WordsQuantizedLinear(nn.QuantizedLinear):
    """`WordsLinear` with quantized weights."""

    def __call__(self, x: mx.array) -> mx.array:
        """Logits of this rank's words."""
        return super().__call__(entered(self._comm, x))


class WordsHead(LanguageModelHead):
    """A head whose ranks have the logits of some words each; called, it gives all of them to every rank."""

    def __call__(self, hidden: mx.array, embedding: nn.Module) -> mx.array:
        """See `LanguageModelHead`."""
        own = super().__call__(hidden, embedding)
        sizes = [stop - start for start, stop in (share(self.spec.vocab_size, self._comm.size, i) for i in
                                                  range(self._comm.size))]  # fmt: skip
        widest = max(sizes)
        padded = mx.pad(own, [(0, 0)] * (own.ndim - 1) + [(0, widest - own.shape[-1])])
        every = joined(self._comm, padded, -1)
        if min(sizes) == widest:
            return every
        parts = [every[..., i * widest : i * widest + size] for i, size in enumerate(sizes)]
        return mx.concatenate(parts, axis=-1)

    def projection(self, hidden: mx.array, embedding: nn.Module) -> Projection | None:
        """See `LanguageModelHead.projection`; the loss of it puts the words of all ranks together."""
        found = super().projection(hidden, embedding)
        if found is None:
            return None
        comm, words = self._comm, self.spec.vocab_size
        shard = VocabularyShard(
            share(words, comm.size, comm.index)[0], words, comm.size, lambda x: comm.stack(x, "loss by words")
        )
        return found._replace(hidden=entered(comm, found.hidden), shard=shard)


_ROWS = {nn.Linear: RowLinear, nn.QuantizedLinear: RowQuantizedLinear}
_TABLES = {nn.Embedding: WordsEmbedding, nn.QuantizedEmbedding: WordsQuantizedEmbedding}
_OUTPUTS = {nn.Linear: WordsLinear, nn.QuantizedLinear: WordsQuantizedLinear}


def share_tensors(model: Transformer, comm: Comm) -> dict[str, Piece]:
    """Keep this rank's part of a whole model, in place; what is kept of every parameter, by name.

    The model may have low-rank adapters; its parameters may still be lazy, then only what is kept is ever computed,
    and of weights on disk nothing else is read.
    Raises UsageError, before anything is changed, for a model that can't be shared by so many ranks.
    """
    plan = TensorPlan(model.config, comm.size, comm.index)
    arrays = dict(tree_flatten(model.parameters()))
    pieces = {name: plan.piece(name, array.shape) for name, array in arrays.items()}
    if comm.size == 1:
        return pieces
    _refuse_adapters(model)
    model._alone = False
    for path, module in model.named_modules():
        _give_class(model, path, module, comm)
    for name in list(arrays):
        array, piece = arrays.pop(name), pieces[name]
        if piece.is_whole:
            continue
        read = None if model._stored is None else model._stored.part(array, piece.start, piece.stop)
        model.update(tree_unflatten([(name, piece.taken(array) if read is None else read)]))
    return pieces


def _give_class(model: Transformer, path: str, module: nn.Module, comm: Comm) -> None:
    """Turn a module into the one that shares its work, where there is one."""
    plain = ".".join(step for step in path.split(".") if step != "base")
    kind = type(module)
    changed, _, rest = plain.partition(".adapters.")
    if rest.endswith(".dropout") and ROW.search(changed) and kind is nn.Dropout:
        kind = module.__class__ = ShardDropout  # of the inputs of a low-rank change, of which each rank has others
        module._comm = comm
        return
    if kind is Attention:
        module.__class__ = SharedAttention
    elif kind is FeedForward:
        module.__class__ = SharedFeedForward
        if type(module.dropout) is nn.Dropout:
            module.dropout.__class__, module.dropout._comm = ShardDropout, comm
    elif kind is LanguageModelHead:
        module.__class__ = WordsHead
    elif ROW.search(plain) and kind in _ROWS:
        module.__class__ = _ROWS[kind]
    elif plain == "embeddings.token" and kind in _TABLES:
        module.__class__ = _TABLES[kind]
        module._start = share(model.config.embeddings.vocab_size, comm.size, comm.index)[0]
    elif plain == "head.output" and kind in _OUTPUTS and model.config.predicts_words:
        module.__class__ = _OUTPUTS[kind]
    elif isinstance(module, Alibi):
        heads = module._slopes.shape[0]
        module._slopes = module._slopes[slice(*share(heads, comm.size, comm.index))]
        return
    else:
        return
    module._comm = comm


def _refuse_adapters(model: Transformer) -> None:
    if model.prompt is not None and any(model.prompt.prefixes(stack) for stack in ("encoder", "decoder")):
        raise UsageError("prefix tuning has no rule for tensor parallelism; use data parallelism alone")
    for path, module in model.named_modules():
        changed, found, _ = path.partition(".adapters.")
        on_input = getattr(module, "on_input", None)  # of what is rescaled
        if found and on_input is not None and on_input != bool(ROW.search(changed)):
            raise UsageError(
                f"{changed}: tensor parallelism has no rule for rescaling {'inputs' if on_input else 'outputs'} there; "
                "rescale outputs of query, key, value, gate and up, inputs of output and down"
            )
