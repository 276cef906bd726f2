"""What `mlxlm plan` prints with --mesh or --machines."""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxlm.models import Transformer
    from mlxlm.training.plan import PlanSettings

_SHOWN = 12  # meshes of each kind


def show_mesh(network: Transformer, settings: PlanSettings, mesh: str | None, zero: int, schedule: str) -> None:
    """Print memory, traffic and batches in flight of the processes of each stage."""
    from mlxlm.distributed import parse_mesh
    from mlxlm.errors import UsageError
    from mlxlm.training.plan import readable
    from mlxlm.training.plan_mesh import Layout
    from mlxlm.training.plan_traffic import predict_mesh

    if mesh is None:
        raise UsageError("--zero goes with --mesh, as --mesh dp=2")
    chosen = parse_mesh(mesh, prod(map(int, re.findall(r"=\s*(\d+)", mesh))))
    for rank in predict_mesh(network, settings, Layout(mesh=chosen, zero=zero, schedule=schedule)):
        each = f"each of {chosen.size // chosen.pp} processes"
        print(f"stage {rank.stage} of {chosen.pp}, {each}" if chosen.pp > 1 else each)
        for name, size in rank.memory.parts().items():
            print(f"  {name.replace('_', ' '):30}{readable(size):>12}")
        print(f"  {'peak':30}{readable(rank.memory.peak):>12}")
        if chosen.pp > 1:
            print(f"  {'batches in flight':30}{rank.in_flight:>12}  inputs of {readable(rank.handed)} each")
        for one in rank.traffic:
            how = (
                f"{one.operation} over {one.ranks} of {one.group}, {one.calls} calls of {readable(one.payload)} in all"
            )
            print(f"  {'sent: ' + one.kind:30}{readable(int(one.sent)):>12}  {how}")
        print(f"  {'sent in a step':30}{readable(int(sum(one.sent for one in rank.traffic))):>12}")


def show_recommendation(
    network: Transformer, settings: PlanSettings, schedule: str, count: int, memory: str, link: str, tflops: float
) -> None:
    """Print the meshes that fit, best first, and why others don't. Raises MemoryPlanError when none does."""
    from mlxlm.training.plan import MemoryPlanError, readable
    from mlxlm.training.plan_machines import USABLE, Machines, bytes_of, link_of, recommend

    machines = Machines(count=count, memory=bytes_of(memory), link=link_of(link), speed=tflops * 1e12)
    found = recommend(network, settings, machines, schedule)
    print(
        f"assumed: {tflops:g} TFLOP/s a machine; {readable(int(machines.link.bandwidth))}/s and "
        f"{machines.link.latency * 1e6:g} us a message, nothing of it behind arithmetic; {USABLE:.0%} of the memory"
    )
    if found.fitting:
        print(f"{'mesh':26}{'s/step':>9}{'arithmetic':>12}{'talking':>9}{'waiting':>9}{'peak':>10}{'sent':>10}  flags")
    for one in found.fitting[:_SHOWN]:
        time = one.time
        print(
            f"{one.layout!s:26}{time.total:9.3g}{time.arithmetic:12.3g}{time.communication:9.3g}{time.waiting:9.3g}"
            f"{readable(one.peak):>10}{readable(int(one.sent)):>10}  --batch-size {one.settings.batch_size} "
            f"--grad-accumulation-steps {one.settings.accumulation} --recompute-layers {one.settings.recompute_layers}"
        )
    if len(found.fitting) > _SHOWN:
        print(f"and {len(found.fitting) - _SHOWN} slower ones that fit")
    for layout, why in found.others[:_SHOWN]:
        print(f"{layout!s:26} not: {why}")
    if len(found.others) > _SHOWN:
        print(f"and {len(found.others) - _SHOWN} more that don't do")
    if not found.fitting:
        layout, why = found.others[0]
        raise MemoryPlanError(f"no mesh of {count} machines does; the nearest is {layout}: {why}")
