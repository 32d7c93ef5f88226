"""What a compiled program's text says: how often each instruction runs, and what its collectives move.

The text is that of `jax.stages.Compiled.as_text()`, for any backend. A loop's body counts as often as the compiler
states, or else as its condition says, which compares a counter with a constant in every `lax.scan`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gigatok_jax.scaling.groups import fewest_on_a_host, groups

BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line: `shape` as written, `rest` its operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs; the end of an asynchronous one runs nothing more."""
        if self.opcode.endswith(("-done", "-update")):
            return []
        branches = _BRANCHES.search(self.rest)
        listed = re.findall(r"[\w.\-]+", branches[1]) if branches else []
        return [*_CALLED.findall(self.rest), *listed]

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


class Collective(NamedTuple):
    """Collectives of one kind and result: `count` runs a step, of `payload` bytes each, among `devices`.

    payload: per device, what is whole afterwards (all-gather) or before (reduce-scatter); else what is sent.
    op: the framework's name of what asked for it.
    per_host: where it spans hosts, how many of the devices share one; else 0.
    """

    kind: str
    shape: str
    payload: int
    devices: int
    count: int
    op: str
    per_host: int = 0

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
    """How often a loop runs: as the compiler states, else the constant that its condition compares its counter with,
    1 where it has none."""
    if stated := _TRIPS.search(loop.rest):
        return int(stated[1])
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
        BYTES[kind] * math.prod(map(int, dims.split(","))) if dims else BYTES[kind]
        for kind, dims in _SHAPE.findall(_plain(shape))
        if kind in BYTES
    )


def collectives(text: str, host: int = 0) -> list[Collective]:
    """The collectives of a step, those of equal kind, shape, group and origin as one, most bytes first.

    Args:
      host: how many devices, in the program's order, are joined faster than with others; 0 where links are all alike.
    """
    found, entry = computations(text)
    times = executions(found, entry)
    counts: Counter[Collective] = Counter()
    seen: set[tuple[str, str, int]] = set()
    for name, instructions in found.items():
        for line in instructions:
            if line.opcode.removesuffix("-start") not in KINDS or not times[name]:
                continue
            one = _collective(line, host, fused=name.startswith("all-reduce-scatter"))
            # Overlapped with other work, one collective shows in several fusions, by its channel.
            if channel := re.search(r"channel_id=(\d+)", line.rest):
                if (channel[1], one.shape, times[name]) in seen:
                    continue
                seen.add((channel[1], one.shape, times[name]))
            counts[one] += times[name]
    return sorted((one._replace(count=count) for one, count in counts.items()), key=lambda one: -one.bytes)


def _collective(line: Instruction, host: int, fused: bool) -> Collective:
    """One line's. TPUs fuse an all-reduce with the slice of its result, into a computation of a name of its own."""
    kind, found = line.opcode.removesuffix("-start"), groups(line.rest)
    shape, devices = result(line), len(found[0]) if found else 1
    payload = shape_bytes(shape) * (devices if kind == "reduce-scatter" else 1)
    plain = ", ".join(f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(_plain(shape)))
    per_host = fewest_on_a_host(found, host) if host else 0
    return Collective("reduce-scatter" if fused else kind, plain, payload, devices, 1, _origin(line.rest), per_host)


def result(line: Instruction) -> str:
    """The shape of what a collective makes; a start has its operands, and marks, beside it."""
    if not line.opcode.endswith("-start") or line.opcode.startswith("all-reduce"):
        return line.shape
    parts = _split(line.shape)
    return parts[1] if len(parts) > 1 else line.shape


def _split(shape: str) -> list[str]:
    """The members of a tuple, which may be tuples themselves; another shape is its own member."""
    text = re.sub(r"/\*.*?\*/", "", shape)
    if not text.startswith("("):
        return [text]
    members, depth = [""], 0
    for sign in text[1:-1]:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            members.append("")
        else:
            members[-1] += sign
    return [member.strip() for member in members]


def _plain(shape: str) -> str:
    """A shape without layouts and comments."""
    return re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)


def _origin(rest: str) -> str:
    match = re.search(r'op_name="([^"]*)"', rest)
    return match[1] if match else ""


def making(found: Sequence[Collective], shapes: Iterable[Sequence[int]]) -> list[Collective]:
    """The collectives that make an array of one of these shapes, in any order of its axes, axes of 1 aside.

    Of any kind: a TPU may gather by an all-reduce of parts with zeros around them.
    """

    def plain(shape: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(size for size in shape if size > 1))

    def made(one: Collective) -> set[tuple[int, ...]]:
        return {plain(map(int, dims.split(","))) for _, dims in _SHAPE.findall(one.shape) if dims}

    wanted = set(map(plain, shapes))
    return [one for one in found if made(one) & wanted]


def largest(text: str, number: int = 3) -> list[dict[str, str]]:
    """The largest arrays that a program makes, each {"size", "shape", "op"}; what a fusion keeps to itself is none."""
    found, _ = computations(text)
    fused = {called for lines in found.values() for line in lines if line.opcode == "fusion" for called in line.called}
    arrays: dict[tuple[str, str], int] = {}
    for line in (line for name, lines in found.items() if name not in fused for line in lines):
        if line.opcode in ("tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"):
            continue
        for kind, dims in _SHAPE.findall(_plain(line.shape)):
            shape = f"{kind}[{dims}]"
            arrays[shape, _origin(line.rest)] = shape_bytes(shape)
    first = sorted(arrays.items(), key=lambda item: -item[1])[:number]
    return [{"size": f"{size / 2**20:.1f}M", "shape": shape, "op": op} for (shape, op), size in first]


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
