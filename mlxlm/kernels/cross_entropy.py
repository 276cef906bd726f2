"""Linear head and softmax cross-entropy together, in chunks of the vocabulary: the logits never exist as a whole.

For 8,192 tokens and 128,256 words the float32 logits take 4.2 GB, and a plain backward pass holds them about three
times. Here a chunk of the head is multiplied with all tokens, reduced to one number a token, and forgotten; the
backward pass computes it again. Chunks of the vocabulary rather than of the tokens: the head is read once, and the
gradient of its weight comes out chunk by chunk instead of being summed up in a float32 copy of the head.

Where the gradient is sure to be asked for, nothing need be computed twice (`one_pass`): a chunk of the tokens has all
of their logits, so the gradients can be made at once with their loss: two products with the head instead of three, or
three instead of four when the head learns. Its gradient is then a sum over the chunks, which pays if they are large.

Shapes: N tokens, D features, V words, C words of a chunk, R tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx

from mlxlm import runtime
from mlxlm.errors import UsageError, nearest
from mlxlm.kernels.exponential import exp, log_sum_exp

Arrays = dict[str, mx.array]
Reduction = Literal["mean", "sum", "none"]

_REDUCTIONS = ("mean", "sum", "none")
_CHUNK_BYTES = {"cpu": 32 * 1024**2}  # of one chunk's float32 logits
_GPU_CHUNK_BYTES = 256 * 1024**2
# Tokens of a chunk from which on adding a gradient of the head costs less than computing the logits again: 2 * R
# operations an element against 12 bytes, at 600 TFLOP/s and 3 TB/s, or on a CPU. On GPUs the default chunk has as many.
_PAYING_ROWS = {"cpu": 32}
_GPU_PAYING_ROWS = 2048
_MAX_CHUNKS = 64  # bounds the unrolled graph
_CHUNK_MULTIPLE = 64


class QuantizedWeight(NamedTuple):
    """A head as mx.quantize leaves it: rows are words; see mx.quantize for the fields. Never differentiated."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"


class VocabularyShard(NamedTuple):
    """Which words a head has whose rows several processes share; their losses are put together from all parts.

    start: the first word here.  vocabulary: words of all.  shards: how many processes.
    stack: gives the arrays of all of them, (...) -> (shards, ...), to every one. Nothing flows back through it.
    """

    start: int
    vocabulary: int
    shards: int
    stack: Callable[[mx.array], mx.array]


def fused_linear_cross_entropy(
    hidden: mx.array,
    weight: mx.array | QuantizedWeight,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    weight_gradient: bool = True,
    one_pass: bool = False,
    chunk: int | None = None,
    shard: VocabularyShard | None = None,
) -> mx.array:
    """Cross-entropy of softmax(logits), logits = cap(logit_scale * (hidden @ weight.T + bias)), without the logits.

    hidden (..., D), weight (V, D) or a QuantizedWeight, targets (...) integers below V, or ignore_index for tokens
    that don't count (loss 0, no gradient). bias (V,). Any other target gives NaN.
    softcap: cap(x) = softcap * tanh(x / softcap).
    label_smoothing: share of the target's probability that is spread over all V words, 0 <= share < 1.
    z_loss: adds z_loss * log(sum(exp(logits)))**2 to each token's loss (PaLM, arXiv:2204.02311).
    reduction: "mean" over the tokens that count (0 when there is none), "sum", or "none" for a loss a token (...).
    weight_gradient: False when the head is frozen, which saves its gradient's matrix product and memory.
    shard: when weight and bias have the rows of some words only; targets stay words of the whole vocabulary. The
    gradient of hidden is then that by the words here: what the other processes have is to be added.
    one_pass: compute the gradients together with the loss, where that pays: less work when they are asked for, as in a
    training step, and more when they aren't. With reduction "none" for a frozen head without bias only.
    chunk: words at once, default by a memory budget of the device; in one pass as many logits, of fewer tokens.

    Returns float32. Differentiable in hidden, weight and bias. Raises UsageError for arguments that don't fit.
    """
    _check(hidden, weight, targets, bias, softcap, label_smoothing, chunk, reduction)
    if one_pass and shard is not None:
        raise UsageError("one_pass needs all words at once, and a shard has some of them")
    vocabulary = weight.scales.shape[0] if isinstance(weight, QuantizedWeight) else weight.shape[0]
    flat_targets = targets.reshape(-1).astype(mx.int32)
    head = _Head(
        weight=None if isinstance(weight, mx.array) and weight_gradient else weight,
        softcap=softcap,
        scale=float(logit_scale),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        # MLX's CPU matrix products are about ten times slower in 16 bits; elsewhere they run in the dtype of the head.
        dtype=mx.float32 if runtime.backend() == "cpu" else hidden.dtype,
        chunks=_chunks(flat_targets.size, vocabulary, chunk, shard),
        targets=flat_targets,
        shard=shard,
    )
    counted = flat_targets != ignore_index
    inputs = {"hidden": hidden.reshape(-1, hidden.shape[-1])}
    if head.weight is None:
        inputs["weight"] = weight
    if bias is not None:
        inputs["bias"] = bias
    if one_pass and reduction == "none" and len(inputs) > 1:
        raise UsageError("one_pass without a reduction is for a frozen head that has no bias")
    rows = one_pass_rows(flat_targets.size, vocabulary, chunk, trained=head.weight is None) if one_pass else 0
    if rows:
        if reduction != "none":
            total = head.total_in_one_pass(inputs, counted, rows)
            return total if reduction == "sum" else total / mx.maximum(counted.sum(), 1)
        return mx.where(counted, head.losses_in_one_pass(inputs, rows), 0.0).reshape(targets.shape)

    @mx.custom_function
    def run(inputs: Arrays) -> list[mx.array]:
        return head.losses(inputs)

    @run.vjp
    def run_vjp(inputs: Arrays, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Arrays:
        # The log-sum-exp is an output only to be kept for this pass, so it has no cotangent.
        return head.gradients(inputs, mx.where(counted, cotangents[0], 0.0), outputs[1])

    losses = mx.where(counted, run(inputs)[0], 0.0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / mx.maximum(counted.sum(), 1)


def token_log_probabilities(
    hidden: mx.array,
    weight: mx.array | QuantizedWeight,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    weight_gradient: bool = True,
    chunk: int | None = None,
    shard: VocabularyShard | None = None,
) -> mx.array:
    """log p(target) of each token, float32 (...), 0 where the target is ignore_index; the logits never exist whole.

    Arguments, gradients and errors as in `fused_linear_cross_entropy`.
    """
    return -fused_linear_cross_entropy(
        hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index,
        reduction="none", weight_gradient=weight_gradient, chunk=chunk, shard=shard,
    )  # fmt: skip


def reference_linear_cross_entropy(
    hidden: mx.array,
    weight: mx.array | QuantizedWeight,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> mx.array:
    """The same loss from the whole logits in float32, differentiated by MLX: the oracle of the one above."""
    if isinstance(weight, QuantizedWeight):
        packed, scales, biases, group_size, bits, mode = weight
        weight = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits, mode=mode)
    logits = hidden.astype(mx.float32) @ weight.astype(mx.float32).T
    if bias is not None:
        logits = logits + bias.astype(mx.float32)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * mx.tanh(logits / softcap)
    counted = targets != ignore_index
    log_sum = mx.logsumexp(logits, axis=-1)
    of_target = mx.take_along_axis(logits, mx.where(counted, targets, 0)[..., None], axis=-1).squeeze(-1)
    losses = log_sum - (1.0 - label_smoothing) * of_target - label_smoothing * logits.mean(-1) + z_loss * log_sum**2
    losses = mx.where(counted, losses, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / mx.maximum(counted.sum(), 1)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """One call: its constants, and the two passes over the chunks. weight is None when it is differentiated."""

    weight: mx.array | QuantizedWeight | None
    softcap: float | None
    scale: float
    label_smoothing: float
    z_loss: float
    dtype: mx.Dtype
    chunks: list[tuple[int, int]]
    targets: mx.array
    shard: VocabularyShard | None = None

    @property
    def start(self) -> int:
        """The first word here."""
        return 0 if self.shard is None else self.shard.start

    @property
    def vocabulary(self) -> int:
        """Words of all processes together."""
        return self.chunks[-1][1] if self.shard is None else self.shard.vocabulary

    def losses(self, inputs: Arrays) -> list[mx.array]:
        """Loss and log-sum-exp of each token, float32 (N,); the loss of an ignored token is meaningless."""
        state = self._state(inputs)
        vocabulary = self.vocabulary
        of_target, of_all, log_sums = mx.zeros(self.targets.shape), mx.zeros(self.targets.shape), []
        for words in self.chunks:
            logits_NC, _ = self._logits(state, words)
            log_sums.append(log_sum_exp(logits_NC))
            column_N, here_N = self._columns(state["targets"], words)
            own_N = mx.take_along_axis(logits_NC, column_N[:, None], axis=1).squeeze(1)
            of_target = of_target + mx.where(here_N, own_N, 0.0)
            done = [log_sums[-1], of_target]
            if self.label_smoothing > 0.0:
                of_all = of_all + logits_NC.sum(-1)
                done.append(of_all)
            state = _after(state, done)
        log_sum_N = mx.logsumexp(mx.stack(log_sums), axis=0) if len(log_sums) > 1 else log_sums[0]
        if self.shard is not None:
            parts = self.shard.stack(mx.stack([log_sum_N, of_target, of_all]))
            log_sum_N, of_target, of_all = mx.logsumexp(parts[:, 0], axis=0), parts[:, 1].sum(0), parts[:, 2].sum(0)
        share = self.label_smoothing
        loss_N = log_sum_N - (1.0 - share) * of_target
        if share > 0.0:
            loss_N = loss_N - (share / vocabulary) * of_all
        if self.z_loss != 0.0:
            loss_N = loss_N + self.z_loss * log_sum_N * log_sum_N
        valid_N = (self.targets >= 0) & (self.targets < vocabulary)
        return [mx.where(valid_N, loss_N, mx.nan), log_sum_N]

    def gradients(self, inputs: Arrays, cotangent_N: mx.array, log_sum_N: mx.array) -> Arrays:
        """Gradients of the inputs under their names, in their dtypes."""
        share, vocabulary = self.label_smoothing, self.vocabulary
        # d(loss)/d(logit) = softmax * (1 + 2 z lse) - (1 - share) at the target - share / V everywhere
        of_weight_N = cotangent_N * (1.0 + (2.0 * self.z_loss) * log_sum_N) if self.z_loss else cotangent_N
        state = self._state(inputs) | {"cotangent": cotangent_N, "of_weight": of_weight_N, "log_sum": log_sum_N}
        hidden_gradient_ND = mx.zeros(inputs["hidden"].shape, dtype=mx.float32)
        parts: dict[str, list[mx.array]] = {name: [] for name in inputs if name != "hidden"}
        for words in self.chunks:
            logits_NC, capped_NC = self._logits(state, words)
            column_N, here_N = self._columns(state["targets"], words)
            gradient_NC = exp(logits_NC - state["log_sum"][:, None]) * state["of_weight"][:, None]
            if share > 0.0:
                gradient_NC = gradient_NC - state["cotangent"][:, None] * (share / vocabulary)
            own_N = mx.where(here_N, state["cotangent"] * (1.0 - share), 0.0)
            is_own_NC = mx.arange(words[1] - words[0]) == column_N[:, None]
            gradient_NC = gradient_NC - mx.where(is_own_NC, own_N[:, None], 0.0)
            if capped_NC is not None:
                gradient_NC = gradient_NC * (1.0 - capped_NC * capped_NC)
            if self.scale != 1.0:
                gradient_NC = gradient_NC * self.scale
            if "bias" in parts:
                parts["bias"].append(gradient_NC.sum(0).astype(inputs["bias"].dtype))
            gradient_NC = gradient_NC.astype(self.dtype)
            if "weight" in parts:
                parts["weight"].append((gradient_NC.T @ state["hidden"]).astype(inputs["weight"].dtype))
            hidden_gradient_ND = hidden_gradient_ND + self._back_to_hidden(state, gradient_NC, words)
            done = [hidden_gradient_ND, *(chunks[-1] for chunks in parts.values())]
            state = _after(state, done)
        joined = {name: mx.concatenate(chunks) for name, chunks in parts.items()}
        return {"hidden": hidden_gradient_ND.astype(inputs["hidden"].dtype)} | joined

    def losses_in_one_pass(self, inputs: Arrays, rows: int) -> mx.array:
        """Losses (N,), whose gradient by hidden is made with them; that of an ignored token is meaningless."""

        @mx.custom_function
        def run(hidden_ND: mx.array) -> list[mx.array]:
            losses_N, gradients = self._losses_and_gradients({"hidden": hidden_ND}, rows)
            return [losses_N, gradients["hidden"]]

        @run.vjp
        def run_vjp(hidden_ND: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
            # An ignored token has no cotangent; its gradient may be NaN, so it is not multiplied by 0.
            cotangent_N1 = cotangents[0][:, None]
            return mx.where(cotangent_N1 == 0, 0.0, cotangent_N1 * outputs[1]).astype(hidden_ND.dtype)

        return run(inputs["hidden"])[0]

    def total_in_one_pass(self, inputs: Arrays, counted_N: mx.array, rows: int) -> mx.array:
        """The sum of the counted losses, whose gradients by all inputs are made with it."""
        names = list(inputs)

        @mx.custom_function
        def run(inputs: Arrays) -> list[mx.array]:
            losses_N, gradients = self._losses_and_gradients(inputs, rows, counted_N)
            return [mx.where(counted_N, losses_N, 0.0).sum(), *(gradients[name] for name in names)]

        @run.vjp
        def run_vjp(inputs: Arrays, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Arrays:
            made = dict(zip(names, outputs[1:], strict=True))
            return {name: (cotangents[0] * made[name]).astype(array.dtype) for name, array in inputs.items()}

        return run(inputs)[0]

    def _losses_and_gradients(
        self, inputs: Arrays, rows: int, counted_N: mx.array | None = None
    ) -> tuple[mx.array, Arrays]:
        """Losses (N,) and the derivatives of their sum by hidden (N, D), and by weight and bias where counted is given.

        counted_N: tokens that count; gradients of the others are 0.
        """
        state, words = self._state(inputs), self.chunks[-1][1]
        whole, losses, parts, sums = (0, words), [], [], {}
        learned = [] if counted_N is None else [name for name in ("weight", "bias") if name in inputs]
        for start in range(0, self.targets.size, rows):
            hidden_RD = state["hidden"][start : start + rows]
            targets_R = state["targets"][start : start + rows]
            loss_R, gradient_RV = self._losses_by_logits(state | {"hidden": hidden_RD}, targets_R, whole)
            if counted_N is not None:
                gradient_RV = mx.where(counted_N[start : start + rows, None], gradient_RV, 0.0)
            shares = {"bias": gradient_RV.sum(0)} if "bias" in learned else {}
            gradient_RV = gradient_RV.astype(self.dtype)
            if "weight" in learned:
                shares["weight"] = gradient_RV.T @ hidden_RD
            for name, share in shares.items():
                # A single chunk's share is the gradient; several are added in float32.
                sums[name] = sums[name].astype(mx.float32) + share if name in sums else share
            losses.append(loss_R)
            parts.append(self._back_to_hidden(state, gradient_RV, whole).astype(self.dtype))
            state = _after(state, [losses[-1], parts[-1], *sums.values()])
        return mx.concatenate(losses), {"hidden": mx.concatenate(parts)} | sums

    def _losses_by_logits(self, part: Arrays, targets_R: mx.array, whole: tuple[int, int]) -> tuple[mx.array, mx.array]:
        """Losses (R,) of some tokens, and their derivatives by the products of hidden and head (R, V), float32."""
        logits_RV, capped_RV = self._logits(part, whole)
        column_R, here_R = self._columns(targets_R, whole)
        share, words = self.label_smoothing, whole[1]
        log_sum_R = log_sum_exp(logits_RV)
        own_R = mx.take_along_axis(logits_RV, column_R[:, None], axis=1).squeeze(1)
        loss_R = log_sum_R - (1.0 - share) * own_R
        gradient_RV = exp(logits_RV - log_sum_R[:, None])
        if self.z_loss:
            loss_R = loss_R + self.z_loss * log_sum_R * log_sum_R
            gradient_RV = gradient_RV * (1.0 + (2.0 * self.z_loss) * log_sum_R[:, None])
        if share > 0.0:
            loss_R = loss_R - (share / words) * logits_RV.sum(-1)
            gradient_RV = gradient_RV - share / words
        is_own_RV = mx.arange(words) == column_R[:, None]
        gradient_RV = gradient_RV - mx.where(is_own_RV, 1.0 - share, 0.0)
        if capped_RV is not None:
            gradient_RV = gradient_RV * (1.0 - capped_RV * capped_RV)
        if self.scale != 1.0:
            gradient_RV = gradient_RV * self.scale
        return mx.where(here_R, loss_R, mx.nan), gradient_RV

    def _state(self, inputs: Arrays) -> Arrays:
        """All arrays that a chunk reads, so that they can be tied to the chunk before."""
        # Targets count from the first word here; those of other processes lie outside every chunk.
        state = inputs | {"hidden": inputs["hidden"].astype(self.dtype), "targets": self.targets - self.start}
        if isinstance(self.weight, QuantizedWeight):
            fields = {"weight": self.weight.weight, "scales": self.weight.scales, "biases": self.weight.biases}
            return state | {name: array for name, array in fields.items() if array is not None}
        return state if self.weight is None else state | {"weight": self.weight}

    def _logits(self, state: Arrays, words: tuple[int, int]) -> tuple[mx.array, mx.array | None]:
        """Logits of a chunk, float32 (N, C); and tanh(logits / softcap) or None."""
        if isinstance(self.weight, QuantizedWeight):
            logits = self._quantized_matmul(state, state["hidden"], words, transpose=True)
        else:
            logits = state["hidden"] @ state["weight"][slice(*words)].astype(self.dtype).T
        logits = logits.astype(mx.float32)
        if "bias" in state:
            logits = logits + state["bias"][slice(*words)].astype(mx.float32)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is None:
            return logits, None
        capped = mx.tanh(logits * (1.0 / self.softcap))
        return capped * self.softcap, capped

    def _back_to_hidden(self, state: Arrays, gradient_NC: mx.array, words: tuple[int, int]) -> mx.array:
        if isinstance(self.weight, QuantizedWeight):
            return self._quantized_matmul(state, gradient_NC, words, transpose=False).astype(mx.float32)
        return (gradient_NC @ state["weight"][slice(*words)].astype(self.dtype)).astype(mx.float32)

    def _quantized_matmul(self, state: Arrays, x: mx.array, words: tuple[int, int], transpose: bool) -> mx.array:
        biases = state.get("biases")
        return mx.quantized_matmul(
            x, state["weight"][slice(*words)], state["scales"][slice(*words)],
            None if biases is None else biases[slice(*words)],
            transpose=transpose, group_size=self.weight.group_size, bits=self.weight.bits, mode=self.weight.mode,
        )  # fmt: skip

    @staticmethod
    def _columns(targets_N: mx.array, words: tuple[int, int]) -> tuple[mx.array, mx.array]:
        """Column of each target within a chunk, clipped into it; and whether the target is in the chunk at all."""
        column_N = targets_N - words[0]
        here_N = (column_N >= 0) & (column_N < words[1] - words[0])
        return mx.clip(column_N, 0, words[1] - words[0] - 1), here_N


def _after(arrays: Arrays, done: list[mx.array]) -> Arrays:
    """The same arrays, computed on only when `done` is computed, so that one chunk is alive at a time."""
    return dict(zip(arrays, mx.depends(list(arrays.values()), done), strict=True))


def _chunks(
    tokens: int, vocabulary: int, chunk: int | None, shard: VocabularyShard | None = None
) -> list[tuple[int, int]]:
    """Ranges [start, stop) of words. All processes that share a head have equally many of them."""
    if shard is not None and vocabulary != -(-shard.vocabulary // shard.shards):
        count = len(_chunks(tokens, -(-shard.vocabulary // shard.shards), chunk))
        size = -(-vocabulary // count)
        return [(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]
    if chunk is None:
        words = _CHUNK_BYTES.get(runtime.backend(), _GPU_CHUNK_BYTES) // (4 * max(tokens, 1))
        words = max(words, -(-vocabulary // _MAX_CHUNKS), _CHUNK_MULTIPLE)
        chunk = -(-words // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE
    return [(start, min(start + chunk, vocabulary)) for start in range(0, vocabulary, chunk)]


def _check(
    hidden: mx.array,
    weight: mx.array | QuantizedWeight,
    targets: mx.array,
    bias: mx.array | None,
    softcap: float | None,
    label_smoothing: float,
    chunk: int | None,
    reduction: str,
) -> None:
    if hidden.ndim < 1 or targets.shape != hidden.shape[:-1] or targets.size == 0:
        raise UsageError(f"targets have shape {targets.shape}; expected {hidden.shape[:-1]}, one for each hidden state")
    if not mx.issubdtype(targets.dtype, mx.integer):
        raise UsageError(f"targets are {str(targets.dtype).removeprefix('mlx.core.')}; expected integers")
    words = weight.scales.shape[0] if isinstance(weight, QuantizedWeight) else weight.shape[0]
    if isinstance(weight, mx.array) and (weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]):
        raise UsageError(f"weight has shape {weight.shape}; expected (vocabulary, {hidden.shape[-1]})")
    if bias is not None and bias.shape != (words,):
        raise UsageError(f"bias has shape {bias.shape}; expected ({words},)")
    if softcap is not None and not softcap > 0:
        raise UsageError(f"softcap is {softcap}; expected None or a positive number")
    if not 0.0 <= label_smoothing < 1.0:
        raise UsageError(f"label_smoothing is {label_smoothing}; expected a share, 0 <= label_smoothing < 1")
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk is {chunk}; expected None or a positive number of words")
    if reduction not in _REDUCTIONS:
        raise UsageError(f"unknown reduction {reduction!r}{nearest(reduction, _REDUCTIONS)}")


def one_pass_rows(tokens: int, vocabulary: int, chunk: int | None, *, trained: bool) -> int:
    """Tokens of a chunk of one pass, or 0 where two passes are faster: when few tokens each add to a head that learns.

    chunk: as `fused_linear_cross_entropy` takes it.  trained: whether the head learns.
    """
    pays = _PAYING_ROWS.get(runtime.backend(), _GPU_PAYING_ROWS)
    words = chunk or default_chunk(tokens, vocabulary, trained=trained)
    rows = min(max(words * tokens // vocabulary, 1, -(-tokens // _MAX_CHUNKS)), tokens)
    return rows if not trained or rows >= min(pays, tokens) else 0


def default_chunk(tokens: int, vocabulary: int, *, trained: bool = False) -> int:
    """Words of a chunk that `fused_linear_cross_entropy` takes for N tokens by itself, for memory plans.

    trained: in one pass over a head that learns; on GPUs that has larger chunks.
    """
    start, stop = _chunks(tokens, vocabulary, None)[0]
    if not trained or runtime.backend() == "cpu":
        return stop - start
    return max(stop - start, min(-(-vocabulary * _GPU_PAYING_ROWS // tokens), vocabulary))
