"""Which devices take part together in a collective, from its text."""

import math
import re

import numpy as np

_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\S*?),? ")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")


def groups(attributes: str) -> list[list[int]]:
    """Numbers of devices that take part together; one group only where all are alike, none where none is named.

    Forms: {{0,1},{2,3}} · [2,4]<=[4,2]T(1,0), an iota of the last dimensions, transposed and reshaped to the first ·
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'} · source_target_pairs={{0,1},{1,2}}, where each pair is a group.
    """
    if "source_target_pairs=" in attributes:
        pairs = attributes.split("source_target_pairs={", 1)[1].split("}}", 1)[0] + "}"
        return [[int(a), int(b)] for a, b in _PAIR.findall(pairs)]
    if found := _LISTED.search(attributes):
        return [_numbers(found[1])] if found[1] else []
    if found := _IOTA.search(attributes + " "):
        return [_devices(found[3]).reshape(int(found[1]), int(found[2]))[0].tolist()]
    if found := _MESH.search(attributes):
        return [_of_mesh(*found.groups())]
    return []


def fewest_on_a_host(found: list[list[int]], host: int) -> int:
    """How many of a group's devices share a host of `host` devices, at the least; 0 where no group spans hosts."""
    counts = [np.unique(np.asarray(group) // host, return_counts=True)[1] for group in found]
    return min((int(count.min()) for count in counts if len(count) > 1), default=0)


def _numbers(text: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", text)))


def _devices(text: str) -> np.ndarray:
    """Device numbers of [4,2] or [4,2]T(1,0), flat."""
    dims, _, order = text.partition("T")
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)).ravel() if order else ids.ravel()


def _of_mesh(axes: str, ids: str | None, over: str) -> list[int]:
    """The group of a mesh's first device over axes such as 'b', or part of one: 'b':(2)4 are 4 of it, 2 such before."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    count = math.prod(sizes.values())
    listed = np.arange(count) if not ids else _devices(ids) if "T" in ids else np.array(_numbers(ids))
    places: dict[str, list[int]] = {name: [0] for name in sizes}
    for name, before, part in re.findall(r"'?([A-Za-z_][\w.]*)'?(?::\((\d+)\)(\d+))?", over):
        size = int(part or sizes[name])
        stride = sizes[name] // (size * int(before or 1))
        places[name] = [place + step * stride for place in places[name] for step in range(size)]
    return listed.reshape(tuple(sizes.values()))[np.ix_(*places.values())].ravel().tolist()
