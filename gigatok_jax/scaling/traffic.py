"""What a compiled program moves between a device's memory and its processor, by what its instructions read and write.

A fusion reads its operands and writes its result once; what it only slices counts as the slices, and a buffer that it
updates in place as the update. What is marked S(1) lies in a TPU's own memory, S(5) in the host's. The scratch space of
NVIDIA's libraries counts as nothing, for want of knowing.
"""

import re
from collections.abc import Mapping

from gigatok_jax.scaling.hlo import KINDS, Instruction, computations, executions, result, shape_bytes

_FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call")
_FREE += ("async-start", "partition-id", "replica-id")
_MARKS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
    "AssumeGatherIndicesInBound",
)
_SLICES = ("dynamic-slice", "slice", "gather")
# Element by element: a slice of what they make asks for no more than the same slice of what they read.
_ELEMENTWISE = ("bitcast", "convert", "copy", "reshape", "transpose", "negate", "add", "subtract", "multiply", "divide")

Computations = Mapping[str, list[Instruction]]


def memory_traffic(text: str) -> int:
    """Bytes of a step and device; see the module."""
    found, entry = computations(text)
    times = executions(found, entry)
    fused = {called for lines in found.values() for line in lines if line.opcode == "fusion" for called in line.called}
    total = 0
    for name, lines in found.items():
        if name in fused or not times[name]:
            continue
        shapes = {line.name: line.shape for line in lines}
        total += times[name] * sum(_traffic(line, shapes, found) for line in lines)
    return total


def _traffic(line: Instruction, shapes: Mapping[str, str], found: Computations) -> int:
    ended = line.opcode.endswith(("-done", "-update"))
    if line.opcode in _FREE or ended or any(f'"{mark}"' in line.rest for mark in _MARKS):
        return 0
    if line.opcode == "copy-start":  # (to, from, mark)
        return sum(map(_in_memory, _members(line.shape)[:2]))
    if line.opcode == "slice-start":  # ((whole), part, mark)
        part = _members(line.shape)[-2]
        return shape_bytes(part) + _in_memory(part)
    if line.opcode.removesuffix("-start") in KINDS:
        return sum(map(_in_memory, _members(result(line)))) + sum(_read(line, shapes))
    if line.opcode == "fusion" and line.called and found.get(line.called[0]):
        return _fusion(line, shapes, found[line.called[0]])
    written = sum(map(_in_memory, _written(line)))
    read = _read(line, shapes)
    if line.opcode == "dynamic-update-slice":
        return 2 * sum(size for size in read if size < written)
    return written + sum(min(size, written) if line.opcode in _SLICES else size for size in read)


def _read(line: Instruction, shapes: Mapping[str, str]) -> list[int]:
    return [sum(map(_in_memory, _members(shapes[name]))) for name in line.operands if name in shapes]


def _written(line: Instruction) -> list[str]:
    """The arrays of a result, without the scratch space that is the last of a cuBLAS or cuDNN call's."""
    members = _members(line.shape)
    scratch = "__cu" in line.rest and len(members) > 1 and re.match(r"[su]8\[", members[-1])
    return members[:-1] if scratch else members


def _fusion(line: Instruction, shapes: Mapping[str, str], inside: list[Instruction]) -> int:
    """What a fusion reads of its operands and writes of its result, by the instructions inside."""
    named = {one.name: one for one in inside}
    root, results = inside[-1], _members(line.shape)
    ends = [named.get(name, root) for name in root.operands] if root.opcode == "tuple" else [root] * len(results)
    updates = [_update(end, named) for end in ends]
    needed = _needed(inside, {one.name for one in updates if one})
    params = {int(one.rest.split(")")[0]): one for one in inside if one.opcode == "parameter"}
    total = 0
    for number, name in enumerate(line.operands):
        whole = sum(map(_in_memory, _members(shapes.get(name, ""))))
        if whole and number in params:
            total += min(whole, needed[params[number].name] * _itemsize(params[number].shape))
    for member, update in zip(results, updates):
        part = shape_bytes(named[update.operands[1]].shape) if update else shape_bytes(member)
        total += part if _in_memory(member) else 0
    return total


def _update(end: Instruction, named: Mapping[str, Instruction]) -> Instruction | None:
    """The dynamic-update-slice that a result is, if it is one."""
    while end.opcode in ("bitcast", "copy", "reshape") and end.operands and end.operands[0] in named:
        end = named[end.operands[0]]
    return end if end.opcode == "dynamic-update-slice" and end.operands[1] in named else None


def _needed(inside: list[Instruction], in_place: set[str]) -> dict[str, int]:
    """How many numbers of each value its users need; what is updated in place is not read for it."""
    users: dict[str, dict[str, Instruction]] = {one.name: {} for one in inside}
    needed: dict[str, int] = {}
    for one in reversed(inside):  # users before what they use
        whole, total = _elements(one.shape), 0
        for user in users[one.name].values():
            if user.opcode in _SLICES and user.operands[0] == one.name:
                total += _elements(user.shape)
            elif user.opcode in _ELEMENTWISE and _elements(user.shape) == whole:
                total += needed[user.name]
            elif not (user.name in in_place and user.operands[0] == one.name):
                total += whole
        needed[one.name] = min(total, whole) if users[one.name] else whole
        for name in one.operands:
            if name in users:
                users[name][one.name] = one
    return needed


def _elements(shape: str) -> int:
    return shape_bytes(shape) // _itemsize(shape)


def _itemsize(shape: str) -> int:
    return max(shape_bytes(re.sub(r"\[[\d,]*\]", "[]", shape)), 1)


def _members(shape: str) -> list[str]:
    """A shape's arrays, with their layouts."""
    return re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^{}]*\})?", shape)


def _in_memory(member: str) -> int:
    """Bytes of an array, 0 for one that is marked as lying in the processor's own memory or the host's."""
    return 0 if "S(1)" in member or "S(5)" in member else shape_bytes(member)
