"""A model under a mesh: what this process holds of it, and how losses and gradients come together.

`Parallel` is what `mlxlm.training.Step` and `Trainer` take as their communicator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.distributed.apart import apart
from mlxlm.distributed.buckets import summed
from mlxlm.distributed.communicator import Comm
from mlxlm.distributed.mesh import Mesh
from mlxlm.distributed.pieces import Piece, own_memory
from mlxlm.distributed.pipeline import Pipeline
from mlxlm.distributed.ring_attention import share_rows, take_whole_rows
from mlxlm.distributed.stages import StagePlan, split_stages
from mlxlm.distributed.tensor_parallel import share_tensors
from mlxlm.distributed.tensor_plan import TensorPlan
from mlxlm.distributed.world import World
from mlxlm.distributed.zero import shard, shard_layers, shard_piece, shard_piece_at, shards_of_sum, whole
from mlxlm.errors import UsageError
from mlxlm.models import Transformer

Arrays = dict[str, mx.array]

# Optimizers that look at each number of a parameter by itself, so that parts of parameters can be updated apart.
ELEMENTWISE = ("adamw", "lion", "sgd")


class Parallel:
    """This process's part of a model that the processes of a mesh train or run together.

    model: whole, the same in every process; keeps this process's part only, in place. Its arrays may be lazy, or on
    disk, so that nothing else is ever computed or read.  zero: what replicas share, 0 nothing to 3 everything, see
    zero.py.

    Attributes:
        pieces: of each parameter of the model as it is held, by name.
        data: the communicator of processes with the same part of the model and other data; tensor: of those that share
        matrices; pipeline: the stages, None without.
        lazy: whether all communication is part of MLX's graphs, which can then be compiled.
        recomputes: whether all layers must be computed again for gradients.
        alone: False; see `mlxlm.training.communicator`.

    Raises UsageError for a model that the mesh can't share.
    """

    alone = False

    def __init__(self, world: World, mesh: Mesh, model: Transformer, *, zero: int = 0, schedule: str = "1f1b"):
        if mesh.size != world.size:
            raise UsageError(f"the mesh {mesh} is for {mesh.size} processes, but there are {world.size}")
        if zero not in (0, 1, 2, 3):
            raise UsageError(f"zero is {zero!r}; expected 0, 1, 2 or 3")
        mesh.check(model.config)
        self.world, self.mesh, self.zero, self.config, self.model = world, mesh, zero, model.config, model
        self.place = mesh.place(world.rank)
        self.data = world.comm(mesh.groups("dp", "sp"), "data")
        self.tensor = world.comm(mesh.groups("tp"), "tensor")
        # Processes that hold different parts of one replica, or of all of them where those share it, too.
        self._parts = world.comm(mesh.groups("tp", "pp", *(("dp", "sp") if zero else ())), "parts")
        self._plan = TensorPlan(model.config, mesh.tp, self.place["tp"])
        self.pipeline: Pipeline | None = None
        self._ties: list[tuple[Comm, tuple[int, ...]]] = []
        self._stages = StagePlan.of(model.config, mesh.pp)
        if mesh.pp > 1:
            comm = world.comm(mesh.groups("pp"), "stages")
            split_stages(model, self._stages, comm.index)
            self.pipeline = Pipeline(model, comm, schedule)
            self._ties = self._tied(world)
        self.pieces = share_tensors(model, self.tensor)
        share_rows(model, world.comm(mesh.groups("sp"), "sequence"))
        self._rows = {name: piece.size[0] for name, piece in self.pieces.items() if piece.shape}
        self._in_layers: set[str] = set()
        in_layers = self.zero == 3 and self.data.size > 1
        if model._stored is not None and not in_layers:
            model._stored.finish(model)
        if self.data.size > 1:
            # Of what lies on disk and is shared, reading all to compare it would be reading too much.
            edges = (lambda array: array) if model._stored is None else model._stored.edges
            held = {name: edges(array) for name, array in tree_flatten(model.parameters())}
            self.check_equal(held, "the weights at the start")
        if in_layers:
            self._in_layers = shard_layers(model, self.data)
            for name in self._in_layers:
                self.pieces[name] = shard_piece(self.data, self.pieces[name])
            if model._stored is not None:
                model._stored.finish(model)
            for stack in (getattr(model, name, None) for name in ("encoder", "decoder")):
                if stack is not None and not (self.data.lazy and self.tensor.lazy):
                    stack._aside = apart

    @property
    def compiles(self) -> bool:
        """See `Communicator`: over NCCL compiled steps were not seen to end, so there they must be asked for."""
        return self.world.backend != "nccl"

    @property
    def lazy(self) -> bool:
        """See the class."""
        native = all(comm.lazy for comm in (self.data, self.tensor, self._parts))
        return native and self.pipeline is None and self.mesh.sp == 1

    @property
    def recomputes(self) -> bool:
        """See the class."""
        return bool(self._in_layers)

    @property
    def sharded(self) -> bool:
        """Whether trained weights rest as shards of what the model computes with."""
        return bool(self.zero) and self.data.size > 1

    def _tied(self, world: World) -> list[tuple[Comm, tuple[int, ...]]]:
        """Communicators of the stages that have parameters in common, one for every such set of stages."""
        with mx.stream(mx.cpu):
            names = [name for name, _ in tree_flatten(Transformer(self.config).parameters())]
        sets = dict.fromkeys(holders for name in names if len(holders := self._stages.holders(name)) > 1)
        found = []
        for number, holders in enumerate(sets):
            groups = []
            for ranks in self.mesh.groups("pp"):
                groups += [[rank for stage, rank in enumerate(ranks) if stage in holders]]
                groups += [[rank] for stage, rank in enumerate(ranks) if stage not in holders]
            found.append((world.comm(groups, f"tied weights {number}"), holders))
        return found

    # ------------------------------------------------------------------------------------------------ in a step

    def check_optimizer(self, name: str) -> None:
        """Raise UsageError for an optimizer that needs whole matrices where there are parts of them."""
        if (self.sharded or self.tensor.size > 1) and name not in ELEMENTWISE:
            raise UsageError(
                f"{name} looks at whole matrices, of which each process has a part here; use "
                f"{' or '.join(ELEMENTWISE)}, or data parallelism without zero"
            )

    def keep(self, trained: Arrays) -> Arrays:
        """What this process keeps and updates of the trained weights of its model."""
        if not self.sharded:
            return trained
        for name in trained:
            if name not in self._in_layers:
                self.pieces[name] = shard_piece(self.data, self.pieces[name])
        return {name: a if name in self._in_layers else own_memory(shard(self.data, a)) for name, a in trained.items()}

    def weights(self, kept: Arrays) -> Arrays:
        """The weights that the model computes with, of what is kept."""
        if not self.sharded:
            return kept
        apart = {name: a for name, a in kept.items() if name not in self._in_layers}
        found = whole(self.data, apart, self._rows)
        return {name: found.get(name, a) for name, a in kept.items()}

    def collect(self, gradients: Arrays, kept: Arrays) -> Arrays:
        """What is kept from batch to batch of this process's gradients, in the dtypes of the weights that are kept."""
        if not self.sharded:
            return gradients
        gradients = self._add_up({name: a.astype(kept[name].dtype) for name, a in gradients.items()})
        return gradients if self.zero == 1 else self._shards(gradients)

    def _add_up(self, gradients: Arrays) -> Arrays:
        """Gradients of which each of the processes that share matrices has a part."""
        if self.tensor.size == 1:
            return gradients
        # In the layers of stage 3 gradients are shards by now; the rows of a whole parameter are the same everywhere.
        pieces = {name: self._tensor_piece(name) for name in gradients if self._plan.summed(name)}
        pasted = {
            name: gradients[name] if name in self._in_layers else piece.paste(gradients[name])
            for name, piece in pieces.items()
        }
        found = summed(self.tensor, pasted)
        cut = {name: a if name in self._in_layers else pieces[name].cut(a) for name, a in found.items()}
        return {name: cut.get(name, a) for name, a in gradients.items()}

    def _shards(self, gradients: Arrays) -> Arrays:
        apart = {name: a for name, a in gradients.items() if name not in self._in_layers}
        found = shards_of_sum(self.data, apart)
        return {name: found.get(name, a) for name, a in gradients.items()}

    def reduce(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Loss, count of targets and gradients of all processes together, from those of this one."""
        gradients: Arrays = sums["gradients"] if self.sharded else self._add_up(sums["gradients"])
        if not self.sharded:
            gradients = summed(self.data, gradients)
        elif self.zero == 1:
            gradients = {name: shard(self.data, a) for name, a in summed(self.data, gradients).items()}
        for comm, holders in self._ties:
            shared = {name: a for name, a in gradients.items() if self._stages.holders(name) == holders}
            gradients = gradients | summed(comm, shared)
        loss, count = self.measure(sums["loss"], sums["count"])
        return {"loss": loss, "count": count, "gradients": gradients}

    def measure(self, loss: mx.array, count: mx.array) -> tuple[mx.array, mx.array]:
        """Sum of losses and number of targets of all processes, from those of this one."""
        comms = [self.data] if self.pipeline is None else [self.data, self.pipeline.comm]
        count = count.astype(mx.int32)
        for comm in comms:
            loss, count = comm.sum(loss, "losses"), comm.sum(count, "numbers of targets")
        return loss, count

    def squares(self, gradients: Arrays, square_sum: Callable[[list[mx.array]], mx.array]) -> mx.array:
        """The sum of squares of the whole gradient, of which this process has these parts.  square_sum: of arrays."""
        by_copies: dict[int, list[mx.array]] = {}
        for name, array in gradients.items():
            by_copies.setdefault(self._copies(name), []).append(array)
        # What several processes hold alike counts once.
        total = sum((square_sum(arrays) / copies for copies, arrays in by_copies.items()), mx.zeros(()))
        return self._parts.sum(total, "gradient norm")

    def _copies(self, name: str) -> int:
        """How many of the processes whose squares are added up hold the same part of a parameter."""
        here = self._tensor_piece(name)
        alike = sum(self._plan_of(index).piece(name, here.shape) == here for index in range(self.mesh.tp))
        return alike * len(self._stages.holders(name))

    def _plan_of(self, index: int) -> TensorPlan:
        return TensorPlan(self.config, self.mesh.tp, index)

    def _tensor_piece(self, name: str) -> Piece:
        return self._plan.piece(name, self.pieces[name].shape)

    def traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that may be compiled: what it communicates is in an order of its own."""

        def run(*arguments: Any) -> Any:
            with self.world.own_order():
                return function(*arguments)

        return run

    def serve(self, wanted: bool = True) -> None:
        """From now on calls of the model are of whole rows and go through all stages of a pipeline, as generation needs
        it, or no longer.

        All processes of a replica must then make the same calls.
        """
        if self.pipeline is not None:
            self.pipeline.model.relay(self.pipeline.comm if wanted else None)
        if self.mesh.sp > 1:
            take_whole_rows(self.model, wanted)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """`serve` for a while, between the steps of a run."""
        self.serve()
        try:
            yield
        finally:
            self.serve(False)

    # ------------------------------------------------------------------------------------------------ around steps

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once, and reports."""
        return self.world.rank == 0

    def total(self, tokens: int) -> int:
        """Tokens that all processes have read together; those that share rows count them once."""
        counts = self.place["tp"] == self.place["pp"] == self.place["sp"] == 0
        return sum(self._numbers(tokens if counts else 0, "numbers of tokens"))

    def any_signal(self, number: int | None) -> int | None:
        """The number of a signal that any of the processes got, None when none did."""
        return max(self._numbers(number or 0, "the end of a step")) or None

    def _numbers(self, number: int, what: str) -> list[int]:
        """A number of every process."""
        with self.world.waiting(what):
            return self.world.everyone.stack(mx.array(number, dtype=mx.int32), what).tolist()

    def waiting(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A stretch of work in which processes wait for each other; `World.waiting`."""
        return self.world.waiting(what)

    def check_equal(self, arrays: Arrays, what: str = "weights") -> None:
        """Raise DistributedError, naming the ranks, unless processes with the same part have the same bits in it."""
        from hashlib import sha256

        digest = sha256()
        for name, array in sorted(arrays.items()):
            digest.update(name.encode())
            digest.update(memoryview(mx.contiguous(array.reshape(-1)).view(mx.uint8)))
        self.data.agree(digest.hexdigest(), what)

    def seed(self, seed: int) -> int:
        """A seed of this process's own for what differs with the data, such as dropout."""
        return (seed + 7919 * self.data.index) % 2**32

    def random_states(self, state: Sequence[int]) -> list[list[int]]:
        """The random states of all processes with other data, in their order."""
        return self.data.stack(mx.array(state, dtype=mx.uint32), "random states").tolist()

    def random_state(self, states: Sequence[Sequence[int]]) -> list[int]:
        """This process's of the random states that were saved; one made of them where there were fewer or more."""
        if len(states) == self.data.size:
            return list(states[self.data.index])
        return [int(states[0][0]), (int(states[0][1]) + 7919 * self.data.index) % 2**32]

    # ------------------------------------------------------------------------------------------------ to and from disk

    def piece_of(self, name: str, shape: tuple[int, ...]) -> Piece:
        """What of a whole array this process's array of a shape is: of a trained weight, or of an optimizer's state.

        Arrays that are no parameter's, or of other shapes than theirs, are the same everywhere and whole.
        """
        piece = self.pieces.get(name)
        if piece is None or len(piece.shape) != len(shape) or piece.size[1:] != shape[1:] or piece.size[0] > shape[0]:
            return Piece.whole(shape)
        return piece

    def piece_to_write(self, name: str, shape: tuple[int, ...]) -> Piece | None:
        """`piece_of`, in the first of the processes that have the same; None in all others and where it is empty."""
        piece = self.piece_of(name, shape)
        if name not in self.pieces or piece is not self.pieces[name]:
            here = name not in self.pieces or self._stages.holders(name)[0] == self.place["pp"]
            first = here and all(self.place[axis] == 0 for axis in ("dp", "sp", "tp"))
            return piece if first and (name in self.pieces or self.place["pp"] == 0) else None
        if not piece.count or self.world.rank != self._writer(name, self.sharded):
            return None
        return piece

    def _writer(self, name: str, sharded: bool) -> int:
        """The first rank with this rank's piece of a parameter.  sharded: it is shared by the replicas."""
        shape = self.pieces[name].shape
        mine = self._piece_at(self.world.rank, name, shape, sharded)
        return next(rank for rank in range(self.world.size) if self._piece_at(rank, name, shape, sharded) == mine)

    def _piece_at(self, rank: int, name: str, shape: tuple[int, ...], sharded: bool) -> Piece | None:
        """What a rank has of a parameter, None for nothing."""
        place = self.mesh.place(rank)
        if place["pp"] not in self._stages.holders(name):
            return None
        piece = self._plan_of(place["tp"]).piece(name, shape)
        if sharded:
            piece = shard_piece_at(place["dp"] * self.mesh.sp + place["sp"], self.data.size, piece)
        return piece

    def whole(self, model: Transformer) -> Transformer | None:
        """The whole model, put together in the first process from what all of them hold; None in the others.

        Call it when the model has its weights, after `Step.give_back`. Raises UsageError for a model with adapters.
        """
        with mx.stream(mx.cpu):
            complete = Transformer(self.config)
        shapes = {name: array.shape for name, array in tree_flatten(complete.parameters())}
        if {name for name, _ in tree_flatten(model.parameters())} - shapes.keys():
            raise UsageError("a model with adapters can't be put together from its parts; save the adapters alone")
        arrays = self.put_together(model, shapes)
        if not self.first:
            return None
        complete.update(tree_unflatten(list(arrays.items())))
        complete.source = getattr(model, "source", None)
        return complete.eval()

    def put_together(self, model: Transformer, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Whole parameters of the model in the first process; none in the others.  shapes: of those wanted, by name."""
        held = dict(tree_flatten(model.parameters()))
        arrays: Arrays = {}
        for name, shape in shapes.items():
            sharded = name in self._in_layers or (self.zero == 3 and ".layers." in name and self.data.size > 1)
            sources: dict[Piece, int] = {}
            for rank in range(self.world.size):
                piece = self._piece_at(rank, name, shape, sharded)
                if piece is not None and piece.count:
                    sources.setdefault(piece, rank)
            for piece, rank in sources.items():
                own = held[name][tuple(slice(0, n) for n in piece.size)] if rank == self.world.rank else None
                if rank == self.world.rank and rank != 0:
                    self.world.everyone.send(own, 0, name)
                elif self.first:
                    part = own if own is not None else self.world.everyone.receive(rank, name)
                    if piece.is_whole:
                        arrays[name] = part
                    else:
                        arrays.setdefault(name, mx.zeros(shape, dtype=part.dtype))
                        arrays[name][piece.slices((0,) * len(shape))] = part
            mx.eval(arrays.get(name))
        return arrays
