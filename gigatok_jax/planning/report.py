"""A plan in words: a table, what its numbers are made of, and what would help where it does not fit."""

from collections.abc import Mapping
from typing import Any


def table(rows: list[Mapping[str, Any]]) -> str:
    """A line per program: memory, projected time and what bounds it; of steps and MFU both bounds."""
    lines = [("program", "topology", "mesh", "batch", "HBM GiB", "of", "×ideal", "fits")]
    lines[0] += ("step s", "MFU", "bound", "FLOP/B", "links MiB")
    for row in rows:
        mesh = "×".join(str(size) for size in row["mesh"].values())
        memory = f"{row['hbm_gib_per_device']:.2f}", f"{row['hbm_gib_limit']:g}", "yes" if row["fits"] else "no"
        ideal = f"{row['over_ideal']:.2f}" if "over_ideal" in row else ""
        rest = ("",) * 5
        if "bound" in row:
            seconds = f"{row['projected_step_seconds']:.4g}–{row['projected_step_seconds_in_turn']:.4g}"
            mfu = f"{row['projected_mfu']:.0%}–{row['projected_mfu_in_turn']:.0%}"
            moved = f"{row['collective_bytes_per_step'] / 2**20:.0f}"
            rest = seconds, mfu, row["bound"], f"{row['flops_per_byte']:.0f}", moved
        images = str(row["images"])
        lines.append((row["program"], row["topology"], mesh, images, *memory[:2], ideal, memory[2], *rest))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def details(row: Mapping[str, Any]) -> str:
    """What makes a plan's numbers: bytes by what holds them, FLOPs by network, collectives by kind, the run's cost."""
    held, gib = row["argument_bytes"], 2**30
    parts = {**held.get("state", {}), "frozen": sum(held.get("frozen", {}).values())}
    parts |= {"temporaries": row["memory"].get("temporaries", 0)}
    lines = [f"{row['program']} on {row['topology']}, GiB a device: " + _listed(parts, gib, ".3g")]
    if networks := row["flops"].get("networks"):
        lines.append(
            "TFLOPs a step by network: " + _listed({name or "other": n for name, n in networks.items()}, 1e12, ".4g")
        )
    if "projected_seconds" in row:
        sent = {f"{kind} ×{one['count']:,.0f}": one["bytes"] for kind, one in row["collectives"].items()}
        lines.append("MiB sent a device and step: " + (_listed(sent, 2**20, ",.0f") or "none"))
        lines.append("projected seconds, each at its peak: " + _listed(row["projected_seconds"], 1, ".3g"))
    if whole := row.get("gathered_stacks"):
        lines.append("gathers all layers' weights at once, not a layer's: " + "; ".join(whole[:3]))
    if "chip_hours" in row:
        lines.append(
            f"num_steps such steps: {row['images_of_the_run']:,} images, {row['chip_hours']:,.0f} to "
            f"{row['chip_hours_in_turn']:,.0f} chip-hours, projected"
        )
    return "\n  ".join(lines)


def _listed(values: Mapping[str, float], unit: float, form: str) -> str:
    """What is not next to nothing, largest first."""
    shown = sorted(values.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / unit:{form}}" for name, value in shown if value > 1e-3 * shown[0][1])


def misfit(row: Mapping[str, Any]) -> str:
    """Why a program does not fit: its largest tensors, and what would help."""
    largest = [
        f"  {one['size']} {one['shape']} of {one['op'] or 'no named operation'}" for one in row.get("largest", [])
    ]
    said = f"{row['program']} does not fit {row['topology']}: {row['hbm_gib_of_a_phase']:.1f} GiB of "
    largest = ["The largest tensors:", *largest] if largest else []
    return "\n".join([f"{said}{row['hbm_gib_limit']:.1f} a device.", *largest, advice(row)])


def advice(row: Mapping[str, Any]) -> str:
    """What of its settings would make a program smaller on a device."""
    mesh, settings, train, section = row["mesh"], row["settings"], row["program"] == "train", row["model"]
    helps = {
        "--mesh=fsdp=N with a larger N": mesh["data"] > 1,
        "a larger --config.accumulate": train,
        f"--config.{section}.remat=full": train and settings.get("remat", "full") != "full",
        "a smaller --config.tokenizer.codebook_chunk": section == "tokenizer",
        "--config.sharding.offload=moments": train and settings["offload"] == "none",
        "more chips": mesh["data"] == 1,
    }
    return "Smaller per device: " + ", ".join(["a smaller --config.global_batch", *(n for n, y in helps.items() if y)])
