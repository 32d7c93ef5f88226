"""NVIDIA GPUs as XLA's compiler needs them described where there is none.

Kernels cannot be timed without a device: every matrix product is cuBLAS's and every convolution cuDNN's, with the first
of their algorithms. The scratch space of those that a run would choose is not in a plan.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from gigatok_jax.scaling.chips import CHIPS, Topology

# Products by Triton would need tiles that are found by timing; those guessed instead do not fit every shape.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Gpu(NamedTuple):
    """What sets one GPU apart.

    name: as CUDA says it.   capability: (major, minor).   multiprocessors, fp32_lanes (of each), clock_ghz (highest).
    l2_mib, shared_kib (of a multiprocessor).
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    fp32_lanes: int
    clock_ghz: float
    l2_mib: int
    shared_kib: int


# NVIDIA's A100 and H100 architecture papers, and the H200's data sheet; shared memory by compute capability: CUDA
# programming guide, "Technical Specifications".
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40, 164),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50, 228),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 50, 228),
}


def description(kind: str) -> str:
    """A GPU as the text of XLA's `GpuTargetConfigProto`; limits that all have are the CUDA programming guide's."""
    gpu, chip = GPUS[kind], CHIPS[kind]
    major, minor = gpu.capability
    # From 9.0 on, kernels may use what that generation alone has (sm_90a).
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": (gpu.shared_kib - 1) * 2**10,
        "shared_memory_per_core": gpu.shared_kib * 2**10,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.fp32_lanes,
        "clock_rate_ghz": gpu.clock_ghz,
        "l2_cache_size": gpu.l2_mib * 2**20,
        "memory_bandwidth": int(chip.hbm_bandwidth),
        "device_memory_size": int(chip.hbm_gib * 2**30),
    }
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}"
    fields = "\n  ".join([*(f"{name}: {value}" for name, value in device.items()), capability])
    return f'gpu_device_info {{\n  {fields}\n}}\nplatform_name: "CUDA"\ndevice_description_str: "{gpu.name}"\n'


def devices(topology: Topology) -> Sequence[jax.Device]:
    """The GPUs of a topology, host by host.

    Raises:
      NotImplementedError: JAX has no CUDA plugin.
    """
    hosts, each = (1, *topology.shape)[-2:]
    # Partitions × hosts of one × GPUs of one: a partition is what NVLink joins.
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=description(topology.name.partition(":")[0]),
        topology=f"{hosts}x1x{each}",
    ).devices


def host_size(found: Sequence[jax.Device]) -> int:
    """GPUs of one host where there are several hosts; 0 of one host's, and of TPUs, whose links join hosts as well."""
    each = sum(device.process_index == found[0].process_index for device in found)
    return each if found[0].platform == "gpu" and each < len(found) else 0


def without_fused_attention(cfg: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """A config that can be compiled without its GPU, and what to say of the difference."""
    cfg, notes = cfg.copy_and_resolve_references().unlock(), []
    for section in ("tokenizer", "generator"):
        if section in cfg and cfg[section].get("attention") == "cudnn":
            cfg[section].attention = "xla"
            notes.append(
                f"{section}.attention=cudnn cannot be compiled without its GPU: this is XLA's, "
                "which takes more memory and time"
            )
    return cfg.lock(), notes
