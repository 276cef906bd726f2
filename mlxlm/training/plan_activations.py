"""What a training step keeps of the activations, counted block by block from the specs.

Counts are floating-point numbers a token: the inputs of every product whose weights are trained, and what the gradients
of norms, attention and activation functions read. Blocks before the first trained weight keep nothing.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from mlxlm import runtime
from mlxlm.kernels.attention.blocks import planned_bytes
from mlxlm.kernels.attention.device import device_profile
from mlxlm.kernels.attention.problem import AttentionProblem
from mlxlm.layers import AttentionSpec, BlockSpec, FeedForwardSpec, ParallelBlockSpec
from mlxlm.models.config import StackSpec, TransformerConfig
from mlxlm.training.plan_weights import WIDTHS, Weights

if TYPE_CHECKING:
    from mlxlm.training.plan import PlanSettings

# What the backward pass of a block works with beside what was kept, as a share of that; of a block that is computed
# again and so made anew, without and with a gate. Measured on the CPU, as all constants here.
_WORK = 0.8
_AGAIN = (1.4, 1.65)

# Arrays of the size of its input that the gradient of an activation function keeps, the input included. Measured on the
# CPU for "silu", "gelu" and "gelu_tanh"; the others follow from their formulas. A gated layer keeps both factors too.
_KEPT_BY_ACTIVATION = {"silu": 2, "gelu_tanh": 5, "gelu": 2, "relu": 1, "identity": 1}
_KEPT_BY_OTHERS = 4


class Activations(NamedTuple):
    """Bytes: kept for the gradients, and what the backward pass of one block works with; tokens that the head reads."""

    kept: int
    backward: int
    target_length: int


def activations_of(config: TransformerConfig, settings: PlanSettings, weights: Weights) -> Activations:
    """The activations of one pass."""
    width, rows = WIDTHS[settings.dtype], settings.batch_size
    target_length = settings.length
    if config.has_memory:
        target_length = settings.target_length or settings.length
    kept, backward = 0, 0
    below = bool(weights.under("embeddings") or weights.under("prompt"))  # whether gradients go through the blocks
    embedded, memory = 0.0, 0
    for name, length in (("encoder", settings.length), ("decoder", target_length)):
        stack = getattr(config, name)
        if stack is None:
            continue
        ahead, keys = weights.virtual.get(name, (0, 0))
        length += ahead
        trained = Trained(weights, f"{name}.layers", below)
        one, largest = stack_activations(stack, settings, rows, length, trained, memory=memory, prefix=keys)
        below = below or bool(weights.under(name))  # a decoder behind an encoder that learns
        kept, backward, memory = kept + one, max(backward, largest), length
        masks = _masks(config.embeddings.dropout) + _masks(stack.dropout)
        embedded += rows * length * config.dim * (2 + masks)
    return Activations(int((kept + embedded) * width), int(backward), target_length)


class Trained(NamedTuple):
    """What is trained of a stack's layers.  path: theirs.  below: whether anything before them is trained."""

    weights: Weights
    path: str
    below: bool

    def first(self, layers: int) -> int:
        """The first layer that keeps something for its gradients; `layers` when none does."""
        if self.below:
            return 0
        return next((index for index in range(layers) if self.weights.under(f"{self.path}.{index}")), layers)


def stack_activations(
    stack: StackSpec,
    settings: PlanSettings,
    rows: int,
    length: int,
    trained: Trained,
    *,
    memory: int | None = None,
    prefix: int = 0,
) -> tuple[float, float]:
    """Numbers kept, and bytes that the backward pass of the largest layer works with.

    memory: tokens of the encoder's rows, default those of the settings.  prefix: virtual keys of each layer.
    """
    memory = settings.length if memory is None else memory
    again = len(stack.layers) if settings.recompute_layers < 0 else settings.recompute_layers
    kept, backward, width = 0.0, 0.0, WIDTHS[settings.dtype]
    for index in range(trained.first(len(stack.layers)), len(stack.layers)):
        block, path = stack.layers[index], f"{trained.path}.{index}"
        own = (
            rows
            * length
            * block_numbers(block, trained.weights, path, memory=memory / length, keys=1 + prefix / length)
        )
        if index < again:
            kept += rows * length * block.attention.dim
            share = _AGAIN[block.feed_forward.gated]
        else:
            kept += own
            share = _WORK
        # When the scores are at work, what the feed-forward layer kept is free again, about half.
        scores = _score_bytes(block.attention, settings.dtype, rows, length, prefix)
        scores -= (0 if index < again else 0.5) * own * width
        backward = max(backward, share * own * width, scores)
    return kept, backward


def block_numbers(
    block: BlockSpec | ParallelBlockSpec, weights: Weights, path: str, *, memory: float = 1.0, keys: float = 1.0
) -> float:
    """Numbers that a block keeps for each of its tokens.  path: its.  memory: tokens of the encoder for each.  keys: of
    self-attention for each, virtual ones included.
    """
    total = attention_numbers(block.attention, weights, f"{path}.attention", keys)
    total += dropout_numbers(block)
    total += feed_forward_numbers(block.feed_forward, weights, f"{path}.feed_forward")
    # The inputs of both norms, and where their scales are trained what they are multiplied with.
    total += (4 if weights.feeds_own_products(path) else 2) * block.attention.dim
    total += adapter_numbers(weights, path)
    if isinstance(block, BlockSpec) and block.cross_attention is not None:
        cross = f"{path}.cross_attention"
        total += attention_numbers(block.cross_attention, weights, cross, memory) + block.cross_attention.dim
    return total


def dropout_numbers(block: BlockSpec | ParallelBlockSpec) -> float:
    """The masks of what is dropped, in the dtype of the computation; those of attention are drawn again."""
    total = block.feed_forward.hidden_dim * _masks(block.feed_forward.dropout)
    if isinstance(block, ParallelBlockSpec):
        return total + 2 * block.attention.dim * _masks(block.dropout)
    residuals = (block.attention_residual, block.cross_attention_residual, block.feed_forward_residual)
    return total + block.attention.dim * sum(_masks(one.dropout) for one in residuals if one is not None)


def _masks(dropout: float) -> int:
    return 1 if dropout else 0


def attention_numbers(spec: AttentionSpec, weights: Weights, path: str, memory: float = 1.0) -> float:
    """Queries, keys and values, the output and each row's log-sum-exp; the input of the first products, and the output
    in another order, that of the last, where gradients need them.  memory: keys for each query.
    """
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    total = 2 * queries + 2 * keys * memory + spec.num_heads
    if any(weights.feeds_product(f"{path}.{name}") for name in ("query", "key", "value", "query_key_value")):
        total += spec.dim
    if weights.feeds_product(f"{path}.output"):
        total += queries
    return total


def feed_forward_numbers(spec: FeedForwardSpec, weights: Weights, path: str) -> float:
    """What the activation function reads and makes, and the inputs of the products where gradients need them."""
    total = spec.hidden_dim * (_KEPT_BY_ACTIVATION.get(spec.activation, _KEPT_BY_OTHERS) + (2 if spec.gated else 0))
    if any(weights.feeds_product(f"{path}.{name}") for name in ("up", "gate")):
        total += spec.dim
    if weights.feeds_product(f"{path}.down"):
        total += spec.hidden_dim
    return total


def adapter_numbers(weights: Weights, path: str) -> float:
    """What the parts that adapters add to a block keep: the inputs of their matrices and vectors.

    The input of `lora_a` is that of the layer it is added to, counted there. A magnitude (DoRA) needs both sums.
    """
    total = 0.0
    for name, shape in weights.under(path).items():
        part = name.rpartition(".")[2]
        if ".adapters." not in name or part in ("lora_a", "bias"):
            continue
        total += 2 * shape[0] if part == "magnitude" else prod(shape[1:]) if len(shape) > 1 else shape[0]
    return total


def _score_bytes(spec: AttentionSpec, dtype: str, rows: int, length: int, prefix: int) -> float:
    """What the tiled path's backward pass holds by its own plan, results and sums included; nothing with our kernels.

    The CPU makes one block at a time where a limit on memory makes it wait, as `held_to` does.
    """
    backend = runtime.backend()
    if backend == "metal":
        return 0
    problem = AttentionProblem(
        dtype=dtype, batch=rows, heads=spec.num_heads, kv_heads=spec.num_kv_heads, query_length=length,
        key_length=length + prefix, head_dim=spec.head_dim, value_dim=spec.head_dim, causal=spec.causal,
        window=spec.window, query_offset=prefix,
    )  # fmt: skip
    return planned_bytes(problem, device_profile(backend), waiting=backend == "cpu")
