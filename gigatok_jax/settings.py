"""What a folder was asked to hold, written beside it: who comes with other settings does not mix two results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatok_jax.data.shards import write_json


def keep(path: Path, asked: Mapping[str, Any], what: str) -> None:
    """Writes the settings, after everything that can be wrong with them was looked at.

    Args:
      asked: JSON data.
      what: the folder's content, such as "images".
    Raises:
      ValueError: the folder has others already, naming what differs.
    """
    if path.is_file() and (old := json.loads(path.read_text())) != asked:
        differing = sorted(name for name in old.keys() | asked.keys() if old.get(name) != asked.get(name))
        raise ValueError(
            f"{path.parent} has {what} of another {', '.join(differing)}: give another --out, or delete this one"
        )
    write_json(path, asked)  # by every process: whole, whichever comes last
