"""What a compiled program's text says: how often each instruction runs, and what its collectives move.

The text is that of `jax.stages.Compiled.as_text()`, for any backend. A loop's body counts as often as its condition
says, which compares a counter with a constant in every `lax.scan`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line: `shape` as written, `rest` its operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = _BRANCHES.search(self.rest)
        listed = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        return [*_CALLED.findall(self.rest), *listed]


class Collective(NamedTuple):
    """Collectives of one kind and result: `count` runs a step, of `payload` bytes each, among `devices`.

    payload: per device, what is whole afterwards (all-gather) or before (reduce-scatter); else what is sent.
    op: the framework's name of what asked for it.
    """

    kind: str
    shape: str
    payload: int
    devices: int
    count: int
    op: str

    @property
    def bytes(self) -> float:
        """What a device sends in a step on a ring: (n − 1)/n of the payload, twice that for an all-reduce."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.count * self.payload * factor


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation's instructions, and the entry's name."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = found.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(Instruction(*match.groups()))
    if not entry:
        raise ValueError("this is no compiled program's text: it has no ENTRY computation")
    return found, entry


def executions(found: Mapping[str, list[Instruction]], entry: str) -> Counter[str]:
    """How often each computation runs in one call of the program."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in found:
            return
        seen.add(name)
        for instruction in found[name]:
            for called in instruction.called:
                visit(called)
        order.append(name)

    visit(entry)
    counts: Counter[str] = Counter({entry: 1})
    for name in reversed(order):  # callers before those they call
        for instruction in found[name]:
            trips = _trips(found, instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                counts[called] += counts[name] * trips
    return counts


def _trips(found: Mapping[str, list[Instruction]], loop: Instruction) -> int:
    """The constant that a loop's condition compares its counter with; 1 where it has none."""
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    lines = found.get(condition[1], []) if condition else []
    constants = {line.name: int(line.rest.split(")")[0]) for line in lines if _integer(line)}
    for line in lines:
        if line.opcode == "compare" and "direction=LT" in line.rest:
            for name, value in constants.items():
                if re.search(rf"%?{re.escape(name)}\b", line.rest):
                    return value
    return next(iter(constants.values())) if len(constants) == 1 else 1


def _integer(line: Instruction) -> bool:
    return line.opcode == "constant" and re.fullmatch(r"-?\d+", line.rest.split(")")[0]) is not None


def shape_bytes(shape: str) -> int:
    """Bytes of a shape as written, all members of a tuple together."""
    return sum(
        BYTES.get(kind, 4) * math.prod(map(int, dims.split(","))) if dims else BYTES.get(kind, 4)
        for kind, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape))
        if kind in BYTES
    )


def collectives(text: str) -> list[Collective]:
    """The collectives of a step, those of equal kind, shape, group and origin as one, most bytes first."""
    found, entry = computations(text)
    times = executions(found, entry)
    counts: Counter[tuple[str, str, int, int, str]] = Counter()
    seen: set[tuple[str, str, int]] = set()
    for name, instructions in found.items():
        for line in instructions:
            kind = line.opcode.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            # TPUs fuse an all-reduce with the slice of its result into a computation of this name.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
            shape = _result(line)
            devices = _group(line.rest)
            payload = shape_bytes(shape) * (devices if line.opcode == "reduce-scatter" else 1)
            plain = ", ".join(f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", shape)))
            # Overlapped with other work, one collective shows in several fusions, by its channel.
            if channel := re.search(r"channel_id=(\d+)", line.rest):
                if (channel[1], plain, times[name]) in seen:
                    continue
                seen.add((channel[1], plain, times[name]))
            counts[kind, plain, payload, devices, _origin(line.rest)] += times[name]
    grouped = [
        Collective(kind, shape, payload, devices, count, op)
        for (kind, shape, payload, devices, op), count in counts.items()
    ]
    return sorted(grouped, key=lambda collective: -collective.bytes)


def _result(line: Instruction) -> str:
    """The shape of what a collective makes; a start has its operands, and marks, beside it."""
    if not line.opcode.endswith("-start") or line.opcode.startswith("all-reduce"):
        return line.shape
    shapes = re.findall(r"[a-z]\w*\[[\d,]*\]", line.shape)
    return shapes[1] if len(shapes) > 1 else line.shape


def _group(rest: str) -> int:
    """How many devices take part together."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2 if "source_target_pairs" in rest else 1


def _origin(rest: str) -> str:
    match = re.search(r'op_name="([^"]*)"', rest)
    return match[1] if match else ""


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {"count", "bytes"}} a step and device."""
    kinds: dict[str, dict[str, float]] = {}
    for collective in found:
        row = kinds.setdefault(collective.kind, {"count": 0, "bytes": 0.0})
        row["count"] += collective.count
        row["bytes"] += collective.bytes
    return dict(sorted(kinds.items()))


def by_place(found: list[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {modules that asked for it, numbers as "#": count}}, of names cut to four."""
    places: dict[str, Counter[str]] = {}
    for one in found:
        places.setdefault(one.kind, Counter())["/".join(numberless(one.op).split("/")[1:5])] += one.count
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(places.items())}


def numberless(name: str) -> str:
    """ "level0_block1" → "level#_block#": equal layers have one name."""
    return re.sub(r"\d+", "#", name)


_FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call")
_MARKS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
    "AssumeGatherIndicesInBound",
)


def memory_traffic(text: str) -> int:
    """Bytes that a step moves between a device's memory and its processor, by what its instructions read and write.

    A fusion reads its operands and writes its result once. What is marked S(1) lies in the processor's own memory. A
    slice of a buffer counts as the slice, and an update of one as the update.
    """
    found, entry = computations(text)
    times = executions(found, entry)
    fused = {called for lines in found.values() for line in lines if line.opcode == "fusion" for called in line.called}
    total = 0
    for name, lines in found.items():
        if name in fused or not times[name]:
            continue
        shapes = {line.name: line.shape for line in lines}
        total += times[name] * sum(_traffic(line, shapes) for line in lines)
    return total


def _traffic(line: Instruction, shapes: Mapping[str, str]) -> int:
    if line.opcode in _FREE or line.opcode.endswith("-done") or any(f'"{mark}"' in line.rest for mark in _MARKS):
        return 0
    if line.opcode == "copy-start":  # (to, from, mark)
        return sum(map(_in_memory, _members(line.shape)[:2]))
    if line.opcode == "slice-start":  # ((whole), part, mark)
        part = _members(line.shape)[-2]
        return shape_bytes(part) + _in_memory(part)
    written = sum(map(_in_memory, _members(line.shape)))
    operands = re.findall(r"%([\w.\-]+)", line.rest.split("), ")[0])
    read = [sum(map(_in_memory, _members(shapes[name]))) for name in operands if name in shapes]
    if "dynamic-update-slice" in line.name:
        return 2 * sum(size for size in read if size < written)
    if "dynamic-slice" in line.name:
        read = [min(size, written) for size in read]
    return written + sum(read)


def _members(shape: str) -> list[str]:
    """A shape's arrays, with their layouts."""
    return re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^{}]*\})?", shape)


def _in_memory(member: str) -> int:
    """Bytes of an array, 0 for one that is marked as lying in the processor's own memory."""
    return 0 if "S(1)" in member else shape_bytes(member)
