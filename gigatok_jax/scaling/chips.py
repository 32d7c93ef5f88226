"""Accelerators that a plan is made for: what their makers state of them, and topologies by name."""

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """What a projection takes a chip to do at best.

    platform: "tpu" or "cuda".   hbm_gib: its memory, of a TPU what libtpu leaves to a program.
    flops: bfloat16 FLOP/s.   hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s over all its links to other chips, of a GPU those of its host, both directions together.
    network_bandwidth: the same of a GPU's own share of its host's network; TPUs' links join hosts as well.
    """

    platform: str
    hbm_gib: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float = 0.0


CHIPS = {
    # cloud.google.com/tpu/docs, the page of each version ("key specifications", bidirectional ICI per chip); memory as
    # libtpu 0.0.42.1 states it where a program does not fit. (A v4 chip is two devices to it: there is none here.)
    "v5e": Chip("tpu", 15.75, 197e12, 819e9, 400e9),
    "v5p": Chip("tpu", 95.74, 459e12, 2765e9, 1200e9),
    "v6e": Chip("tpu", 31.25, 918e12, 1638e9, 800e9),
    # NVIDIA's data sheets (SXM; dense bfloat16; NVLink, both directions), and those of DGX A100, H100 and H200: an
    # InfiniBand adapter a GPU, of 200 or 400 Gb/s each way. Clouds may have less.
    "a100": Chip("cuda", 80, 312e12, 2039e9, 600e9, 50e9),
    "h100": Chip("cuda", 80, 989e12, 3350e9, 900e9, 100e9),
    "h200": Chip("cuda", 141, 989e12, 4800e9, 900e9, 100e9),
}
GPUS_A_HOST = 8


class Topology(NamedTuple):
    """A slice: `shape` chips of one kind, e.g. v5p:4x4x4; of GPUs one host's (h100:8), or hosts × each's (h100:4x8)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


def topology(name: str) -> Topology:
    """The slice of a name such as v5p:4x4x4, v5e:8x8, h100:8 or h100:4x8.

    Raises:
      ValueError: for an unknown chip or a shape that is no product of positive numbers, or not one of GPUs.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", shape):
        raise ValueError(f"topology={name!r} is no KIND:SHAPE such as v5p:4x4x4; kinds are {', '.join(CHIPS)}")
    chip, sizes = CHIPS[kind], tuple(map(int, shape.split("x")))
    if chip.platform == "cuda" and (len(sizes) > 2 or sizes[-1] > GPUS_A_HOST):
        raise ValueError(f"topology={name!r}: GPUs are N of one host, at most {GPUS_A_HOST}, or HOSTSxN: {kind}:4x8")
    return Topology(name, chip, sizes)
