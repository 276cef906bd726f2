"""What a training step keeps of the activations, counted block by block from the specs.

Counts are floating-point numbers a token: the inputs of every product whose weights are trained, and what the gradients
of norms, attention and activation functions read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mlxlm import runtime
from mlxlm.kernels.attention.device import device_profile
from mlxlm.layers import AttentionSpec, BlockSpec, FeedForwardSpec, ParallelBlockSpec
from mlxlm.models.config import StackSpec, TransformerConfig

if TYPE_CHECKING:
    from mlxlm.training.plan import PlanSettings

_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
_SCORES = 5  # arrays of the size of a block's scores that exist at once in the backward pass


# Arrays of the size of its input that the gradient of an activation function keeps, the input included. Measured on the
# CPU for "silu" and "gelu_tanh"; the others follow from their formulas.
_KEPT_BY_ACTIVATION = {"silu": 2, "gelu_tanh": 5, "gelu": 4, "relu": 1, "identity": 1}
_KEPT_BY_OTHERS = 4


class Activations(NamedTuple):
    """Bytes: kept for the gradients, of the layer that is computed again, of the scores; and tokens the head reads."""

    kept: int
    recomputed: int
    attention: int
    target_length: int


def activations_of(config: TransformerConfig, settings: PlanSettings, full: bool) -> Activations:
    """The activations of one pass.  full: whether the weights of the blocks are trained."""
    width, rows = _WIDTHS[settings.dtype], settings.batch_size
    target_length = settings.length
    if config.has_memory:
        target_length = settings.target_length or settings.length
    kept, recomputed, attention = 0, 0, 0
    for stack, length in ((config.encoder, settings.length), (config.decoder, target_length)):
        if stack is None:
            continue
        one, largest, scores = _stack(stack, settings, rows, length, full)
        kept, recomputed, attention = kept + one, max(recomputed, largest), max(attention, scores)
    embedded = rows * (settings.length + (target_length if config.has_memory else 0)) * config.dim
    return Activations((kept + 2 * embedded) * width, recomputed * width, attention, target_length)


def _stack(stack: StackSpec, settings: PlanSettings, rows: int, length: int, full: bool) -> tuple[int, int, int]:
    """Numbers kept, numbers of the largest layer that is computed again, bytes of scores."""
    again = len(stack.layers) if settings.recompute_layers < 0 else settings.recompute_layers
    kept, largest, scores = 0, 0, 0
    for index, block in enumerate(stack.layers):
        own = rows * length * block_numbers(block, full, memory=settings.length / length)
        dense = rows * _dense_scores(block.attention, rows, length, settings)
        scores = max(scores, _score_bytes(block.attention, rows, length))
        if index < again:
            kept += rows * length * block.attention.dim
            largest = max(largest, int(own + dense))
        else:
            kept += int(own + dense)
    return kept, largest, scores


def block_numbers(block: BlockSpec | ParallelBlockSpec, full: bool, memory: float = 1.0) -> float:
    """Numbers that a block keeps for each of its tokens.  memory: tokens of the encoder for each."""
    dim = block.attention.dim
    total = attention_numbers(block.attention, full) + feed_forward_numbers(block.feed_forward, full)
    total += 2 * dim + (2 * dim if full else 0)  # the inputs of both norms, and what they give to the products
    if isinstance(block, BlockSpec) and block.cross_attention is not None:
        total += attention_numbers(block.cross_attention, full, memory) + (2 if full else 1) * dim
    return total


def attention_numbers(spec: AttentionSpec, full: bool, memory: float = 1.0) -> float:
    """Queries, keys and values, the output and each row's log-sum-exp; the output in another order for its product."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return queries * (3 if full else 2) + 2 * keys * memory + spec.num_heads


def feed_forward_numbers(spec: FeedForwardSpec, full: bool) -> float:
    """What the activation function reads and makes, and the input of the last product."""
    inner = _KEPT_BY_ACTIVATION.get(spec.activation, _KEPT_BY_OTHERS)
    return spec.hidden_dim * (inner + (1 if spec.gated else 0) + (1 if full else 0))


def _dense_scores(spec: AttentionSpec, rows: int, length: int, settings: PlanSettings) -> int:
    """Numbers of scores of a row that a dense implementation keeps, where the scores are few; else 0."""
    size = 4 * rows * spec.num_heads * length * length
    backend = runtime.backend()
    if backend == "metal" or size > device_profile(backend).short_bytes:
        return 0
    return spec.num_heads * length * length


def _score_bytes(spec: AttentionSpec, rows: int, length: int) -> int:
    """Scores that the tiles of the backward pass hold at once."""
    backend = runtime.backend()
    if backend == "metal":
        return 0
    profile = device_profile(backend)
    keys = min(length, spec.window or length)
    return min(_SCORES * 4 * rows * spec.num_heads * length * keys, profile.block_bytes * max(length, 4096) // 4096)
