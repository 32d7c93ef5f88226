"""Meshes, and the table that says how every leaf of the training state lies on one.

A leaf's path is matched against `RULES`, which name the logical axes of its trailing dimensions (leading ones, such as
the layer axis of a scanned stack, stay whole); a preset maps logical axes to mesh axes. Where a mesh axis does not
divide its dimension, another of the leaf's dimensions takes it; `whole_leaves` tells what is left whole. Averages and
optimiser moments lie as their parameters do, the moments on wish in the host's memory.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
STACKED = "/layers/"  # in the path of a leaf that holds a scanned stack's layers

OFFLOADS = ("none", "moments")
HOST = "pinned_host"  # the memory kind that devices can copy from and to
HOST_FROM = 2**16  # entries of a moment; copying a smaller one costs more than it holds

_MOMENT = re.compile(r"^opt/(\w+)/.*?/(mu|nu)/")  # opt/GROUP/…/mu/PATH: of the parameter params/GROUP/PATH

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/(query|key|value)/kernel$", ("embed", "heads")),
    (r"attention/(query|key|value)/bias$", ("heads",)),
    (r"attention/out/kernel$", ("heads", "embed")),
    (r"mlp/(in|gate)/kernel$", ("embed", "mlp")),
    (r"mlp/(in|gate)/bias$", ("mlp",)),
    (r"mlp/out/kernel$", ("mlp", "embed")),
    (r"distill/layer\d/kernel$", ("embed", "mlp")),
    (r"adaptive/(scale|bias)/kernel$", (None, "channels")),
    (r"(cnn|discriminator)/.*conv.*/kernel$|cnn/.*/kernel$", (None, None, None, "channels")),
    (r"cnn/stage_\d+/layers/(in|out)/kernel$", (None, "channels")),
    (r"discriminator/logits/kernel$", (None, None, "channels", None)),
    (r"discriminator/head_\d+/.*conv/kernel$", (None, None, "channels")),
    (r"decoder/project/kernel$", (None, None, "embed", None)),
    (r"encoder/project/kernel$", ("embed", "features")),
    (r"(embed|query_proj)/kernel$", ("features", "embed")),
    (r"id_embed/embedding$", ("codes", None)),
    (r"generator/head/kernel$", ("embed", "mlp")),
    (r"(^|generator/.*)modulate(_out)?/kernel$", ("embed", "mlp")),
    (r"(^|generator/.*)skip/kernel$", ("embed", None)),
    (r"(_pos|type_table)$", (None, "embed")),
    (r"codebook(/add)?$", ("codes", None)),
)

PRESETS: dict[str, dict[str, str]] = {
    "replicated": {},
    "fsdp": {"embed": "fsdp", "channels": "fsdp", "codes": "fsdp"},
    "fsdp+tensor": {"embed": "fsdp", "channels": "fsdp", "codes": "fsdp", "heads": "tensor", "mlp": "tensor"},
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor`, all of type Auto; near in it is near on a TPU's torus."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    devices = (jax.devices() if devices is None else devices)[: math.prod(shape)]
    # An axis may take part of one of the torus's, such as 4 of the 8 chips along a side of v6e:8x8.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as "params/tokenizer/encoder/…"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(path: str, shape: tuple[int, ...], mesh: Mesh, preset: str) -> PartitionSpec:
    """The PartitionSpec of one leaf.

    Raises:
      ValueError: for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"sharding.preset={preset!r} is not one of {', '.join(PRESETS)}")
    for pattern, logical in RULES:
        if re.search(pattern, path) and len(shape) >= len(logical):
            lead = len(shape) - len(logical)
            axes = _divided(shape[lead:], [PRESETS[preset].get(name) if name else None for name in logical], mesh)
            return PartitionSpec(*[None] * lead, *axes)
    return PartitionSpec()


def _divided(sizes: tuple[int, ...], wanted: list[str | None], mesh: Mesh) -> list[str | None]:
    """`wanted` where it divides; an axis that does not goes to the largest free dimension that it divides, if any."""
    wanted = [axis if axis and mesh.shape[axis] > 1 else None for axis in wanted]
    axes = [axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in zip(sizes, wanted)]
    for axis in {axis: None for axis in wanted if axis and axis not in axes}:
        free = [i for i, size in enumerate(sizes) if axes[i] is None and size % mesh.shape[axis] == 0]
        if free:
            axes[max(free, key=lambda i: sizes[i])] = axis
    return axes


def whole_leaves(abstract: Any) -> tuple[float, list[str]]:
    """The share of a placed state's bytes that every device holds whole, and the paths, largest first."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    sizes = {path_name(path): leaf.size * leaf.dtype.itemsize for path, leaf in leaves}
    whole = [path_name(path) for path, leaf in leaves if leaf.sharding.is_fully_replicated]
    share = sum(sizes[name] for name in whole) / max(sum(sizes.values()), 1)
    return share, sorted(whole, key=sizes.__getitem__, reverse=True)


def warning(abstract: Any, mesh: Mesh) -> str | None:
    """What to say about a placed state of which every device holds much whole although there is an fsdp axis."""
    share, whole = whole_leaves(abstract)
    if mesh.shape["fsdp"] == 1 or share < 0.05 or share == 1:  # 1: the preset is "replicated"
        return None
    return (
        f"every device holds {share:.0%} of the state whole, above all {', '.join(whole[:3])}: no rule names them, or "
        f"config.mesh.fsdp={mesh.shape['fsdp']} divides none of their dimensions (a smaller fsdp with more data does)"
    )


def state_shardings(abstract: Any, mesh: Mesh, preset: str, offload: str = "none") -> Any:
    """A NamedSharding for every leaf of an abstract state; that of a moment is in host memory where `offload` says so.

    Raises:
      ValueError: for an unknown preset or offload, or devices that cannot reach host memory.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"sharding.offload={offload!r} is not one of {', '.join(OFFLOADS)}")

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, moments = _MOMENT.subn(r"params/\1/", path_name(path))
        where = NamedSharding(mesh, spec(name, leaf.shape, mesh, preset))
        away = offload == "moments" and moments and math.prod(leaf.shape) >= HOST_FROM
        return _in_host_memory(where) if away else where

    return jax.tree_util.tree_map_with_path(place, abstract)


def _in_host_memory(where: NamedSharding) -> NamedSharding:
    try:
        return where.with_memory_kind(HOST)
    except ValueError as error:
        kind = where.mesh.devices.flat[0].device_kind
        raise ValueError(
            f"sharding.offload='moments': {kind} devices cannot reach host memory; set it to 'none'"
        ) from error


def on_host(tree: Any) -> bool:
    """Inside a traced program: whether any leaf lies in host memory."""
    return any(jax.typeof(x).memory_space == jax.memory.Space.Host for x in jax.tree.leaves(tree))


def fetched(tree: Any) -> Any:
    """Inside a traced program: the leaves that lie in host memory, brought to the device."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if on_host(x) else x, tree)


def put_back(new: Any, old: Any) -> Any:
    """Inside a traced program: `new` on the device → each leaf in the memory where `old`'s lies."""
    return jax.tree.map(lambda n, o: jax.device_put(n, jax.memory.Space.Host) if on_host(o) else n, new, old)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all data-parallel devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


class Placement(NamedTuple):
    """How what is traced lies on its devices; `nn.constrain` applies it.

    activations: (array, a logical name or None per dimension) → the array, pinned.
    weights: pytree of parameters → the same, each leaf whole but for tensor parallelism; their gradients leave split
      as the parameters are stored.
    by_head: function of arrays (B, N, G, E) → the same, called by each device with its part of B and G.
    splits: (size, logical name) → whether such a dimension is split.
    """

    activations: Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
    weights: Callable[[Any], Any]
    by_head: Callable[[Callable[..., Any]], Callable[..., Any]]
    splits: Callable[[int, str], bool]


def placement(mesh: Mesh, preset: str = "fsdp+tensor") -> Placement | None:
    """How a step that is traced lies on a mesh; None on one device.

    The batch is split over the data-parallel axes; weights, heads, an MLP's inside and the height of feature maps by
    `tensor`: a convolution's rows of pixels, of which neighbours swap those at the edges.

    Args:
      preset: by which the parameters are stored.
    """
    if mesh.size == 1:
        return None

    def pinned(x: jax.Array, axes: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def activations(x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
        return pinned(x, [activation_axes(mesh, size, name) for size, name in zip(x.shape, logical)])

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        if STACKED in name:
            return leaf
        stored = spec(name, leaf.shape, mesh, preset)
        whole = [None if axis == "fsdp" else axis for axis in spec(name, leaf.shape, mesh, "fsdp+tensor")]
        # The gradient is cut right where it is summed over the devices: a scan stacks the parts. Pinned as stored
        # alone, it would have the partitioner split the product that makes it, and gather the batch for that.
        taken = jax.custom_vjp(lambda x: pinned(x, whole))
        taken.defvjp(lambda x: (pinned(x, whole), None), lambda _, g: (pinned(pinned(g, whole), stored),))
        return taken(leaf)

    def by_head(fn: Callable[..., Any]) -> Callable[..., Any]:
        def split(*arrays: jax.Array) -> Any:
            names = ("batch", None, "heads", None)
            part = PartitionSpec(*(activation_axes(mesh, *each) for each in zip(arrays[0].shape, names)))
            return jax.shard_map(fn, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)(*arrays)

        return split

    def splits(size: int, name: str) -> bool:
        return activation_axes(mesh, size, name) is not None

    return Placement(activations, lambda params: jax.tree_util.tree_map_with_path(gather, params), by_head, splits)


_ACTIVATIONS = {"batch": BATCH_AXES, "height": ("tensor",), "heads": ("tensor",), "mlp": ("tensor",)}


def activation_axes(mesh: Mesh, size: int, name: str | None) -> tuple[str, ...] | None:
    """The mesh axes that split a dimension of `size` entries with a logical name; None leaves it whole.

    A height of one row of pixels a device stays whole: XLA's gradient of a convolution of such rows was wrong where the
    batch is split too.
    """
    axes = _ACTIVATIONS.get(name)
    parts = math.prod(mesh.shape[axis] for axis in axes or ())
    return axes if axes and size % parts == 0 and not (name == "height" and 1 < parts == size) else None


def process_rows(mesh: Mesh, global_batch: int) -> tuple[int, int]:
    """[first, last) of the global batch's rows that this process's devices hold."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((global_batch,)).values()
    bounds = [index[0].indices(global_batch)[:2] for index in slices]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, global_batch: int) -> dict[str, jax.Array]:
    """This process's rows (from `process_rows`) → arrays of the global batch, each device holding its own rows."""
    first, _ = process_rows(mesh, global_batch)
    return {name: place_rows(np.asarray(value), mesh, global_batch, first) for name, value in batch.items()}


def place_rows(local: np.ndarray, mesh: Mesh, global_rows: int | None = None, first: int = 0) -> jax.Array:
    """Rows [first, first + len(local)) of an array with `global_rows` rows (all of them by default), sharded."""
    global_rows = len(local) if global_rows is None else global_rows

    def rows(index: tuple[slice, ...]) -> np.ndarray:
        low, high, _ = index[0].indices(global_rows)
        return local[low - first : high - first]

    return jax.make_array_from_callback((global_rows, *local.shape[1:]), batch_sharding(mesh), rows)
