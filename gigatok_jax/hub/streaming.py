"""Safetensors files written tensor by tensor, so that no more than one is in memory.

The safetensors library takes all tensors at once. The form is eight bytes of header length, a JSON header
`{name: {"dtype", "shape", "data_offsets"}}`, and the tensors' little-endian bytes one after the other.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# numpy's name of a dtype → safetensors' name.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
FLOATING = ("float64", "float32", "bfloat16", "float16")


def published_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a file in a published layout says of itself; transformers reads no file that does not name its form."""
    return {"format": "pt", "provenance": json.dumps(facts)}


def write_streamed(
    path: Path,
    shapes: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes a file under another name, renames it when it is whole, and returns its SHA-256.

    Args:
      shapes: name → anything with `shape` and `dtype`.
      read: gives the tensor of a name; called once for each, in order.
      on_tensor: told how many tensors are written, of how many.
      metadata: texts that the file keeps beside its tensors.
    Raises:
      ValueError: a dtype that the form does not have here, or a tensor that is not as announced.
      OSError: the file cannot be written; nothing is left at `path`.
    """
    header, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, leaf in shapes.items():
        if str(leaf.dtype) not in DTYPES:
            raise ValueError(f"{name} has dtype {leaf.dtype}; a file holds {', '.join(DTYPES)}")
        end = offset + int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
        header[name] = {"dtype": DTYPES[str(leaf.dtype)], "shape": list(leaf.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial, digest = path.with_name(path.name + ".partial"), hashlib.sha256()
    try:
        with open(partial, "wb") as file:

            def put(data: Any) -> None:
                file.write(data)
                digest.update(data)

            put(len(text).to_bytes(8, "little") + text)
            for done, (name, leaf) in enumerate(shapes.items(), 1):
                tensor = np.asarray(read(name), order="C")
                if tensor.shape != tuple(leaf.shape) or tensor.dtype != leaf.dtype:
                    raise ValueError(
                        f"{name} is {tensor.dtype}{list(tensor.shape)}, announced as {leaf.dtype}{list(leaf.shape)}"
                    )
                put(tensor.reshape(-1).view(np.uint8))
                on_tensor(done, len(shapes))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()
