"""A command under a mesh: the processes that were started together, and what each of them does of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

from mlxlm.data import ColumnShare, RowShare
from mlxlm.distributed.mesh import AXES, Mesh, parse_mesh
from mlxlm.distributed.parallel import Parallel
from mlxlm.distributed.pipeline import SCHEDULES
from mlxlm.distributed.world import World, connect
from mlxlm.errors import UsageError, nearest
from mlxlm.models import Transformer, TransformerConfig


@dataclass
class Joined:
    """The processes of a command and how they share its work; alone, everything is as without them.

    zero, schedule: see `Parallel`.  share_model: makes `parallel`, which is None alone.
    """

    world: World
    mesh: Mesh
    zero: int = 0
    schedule: str = "1f1b"
    parallel: Parallel | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.world.rank == 0

    def check(self, config: TransformerConfig, batch_size: int) -> None:
        """Raise UsageError where model or batches can't be shared so."""
        self.mesh.check(config)
        if batch_size < self.mesh.dp:
            raise UsageError(
                f"a batch of {batch_size} rows can't be shared by dp={self.mesh.dp}: the batch size is that of all "
                f"processes together; --batch-size {self.mesh.dp} is the least"
            )

    def share_model(self, model: Transformer) -> Parallel | None:
        """Keep this process's part of a model, in place."""
        if not self.alone:
            self.parallel = Parallel(self.world, self.mesh, model, zero=self.zero, schedule=self.schedule)
        return self.parallel

    def serve(self, model: Transformer) -> None:
        """Keep this process's part of a model, in place, for inference: all processes then call it together."""
        parallel = self.share_model(model)
        if parallel is not None:
            parallel.serve()

    def rows(self, source: Any) -> Any:
        """This process's rows, and its part of them, of a source of batches."""
        place = self.mesh.place(self.world.rank)
        if self.mesh.dp > 1:
            source = RowShare(source, place["dp"], self.mesh.dp)
        return source if self.mesh.sp == 1 else ColumnShare(source, place["sp"], self.mesh.sp)

    def serving(self) -> AbstractContextManager[None]:
        """A while in which all processes call the model together, on whole rows, as generation needs it."""
        return nullcontext() if self.parallel is None else self.parallel.serving()

    def save(
        self,
        model: Transformer,
        write: Callable[[Transformer], None],
        like: Callable[[], Transformer] | None = None,
    ) -> None:
        """Let the first process write the whole model; the others give it their parts and wait.

        like: gives a model with the same adapter, whole, into which what is trained is put, and nothing else; default
        for a model without adapters.
        """
        whole: Transformer | None = model
        if self.parallel is not None and like is None:
            whole = self.parallel.whole(model)
        elif self.parallel is not None and like is not None:
            whole = like()
            trained = tree_flatten(whole.trainable_parameters())
            arrays = self.parallel.put_together(model, {name: array.shape for name, array in trained})
            whole.update(tree_unflatten(list(arrays.items())))
        with self.world.first_alone():
            if self.first and whole is not None:
                write(whole)


@contextmanager
def join(
    mesh: str | None,
    *,
    zero: int = 0,
    schedule: str = "1f1b",
    timeout: float | None = None,
    axes: Sequence[str] = ("dp", "tp", "pp", "sp"),
) -> Iterator[Joined]:
    """Join the processes that were started with this one, for the mesh that a text describes.

    axes: that the work can be shared along; without a text all processes along the first of them.
    Left with an error, all others end too. Raises UsageError for a mesh or a `zero` that there are no processes for,
    and for a schedule without stages.
    """
    with connect(timeout=timeout) as world:
        if world.size == 1 and (mesh not in (None, "auto", "dp=1") or zero):
            raise UsageError("--mesh and --zero are for several processes: mlxlm launch -n 2 -- VERB ...")
        chosen = Mesh(**{axes[0]: world.size}) if mesh in (None, "auto") else parse_mesh(mesh, world.size)
        for axis in AXES:
            if getattr(chosen, axis) > 1 and axis not in axes:
                raise UsageError(f"--mesh {chosen}: this command can't be shared along {axis}, but {', '.join(axes)}")
        if schedule not in SCHEDULES:
            raise UsageError(f"unknown schedule of pipeline stages {schedule!r}{nearest(schedule, SCHEDULES)}")
        if schedule != SCHEDULES[0] and chosen.pp == 1:
            raise UsageError(f"{schedule} is a schedule of pipeline stages: give --mesh pp=2 or more too")
        yield Joined(world, chosen, zero, schedule)
