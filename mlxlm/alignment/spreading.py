"""Work that the processes of a run share: each does a block of it, and all of them get the results of all.

So are answers drawn, scored and measured. What is drawn for a prompt depends on its number alone, and not on the
process that draws it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxlm.distributed import Joined


def spread(joined: Joined, count: int, work: Callable[[range], list[Any]], what: str) -> list[Any]:
    """The results of `work` for all numbers below `count`, one behind the other, on every process.

    work: a block of these numbers -> what comes of it, a list of values that JSON can hold; numbers come through with
    all their bits.  what: a name for error messages.
    """
    size, rank = joined.world.size, joined.world.rank
    block = range(count * rank // size, count * (rank + 1) // size)
    return gathered(joined, work(block) if block else [], what)


def gathered(joined: Joined, mine: list[Any], what: str) -> list[Any]:
    """The lists of all processes as one, in the order of the processes, on every one of them."""
    if joined.alone:
        return mine
    return [one for text in joined.world.texts(json.dumps(mine), what) for one in json.loads(text)]
