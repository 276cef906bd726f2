"""Reversible rules between the names of tensors on disk and the canonical names inside the stack.

A family's rules are data: `rename`, `transpose`, `split`, `split_heads`, `permute`, `shift`, `drop`. In a name `{n}`
stands for a layer's number and `{p}` for what ends a module's tensor names: weight, bias, scales, biases. The first
rule that fits a name serves. Several names on disk for one tensor are given as a tuple: the first of them is written,
and where a checkpoint has several, the one that comes first counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise

import mlx.core as mx

from mlxlm.errors import CheckpointError, WeightsError, listing

_PLACEHOLDERS = {"n": r"(?P<n>\d+)", "p": r"(?P<p>weight|bias|scales|biases)"}


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", pattern)
    text = "".join(re.escape(part) if i % 2 == 0 else _PLACEHOLDERS[part] for i, part in enumerate(parts))
    return re.compile(text + r"\Z")


@dataclass(frozen=True)
class Rule:
    """One tensor on disk, one or more inside.

    hub: patterns of its name on disk, the first is written.  canonical: patterns of the names inside; none drops it.
    copy_of: for a dropped one, the canonical pattern of the tensor that it must be a copy of.
    split: from the array on disk to those inside, given the parameter's kind `{p}`.  join: the way back.
    """

    hub: tuple[str, ...]
    canonical: tuple[str, ...]
    split: Callable[[mx.array, str], tuple[mx.array, ...]]
    join: Callable[[tuple[mx.array, ...], str], mx.array]
    copy_of: str | None = None

    def match_hub(self, name: str) -> dict[str, str] | None:
        """The placeholders' values if `name` is this rule's tensor on disk."""
        found = self.find_hub(name)
        return None if found is None else found[1]

    def find_hub(self, name: str) -> tuple[int, dict[str, str]] | None:
        """`match_hub` and, before it, which of the rule's names it is, counted from 0."""
        for index, pattern in enumerate(self.hub):
            found = _compiled(pattern).match(name)
            if found:
                return index, found.groupdict()
        return None

    def canonical_names(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """The names inside for the placeholders' values."""
        return tuple(pattern.format(**values) for pattern in self.canonical)


def _names(hub: str | tuple[str, ...]) -> tuple[str, ...]:
    return (hub,) if isinstance(hub, str) else hub


def rename(hub: str | tuple[str, ...], canonical: str) -> Rule:
    """The same tensor under another name."""
    return Rule(_names(hub), (canonical,), lambda array, kind: (array,), lambda arrays, kind: arrays[0])


def transpose(hub: str | tuple[str, ...], canonical: str) -> Rule:
    """A weight stored (in, out) instead of (out, in); a bias is left alone."""

    def turn(array: mx.array, kind: str) -> mx.array:
        return array.T if kind == "weight" else array

    return Rule(
        _names(hub), (canonical,), lambda array, kind: (turn(array, kind),), lambda arrays, kind: turn(arrays[0], kind)
    )


def split(
    hub: str | tuple[str, ...], canonical: tuple[str, ...], sizes: tuple[int, ...], *, transposed: bool = False
) -> Rule:
    """Several projections stored as one, their outputs one after another.

    sizes: outputs of each.  transposed: the weight on disk is (in, out).
    """
    bounds = tuple(pairwise(accumulate(sizes, initial=0)))

    def cut(array: mx.array, kind: str) -> tuple[mx.array, ...]:
        array = array.T if transposed and kind == "weight" else array
        if array.shape[0] != sum(sizes):
            raise CheckpointError(f"{hub}: {array.shape[0]} outputs, expected {' + '.join(map(str, sizes))}")
        return tuple(array[start:stop] for start, stop in bounds)

    def paste(arrays: tuple[mx.array, ...], kind: str) -> mx.array:
        whole = mx.concatenate(list(arrays), axis=0)
        return whole.T if transposed and kind == "weight" else whole

    return Rule(_names(hub), canonical, cut, paste)


def split_heads(hub: str | tuple[str, ...], canonical: tuple[str, ...], groups: int, counts: tuple[int, ...]) -> Rule:
    """Several projections stored as one, head by head: each group holds some heads of every projection in turn.

    groups: how often the pattern repeats.  counts: heads of each projection in one group. Query, key and value of
    multi-head attention are (1, 1, 1) in as many groups as heads; grouped-query attention has heads / kv_heads query
    heads, one key and one value head in each of kv_heads groups.
    """
    bounds = tuple(pairwise(accumulate(counts, initial=0)))

    def cut(array: mx.array, kind: str) -> tuple[mx.array, ...]:
        if array.shape[0] % (groups * sum(counts)):
            raise CheckpointError(f"{hub}: {array.shape[0]} outputs don't divide into {groups} x {sum(counts)} heads")
        rest = array.shape[1:]
        heads = array.reshape(groups, sum(counts), -1, *rest)
        return tuple(heads[:, start:stop].reshape(-1, *rest) for start, stop in bounds)

    def paste(arrays: tuple[mx.array, ...], kind: str) -> mx.array:
        rest = arrays[0].shape[1:]
        parts = [array.reshape(groups, count, -1, *rest) for array, count in zip(arrays, counts, strict=True)]
        return mx.concatenate(parts, axis=1).reshape(-1, *rest)

    return Rule(_names(hub), canonical, cut, paste)


def permute(hub: str | tuple[str, ...], canonical: str, heads: int) -> Rule:
    """A projection whose rows on disk pair rotary features as 2i, 2i+1 in each head, inside as i, i + half.

    heads: of the projection. GGUF files of some families store queries and keys so.
    """

    def halves(array: mx.array, kind: str) -> tuple[mx.array, ...]:
        rows = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
        return (rows.swapaxes(1, 2).reshape(array.shape),)

    def pairs(arrays: tuple[mx.array, ...], kind: str) -> mx.array:
        rows = arrays[0].reshape(heads, 2, arrays[0].shape[0] // heads // 2, -1)
        return rows.swapaxes(1, 2).reshape(arrays[0].shape)

    return Rule(_names(hub), (canonical,), halves, pairs)


def shift(hub: str | tuple[str, ...], canonical: str, offset: float) -> Rule:
    """A tensor that is stored with `offset` added, in float32, so that small numbers keep their digits."""

    def moved(array: mx.array, by: float) -> tuple[mx.array, ...]:
        return (array.astype(mx.float32) + by,)

    return Rule(
        _names(hub),
        (canonical,),
        lambda array, kind: moved(array, -offset),
        lambda arrays, kind: moved(arrays[0], offset)[0],
    )


def drop(*hub: str) -> Rule:
    """Tensors on disk that carry nothing: buffers, or copies of tied weights. Never written."""
    return Rule(hub, (), lambda array, kind: (), lambda arrays, kind: arrays[0])


def tied_copy(hub: str | tuple[str, ...], canonical: str) -> Rule:
    """A copy on disk of a tensor that is kept under `canonical`, as tied weights are sometimes stored. Never written.

    Loading refuses a "copy" that differs: the model was then not tied when it was saved.
    """
    return replace(drop(*_names(hub)), copy_of=canonical)


@dataclass(frozen=True)
class Translation:
    """Tensors under their canonical names.

    tensors: by canonical name, lazy.  origins: the name on disk of each.  unexpected: names on disk without a rule.
    copies: by name on disk, the array and the canonical name of what it must equal.
    """

    tensors: dict[str, mx.array]
    origins: dict[str, str]
    unexpected: list[str]
    copies: dict[str, tuple[mx.array, str]] = field(default_factory=dict)


def to_canonical(rules: Iterable[Rule], tensors: Mapping[str, mx.array]) -> Translation:
    """Translate tensors, given by their names on disk; nothing is computed yet."""
    rules = tuple(rules)
    result = Translation({}, {}, [])
    chosen: dict[tuple[str, ...], int] = {}
    for name, array in tensors.items():
        for rule in rules:
            found = rule.find_hub(name)
            if found is not None:
                index, values = found
                names = rule.canonical_names(values)
                if names and chosen.setdefault(names, index) < index:
                    break  # under a name that comes first it is here already
                chosen[names] = index
                parts = rule.split(array, values.get("p", "weight")) if rule.canonical else ()
                result.tensors.update(zip(names, parts, strict=True))
                result.origins.update(dict.fromkeys(names, name))
                if rule.copy_of is not None:
                    result.copies[name] = (array, rule.copy_of.format(**values))
                break
        else:
            result.unexpected.append(name)
    return result


def to_hub(rules: Iterable[Rule], parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Parameters under their names on disk. Raises WeightsError for those that no rule knows."""
    rules = tuple(rules)
    left = dict(parameters)
    tensors: dict[str, mx.array] = {}
    unknown = []
    for name in parameters:
        if name not in left:
            continue
        found = _rule_for(rules, name)
        names = () if found is None else found[0].canonical_names(found[1])
        if found is None or any(part not in left for part in names):
            unknown.append(name)
            continue
        rule, values = found
        tensors[rule.hub[0].format(**values)] = rule.join(
            tuple(left.pop(part) for part in names), values.get("p", "weight")
        )
    if unknown:
        raise WeightsError(f"no rule says how these weights are named on disk: {listing(unknown)}")
    return tensors


def hub_name(rules: Iterable[Rule], canonical: str) -> str:
    """The name on disk of the tensor that holds a parameter. Raises WeightsError when no rule knows it."""
    found = _rule_for(tuple(rules), canonical)
    if found is None:
        raise WeightsError(f"no rule says how {canonical} is named on disk")
    return found[0].hub[0].format(**found[1])


def canonical_names(rules: Iterable[Rule], hub: str) -> tuple[str, ...]:
    """The names inside of a tensor on disk; none when no rule knows it or it carries nothing."""
    for rule in rules:
        values = rule.match_hub(hub)
        if values is not None:
            return rule.canonical_names(values)
    return ()


def _rule_for(rules: tuple[Rule, ...], canonical: str) -> tuple[Rule, dict[str, str]] | None:
    for rule in rules:
        for pattern in rule.canonical:
            match = _compiled(pattern).match(canonical)
            if match:
                return rule, match.groupdict()
    return None


def check_copies(translation: Translation) -> None:
    """Raise WeightsError when what is stored as a copy of a tied weight differs from it."""
    for name, (array, canonical) in translation.copies.items():
        original = translation.tensors.get(canonical)
        if original is not None and not (array.shape == original.shape and mx.array_equal(array, original)):
            raise WeightsError(
                f"{name} differs from {translation.origins[canonical]}, although config.json says they are tied; "
                'set "tie_word_embeddings" to false there to use both'
            )


def check(rules: Iterable[Rule], expected: Mapping[str, tuple[int, ...]], given: Translation) -> None:
    """Raise WeightsError that lists every missing, unexpected and misshaped weight by its name on disk.

    rules: those of the translation.  expected: shapes by canonical name.  given: what was read.
    """
    rules = tuple(rules)
    missing = [hub_name(rules, name) for name in expected if name not in given.tensors]
    surplus = [given.origins[name] for name in given.tensors if name not in expected]
    misshaped = [
        f"{given.origins[name]} gives {tuple(given.tensors[name].shape)} for {name}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in given.tensors and tuple(given.tensors[name].shape) != tuple(shape)
    ]
    problems = []
    for title, names in (
        ("missing", missing),
        ("unexpected", [*given.unexpected, *surplus]),
        ("of another shape", misshaped),
    ):
        names = list(dict.fromkeys(names))  # the parts of a fused tensor share its name
        if names:
            problems.append(f"{len(names)} {title}: {listing(names, 1000)}")
    if problems:
        raise WeightsError("the weights don't fit the model; " + "; ".join(problems))


def under(prefixes: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Every name under every prefix; the first of both is the one that is written."""
    return tuple(prefix + name for prefix in prefixes for name in names)
