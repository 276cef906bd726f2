"""The world: all processes of a run, and the watch that ends the run everywhere when one of them fails."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import mlx.core as mx

from mlxlm.distributed.links import Links, own_address
from mlxlm.errors import DistributedError, MlxlmError, UsageError

if TYPE_CHECKING:
    from mlxlm.distributed.communicator import Comm

# What a backend of mx.distributed can do by itself; links do the rest. Sends between pairs always take links: they
# exist in one or another form in every backend, but only here with a time limit and without an order to keep.
SPLITS, SCATTERS = frozenset({"mpi", "nccl"}), frozenset({"jaccl", "nccl"})
DEFAULT_TIMEOUT = 300.0
_JOIN_TIMEOUT = 60.0  # at least; processes start at different moments
_CARD_BYTES = 512  # of the text that ranks introduce themselves with


def backend_of(environment: dict[str, str] | os._Environ[str] = os.environ) -> str | None:
    """The backend that whoever started this process has prepared; None when it was started alone."""
    marks = (
        ("jaccl", ("MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR")),
        ("nccl", ("NCCL_HOST_IP",)),
        ("ring", ("MLX_HOSTFILE",)),
        ("mpi", ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")),
    )
    for name, variables in marks:
        if any(environment.get(variable) for variable in variables):
            return name
    return None


class World:
    """The processes of a run: this one's rank, their number, and communicators among some of them.

    Made by `connect`. A context manager: left with an error it tells all others, which end too.

    While ranks wait for each other, a thread sends signs of life. A rank whose connection ends, or which gives no sign
    or doesn't come to what others wait for within `timeout` seconds, ends the run: this process prints a line that
    names the rank and the operation and exits with status 75, even where MLX itself would wait forever.
    """

    def __init__(self, group: mx.distributed.Group | None, backend: str | None, timeout: float, host: str | None):
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.backend, self.timeout, self.group = backend, timeout, group
        self._comms: dict[tuple[tuple[int, ...], str], Comm] = {}
        self._waiting: tuple[str, float] | None = None
        self._seen: dict[int, float] = {}
        self._heard: dict[int, dict] = {}
        self._closed = threading.Event()
        self._lost: list[int] = []
        self.links: Links | None = None
        # The result of the newest operation of the backend, which the next one waits for.
        self.last_operation: mx.array | None = None
        self.last_asked = ""  # what it is for
        if self.size > 1:
            self.links = Links(self.rank, self.size, self._exchange, own_address(host), self._lost.append)
            self._seen = dict.fromkeys(range(self.size), time.monotonic())
            self._heard = {rank: {} for rank in range(self.size)}
            # From here on every end of a process is seen by all others.
            self._send_signs()
            for rank in range(self.size):
                if rank != self.rank:
                    self.links.receive(rank, "status", max(timeout, _JOIN_TIMEOUT), "a first sign of life")
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def comm(self, groups: Sequence[Sequence[int]], name: str) -> Comm:
        """The communicator of this rank's group. All ranks must call this with the same groups, which are disjoint."""
        from mlxlm.distributed.communicator import Comm

        mine = [tuple(ranks) for ranks in groups if self.rank in ranks]
        if len(mine) != 1:
            raise UsageError(f"rank {self.rank} is in {len(mine)} of the groups of {name!r}; expected one")
        key = mine[0], name
        if key not in self._comms:
            whole = mine[0] == tuple(range(self.size))
            native = self.group if whole else None
            talking = any(len(ranks) > 1 for ranks in groups)
            if not whole and talking and self.backend in SPLITS and self.group is not None:
                color = next(i for i, ranks in enumerate(groups) if self.rank in ranks)
                native = self.group.split(color, mine[0].index(self.rank))
            self._comms[key] = Comm(self, mine[0], name, native if len(mine[0]) > 1 else None)
        return self._comms[key]

    @property
    def processes_here(self) -> int:
        """How many of the ranks are on this machine and share its memory, this one included."""
        return 1 if self.links is None else self.links.machines.count(self.links.machines[self.rank])

    @property
    def everyone(self) -> Comm:
        """The communicator of all ranks."""
        return self.comm([tuple(range(self.size))], "world")

    @contextlib.contextmanager
    def waiting(self, what: str, *, limited: bool = True, together: bool = True) -> Iterator[None]:
        """A stretch of work that waits for other ranks; longer than the time limit, it ends the run.

        limited: whether that limit holds; else the others may take any time, as long as they live.  together: whether
        all ranks are at it; then no result that is pending, and may be large, is kept beyond it.
        """
        before, self._waiting = self._waiting, (what, time.monotonic() if limited else math.inf)
        try:
            yield
            if together:
                self.settle()
        except RuntimeError as error:
            # Some backends notice a broken connection themselves, but can't say whose.
            raise DistributedError(f"rank {self.rank} could not do {what!r}: {self._blame() or error}") from error
        finally:
            self._waiting = before

    def settle(self) -> None:
        """Compute what the backend was asked for and is pending.

        Whoever waits for a message must have done so: its sender may be computing something that takes part of this.
        """
        if self.last_operation is not None:
            with self.waiting(self.last_asked, together=False):
                mx.eval(self.last_operation)
            self.last_operation = None

    def texts(self, text: str, what: str = "texts", *, limited: bool = True) -> list[str]:
        """A text of every rank, on all of them, in their order.  what: for error messages.  limited: see `waiting`."""
        if self.size == 1:
            return [text]
        comm, data = self.everyone, text.encode()
        with self.waiting(what, limited=limited):
            longest = max(comm.stack(mx.array(len(data), dtype=mx.int32), what).tolist())
            padded = mx.array(list(data.ljust(longest + 1)), dtype=mx.uint8)
            return [bytes(row).decode().rstrip(" ") for row in comm.stack(padded, what).tolist()]

    def share(self, value: Any, what: str = "a value of the first rank", *, limited: bool = True) -> Any:
        """What the first rank gives, as JSON can hold it, on all of them.  limited: see `waiting`."""
        return json.loads(self.texts(json.dumps(value) if self.rank == 0 else "", what, limited=limited)[0])

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Work that the first rank does before all others, so that they find it done; it may take any time."""
        if self.rank == 0:
            yield
        if self.size > 1:
            with self.waiting("the first rank's work", limited=False):
                mx.eval(self.everyone.sum(mx.array(1), "the first rank's work"))
        if self.rank:
            yield

    @contextlib.contextmanager
    def own_order(self) -> Iterator[None]:
        """A stretch whose operations wait for each other, but for none before: what a compiled function traces."""
        self.last_operation = None
        try:
            yield
        finally:
            self.last_operation = None

    def close(self) -> None:
        """Take leave: the others know then that this rank has finished well."""
        if self._closed.is_set():
            return
        self._closed.set()
        for comm in self._comms.values():
            comm.native = None  # MPI wants its groups gone before the process ends
        self._comms.clear()
        self.last_operation = self.group = None
        if self.links is not None:
            self.links.close()

    def abort(self, reason: str) -> None:
        """Tell all others that the run is over, and why."""
        self._closed.set()
        for rank in range(self.size) if self.links is not None else ():
            if rank != self.rank and rank not in self.links.lost:
                with contextlib.suppress(DistributedError):
                    self.links.send(rank, "status", {"abort": reason, "what": "the end of the run"})

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
            return
        # What MLX says when a connection breaks names nobody.
        lost = self._blame() if self.size > 1 and isinstance(error, RuntimeError) else ""
        self.abort(f"rank {self.rank} ended: {error if isinstance(error, MlxlmError) else kind}")
        if lost:
            raise DistributedError(f"rank {self.rank} can't go on behind {self.last_asked!r}: {lost}") from error

    def _exchange(self, text: str) -> list[str]:
        """A short text of every rank, over the backend."""
        card = text.encode().ljust(_CARD_BYTES)
        if len(card) > _CARD_BYTES:
            raise UsageError(f"a rank's introduction has {len(card)} bytes; {_CARD_BYTES} are the most")
        gathered = mx.distributed.all_gather(mx.array(list(card), dtype=mx.uint8), group=self.group)
        return [bytes(row).decode().strip() for row in gathered.reshape(self.size, -1).tolist()]

    # ------------------------------------------------------------------------------------------------ the watch

    def _watch(self) -> None:
        interval = min(1.0, self.timeout / 8) * max(1.0, self.size / 32)
        while not self._closed.wait(interval):
            self._send_signs()
            self._read_signs()
            if self._lost:
                self._mourn(self._lost[0])
            now = time.monotonic()
            for rank, seen in self._seen.items():
                silent = rank != self.rank and rank not in self.links.lost and now - seen > self.timeout
                if silent and not self._closed.is_set():
                    self._end(f"rank {rank} has given no sign of life for {self.timeout:g} s{self._doing()}")
            waiting = self._waiting
            if waiting is not None and now - waiting[1] > self.timeout:
                self._end(self._accuse(waiting[0]))

    def _send_signs(self) -> None:
        waiting = self._waiting
        sign = {"waiting": None if waiting is None else waiting[0], "what": "a sign of life"}
        for rank in range(self.size):
            if rank != self.rank and rank not in self.links.lost:
                with contextlib.suppress(DistributedError):
                    self.links.send(rank, "status", sign)

    def _read_signs(self) -> None:
        for rank in range(self.size):
            while rank != self.rank and (message := self.links.pending(rank, "status")) is not None:
                self._seen[rank], self._heard[rank] = time.monotonic(), message.header
                if "abort" in message.header and not self._closed.is_set():
                    self._end(message.header["abort"], first=False)

    def _mourn(self, rank: int) -> None:
        """A rank is gone: this one ends too, the lowest survivor first, so that one of them tells the user."""
        survivors = [one for one in range(self.size) if one not in self._lost]
        pause = 1.0 + 0.3 * survivors.index(self.rank)
        ends = time.monotonic() + pause
        while time.monotonic() < ends:
            if self._closed.wait(0.1):
                return
            self._read_signs()
        self._end(self._blame() + self._doing())

    def _blame(self) -> str:
        """Which rank is gone, if one is; the connection's end may come a moment after its consequences."""
        ends = time.monotonic() + 1.0
        while not self._lost and time.monotonic() < ends:
            time.sleep(0.05)
        return f"rank {self._lost[0]} is gone: its process ended or its machine can't be reached" if self._lost else ""

    def _doing(self) -> str:
        waiting = self._waiting
        return "" if waiting is None else f", while rank {self.rank} waited for {waiting[0]!r}"

    def _accuse(self, what: str) -> str:
        others = {rank: sign.get("waiting") for rank, sign in self._heard.items() if rank != self.rank}
        busy = [rank for rank, waiting in others.items() if waiting is None]
        said = f"rank {self.rank} waited for {what!r} for {self.timeout:g} s"
        if busy:
            return f"{said}; rank{'s' * (len(busy) > 1)} {', '.join(map(str, busy))} did not come to it"
        apart = [f"rank {rank} for {waiting!r}" for rank, waiting in others.items() if waiting != what]
        return f"{said}; the ranks disagree: " + ", ".join(apart) if apart else f"{said}, and so did all others"

    def _end(self, reason: str, first: bool = True) -> NoReturn:
        if first:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            self.abort(reason)
        os._exit(DistributedError.exit_status)


def connect(*, timeout: float | None = None, backend: str | None = None, alone: bool = False) -> World:
    """Join the other processes of the run, if whoever started this one has prepared it; a world of one otherwise.

    alone: a world of one in any case.
    timeout: seconds after which a rank that doesn't come counts as hung, default the variable MLXLM_TIMEOUT or 300.
    backend: "ring", "mpi", "jaccl" or "nccl", by default what the environment is prepared for.

    Raises DistributedError when the backend can't be reached.
    """
    timeout = _timeout() if timeout is None else timeout
    if timeout <= 0:
        raise UsageError(f"the time limit of a run is {timeout:g} s; expected more than 0")
    backend = backend_of() if backend is None else backend
    if backend is None or alone or (backend == "ring" and len(_ring_hosts()) == 1):
        return World(None, None, timeout, None)
    rank = os.environ.get("MLX_RANK", "?")
    patience = max(timeout, _JOIN_TIMEOUT)
    late = threading.Timer(patience, _give_up, (f"rank {rank} did not find all others within {patience:g} s",))
    late.daemon = True
    late.start()
    try:
        group = mx.distributed.init(strict=True, backend=backend)
        mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"rank {rank} can't join the others over {backend}: {error}") from error
    finally:
        late.cancel()
    return World(group if group.size() > 1 else None, backend, timeout, _listed_host(group.rank()))


def _timeout() -> float:
    text = os.environ.get("MLXLM_TIMEOUT", "")
    try:
        return float(text) if text else DEFAULT_TIMEOUT
    except ValueError:
        raise UsageError(f"MLXLM_TIMEOUT is {text!r}; expected a number of seconds") from None


def _give_up(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(DistributedError.exit_status)


def _listed_host(rank: int) -> str | None:
    """The address that the ring's host file names for a rank."""
    hosts = _ring_hosts()
    return hosts[rank] if rank < len(hosts) else None


def _ring_hosts() -> list[str]:
    """The addresses in the ring's host file; none where there is no such file."""
    path = os.environ.get("MLX_HOSTFILE")
    if not path:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            return [str(places[0]).rpartition(":")[0] for places in json.load(file)]
    except (OSError, ValueError, LookupError, TypeError):
        return []
