"""The published weights of FID's Inception ↔ the variables of `teachers.inception.Inception`.

pytorch-fid and torch-fidelity name their tensors alike: per unit `conv.weight` and the batch norm's `bn.*`, and `fc`.
"""

from collections.abc import Iterator

from gigatok_jax.hub.keymap import Entry
from gigatok_jax.teachers.inception import CLASSES, Block, Unit, num_features

# Published name, collection and name here.
_NORM = (
    ("weight", "params", "scale"),
    ("bias", "params", "bias"),
    ("running_mean", "batch_stats", "mean"),
    ("running_var", "batch_stats", "var"),
)


def entries(blocks: tuple[Block, ...]) -> list[Entry]:
    """Every tensor of a network."""
    found = []
    for unit, inp in _units(blocks):
        shape = (unit.width, inp, *unit.kernel)
        found.append(Entry(f"{unit.key}.conv.weight", (f"params/{unit.name}/conv/kernel",), "conv", shape))
        for published, collection, ours in _NORM:
            path = f"{collection}/{unit.name}/norm/{ours}"
            found.append(Entry(f"{unit.key}.bn.{published}", (path,), "vector", (unit.width,)))
    found.append(Entry("fc.weight", ("params/logits/kernel",), "dense", (CLASSES, num_features(blocks))))
    found.append(Entry("fc.bias", ("params/logits_bias",), "vector", (CLASSES,)))
    return found


def droppable(blocks: tuple[Block, ...]) -> tuple[str, ...]:
    """Published tensors that are not used here: how many batches each norm has seen."""
    return tuple(f"{unit.key}.bn.num_batches_tracked" for unit, _ in _units(blocks))


def _units(blocks: tuple[Block, ...]) -> Iterator[tuple[Unit, int]]:
    """Every unit with the channels of the map that it sees."""
    width = 3
    for block in blocks:
        joined = 0
        for branch in block:
            seen = width
            for step in branch.steps:
                yield from ((unit, seen) for unit in step)
                seen = sum(unit.width for unit in step)
            joined += seen
        width = joined
