"""Several processes on one model: data, sharded, tensor, pipeline and sequence parallelism over mx.distributed.

world = connect()                                  # joins the processes that `mlxlm launch` or mlx.launch started
mesh = parse_mesh("dp=2,tp=2", world.size)
"""

from __future__ import annotations

from mlxlm.distributed.communicator import Comm
from mlxlm.distributed.joined import Joined, join
from mlxlm.distributed.mesh import Mesh, parse_mesh
from mlxlm.distributed.parallel import Parallel
from mlxlm.distributed.world import World, connect

__all__ = ["Comm", "Joined", "Mesh", "Parallel", "World", "connect", "join", "parse_mesh"]
