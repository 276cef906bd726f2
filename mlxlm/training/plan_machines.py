"""Which mesh suits given machines: every way to share a run among them, those that fit by the time of a step.

The cost model, deliberately simple: arithmetic at one speed; every message after the other at the link's latency and
bandwidth, never hidden behind arithmetic; a pipeline of p stages and m batches takes (m + p - 1) / m of its slowest
stage's batches. It orders meshes and scales measured steps; it doesn't replace a measurement.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlxlm.distributed import Mesh
from mlxlm.errors import UsageError, nearest
from mlxlm.training.plan import PlanSettings, readable
from mlxlm.training.plan_mesh import Layout, Model, Shares
from mlxlm.training.plan_traffic import RankPlan, predicted

USABLE = 0.75  # of a machine's memory, as `working_set` takes where a device says nothing


@dataclass(frozen=True)
class Link:
    """Between two machines.  bandwidth: bytes a second.  latency: seconds of a message."""

    bandwidth: float
    latency: float


# Nominal bandwidths of the standards; the latencies are assumptions, of a message over TCP but for Thunderbolt 5, where
# MLX can read another machine's memory directly.
LINKS = {
    "ethernet1": Link(1e9 / 8, 100e-6),
    "ethernet10": Link(10e9 / 8, 100e-6),
    "thunderbolt4": Link(40e9 / 8, 100e-6),
    "thunderbolt5": Link(80e9 / 8, 20e-6),
}
_LATENCY = 100e-6
_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Equal machines with one process each.

    count: how many.  memory: bytes of each.  link: between any two.  speed: floating-point operations a second that
    training reaches on one, not its peak.
    """

    count: int
    memory: int
    link: Link
    speed: float

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"{self.count} machines; expected at least 1")
        if min(self.memory, self.speed, self.link.bandwidth) <= 0:
            raise UsageError("memory, speed and bandwidth of machines are above 0")

    @property
    def usable(self) -> int:
        """Bytes that a process may take."""
        return int(USABLE * self.memory)


def link_of(text: str) -> Link:
    """A link by its name in LINKS or its bandwidth, as 10Gb/s (bits) or 1.2GB/s (bytes)."""
    if text in LINKS:
        return LINKS[text]
    match = re.fullmatch(r"\s*([\d.]+)\s*([kKmMgGtT]?)(b|B)(?:it)?(?:/s|ps)\s*", text)
    if match is None or not _positive(match[1]):
        raise UsageError(f"unknown link {text!r}{nearest(text, LINKS)}; or a bandwidth such as 10Gb/s or 1.2GB/s")
    return Link(float(match[1]) * _SCALES[match[2].lower()] / (8 if match[3] == "b" else 1), _LATENCY)


def bytes_of(text: str) -> int:
    """Bytes of a text such as 64GB, in powers of 1000."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)b?\s*", text, re.I)
    if match is None or not _positive(match[1]):
        raise UsageError(f"{text!r} is no amount of memory; expected such as 64GB")
    return int(float(match[1]) * _SCALES[match[2].lower()])


def _positive(text: str) -> bool:
    return re.fullmatch(r"\d+\.?\d*|\.\d+", text) is not None and float(text) > 0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step.  arithmetic, communication: of the slowest process.  waiting: of its pipeline's stages."""

    arithmetic: float
    communication: float
    waiting: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.arithmetic + self.communication + self.waiting


def step_time(plan: Sequence[RankPlan], batches: int, link: Link, speed: float) -> StepTime:
    """The time of a step by the cost model above.  batches: of an update.  speed: operations a second."""

    def talk(rank: RankPlan, in_batch: bool) -> float:
        return sum(
            one.calls * link.latency + one.sent / link.bandwidth for one in rank.traffic if one.in_batch == in_batch
        )

    found = []
    for rank in plan:
        arithmetic, inside, after = rank.operations / speed, talk(rank, True), talk(rank, False)
        waiting = (len(plan) - 1) / batches * (arithmetic + inside)
        found.append(StepTime(arithmetic=arithmetic, communication=inside + after, waiting=waiting))
    return max(found, key=lambda time: time.total)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with settings for it.

    peak: bytes of its largest process.  sent: bytes that the one that talks most sends in a step.
    """

    layout: Layout
    settings: PlanSettings
    peak: int
    sent: float
    time: StepTime


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """fitting: best first.  others: why each other layout doesn't do, those with the least peak first."""

    fitting: tuple[Candidate, ...]
    others: tuple[tuple[Layout, str], ...]


def recommend(model: Model, settings: PlanSettings, machines: Machines, schedule: str = "1f1b") -> Recommendation:
    """Every mesh of all machines with every stage of ZeRO, those that fit by the time of a step.

    Where a layout doesn't fit as asked, with all layers computed again, and then with smaller passes of the same rows.
    """
    shares, fitting, short, wrong = Shares(model), [], [], []
    for mesh in meshes(machines.count):
        for zero in (0, 1, 2, 3) if mesh.dp * mesh.sp > 1 else (0,):
            layout = Layout(mesh=mesh, zero=zero, schedule=schedule)
            try:
                choices = _choices(settings, mesh)
                best = _candidate(shares, layout, choices.pop(), machines)  # that of the least memory
            except UsageError as error:
                wrong.append((layout, str(error)))
                if zero == 0:
                    break  # the mesh itself
                continue
            if best.peak > machines.usable:
                short.append(best)
                continue
            others = (_candidate(shares, layout, choice, machines) for choice in choices)
            fitting.append(next((one for one in others if one.peak <= machines.usable), best))
    fitting.sort(key=lambda one: (one.time.total, one.peak))
    short.sort(key=lambda one: one.peak)
    lacking = [(one.layout, f"needs {readable(one.peak)} of {readable(machines.usable)}") for one in short]
    return Recommendation(fitting=tuple(fitting), others=(*lacking, *wrong))


def _choices(settings: PlanSettings, mesh: Mesh) -> list[PlanSettings]:
    """As asked, then recomputed, then in smaller passes too, down to a row for each replica."""
    found = [settings]
    if settings.recompute_layers >= 0:
        found.append(replace(settings, recompute_layers=-1))
    while found[-1].batch_size % 2 == 0 and found[-1].batch_size // 2 >= mesh.dp:
        last = found[-1]
        found.append(replace(last, batch_size=last.batch_size // 2, accumulation=2 * last.accumulation))
    return found


def _candidate(shares: Shares, layout: Layout, settings: PlanSettings, machines: Machines) -> Candidate:
    plan = predicted(shares, layout, settings)
    return Candidate(
        layout=layout, settings=settings, peak=max(rank.memory.peak for rank in plan),
        sent=max(sum(one.sent for one in rank.traffic) for rank in plan),
        time=step_time(plan, settings.accumulation, machines.link, machines.speed),
    )  # fmt: skip


def meshes(count: int) -> list[Mesh]:
    """All meshes of so many processes."""

    def divisors(number: int) -> list[int]:
        return [n for n in range(1, number + 1) if number % n == 0]

    return [
        Mesh(dp=count // tp // pp // sp, tp=tp, pp=pp, sp=sp)
        for tp in divisors(count)
        for pp in divisors(count // tp)
        for sp in divisors(count // tp // pp)
    ]
