"""Small arrays kept together in large ones, so that what is done to every element is done to all of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod

import mlx.core as mx

Arrays = dict[str, mx.array]

JOINED = 2**18  # elements of an array that is joined with others
_ALIGNED = 128  # elements: where arrays begin, so that matrix products find them aligned in any dtype


@dataclass(frozen=True)
class _Member:
    """Where an array stands in a joined one: its rows."""

    name: str
    start: int
    stop: int


class Packing:
    """Which of some arrays are kept together: rows below rows, those of one dtype and one shape of a row.

    A step with hundreds of adapters is bound by the number of its operations, and an optimizer has some for each array.

    arrays: by name, for their shapes and dtypes.  most: elements of an array that is joined; 0 joins nothing.

    A joined array has a name of its own, and as many dimensions as its parts. Arrays that are not joined go through all
    that follows as they are.
    """

    def __init__(self, arrays: Mapping[str, mx.array], most: int = JOINED):
        self._members: dict[str, list[_Member]] = {}
        for name, array in arrays.items():
            if array.size > most or array.ndim == 0:
                continue
            row = array.shape[1:]
            members = self._members.setdefault(f"joined rows {row}, {array.dtype}", [])
            unit = _ALIGNED // gcd(_ALIGNED, prod(row))
            start = -(-members[-1].stop // unit) * unit if members else 0
            members.append(_Member(name, start, start + array.shape[0]))
        self._members = {name: members for name, members in self._members.items() if len(members) > 1}
        self._joined = {member.name for members in self._members.values() for member in members}

    def pack(self, arrays: Mapping[str, mx.array]) -> Arrays:
        """Arrays by name, those that belong together joined; all of them must be there."""
        kept = {name: array for name, array in arrays.items() if name not in self._joined}
        return kept | {name: self.join(name, arrays) for name in self._members}

    def unpack(self, arrays: Mapping[str, mx.array]) -> Arrays:
        """What `pack` was given; views, which take no memory."""
        return {name: part for pack, array in arrays.items() for name, part in self.parts(pack, array).items()}

    def parts(self, name: str, array: mx.array) -> Arrays:
        """The arrays in a joined one, or the array itself under its name."""
        if name not in self._members:
            return {name: array}
        return {member.name: array[member.start : member.stop] for member in self._members[name]}

    def names(self, name: str) -> list[str]:
        """Of what `parts` gives."""
        return [member.name for member in self._members[name]] if name in self._members else [name]

    def join(self, name: str, arrays: Mapping[str, mx.array]) -> mx.array:
        """The array of which `parts` are these."""
        if name not in self._members:
            return arrays[name]
        pieces, end = [], 0
        for member in self._members[name]:
            array = arrays[member.name]
            if member.start > end:
                pieces.append(mx.zeros((member.start - end, *array.shape[1:]), dtype=array.dtype))
            pieces.append(array)
            end = member.stop
        return mx.concatenate(pieces)
