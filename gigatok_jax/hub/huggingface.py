"""Folders of Hugging Face repositories, at one commit, fetched once."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

COMMIT = "[0-9a-f]{40}"  # a revision that never moves


def fetched(address: str, files: Sequence[str]) -> Path:
    """The folder with the files of "hf://owner/name@revision"; of a commit that is here no network is asked.

    A tag or branch is resolved to the commit that it names now, or named last where there is no network.

    Raises:
      ValueError: another address, or one that cannot be fetched.
      ImportError: without the package huggingface_hub.
    """
    match = re.fullmatch(r"hf://(\w[\w.-]*/\w[\w.-]*)@(\w[\w.-]*)", address)
    if not match:
        raise ValueError(
            f"{address} should read hf://owner/name@revision: a commit or tag says which weights are meant"
        )
    name, revision = match.groups()
    kept = Path("~/.cache/gigatok_jax/bundles").expanduser() / name.replace("/", "--")
    if re.fullmatch(COMMIT, revision) and all((_folder(kept, revision) / file).is_file() for file in files):
        return _folder(kept, revision)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{address} needs the package huggingface_hub: pip install 'gigatok_jax[hub]'") from None
    try:  # without a network it gives what its own cache holds
        found = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of many libraries below it
        raise ValueError(f"{address} cannot be fetched, nor is it in the cache: {error}") from None
    if not re.fullmatch(COMMIT, found.name):
        raise ValueError(f"{address} cannot be resolved to a commit: it was fetched into {found}")
    folder = _folder(kept, found.name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:  # in that cache they are links that leave their folder
        if (found / file).is_file() and not (folder / file).is_file():
            _link((found / file).resolve(), folder / file)
    return folder


def _folder(kept: Path, commit: str) -> Path:
    return kept.with_name(f"{kept.name}@{commit}")


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy of it where it lies on another disk."""
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
