"""What a bundle's `config.json` holds: its fields, their types, and the hash that they are under."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatok_jax.hub.sections import ADDED, RUN_ONLY, checked_section, completed

SCHEMA = 2
FORMS = (1, SCHEMA)  # form 1 differs in its hash alone, which leaves out class names and tokenizer
FIELDS = ("schema", "kind", "section", "class_names", "tokenizer", "provenance", "weights_sha256", "hash")
SIZES = ("codebook_size", "num_latent_tokens", "image_size")  # of a tokenizer, what its ids' users go by
MAX_BYTES = 16 * 2**20


def read(path: Path) -> dict[str, Any]:
    """A checked `config.json`.

    Raises:
      ValueError: naming what is wrong with it.
      OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: this is no bundle's config")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or (wrong := sorted(content.keys() ^ set(FIELDS))):
        wrong = wrong if isinstance(content, dict) else ["it is no JSON object"]
        raise ValueError(f"{path} has unknown or missing fields: {', '.join(wrong)}")
    if content["schema"] not in FORMS:
        raise ValueError(f"{path} has form {content['schema']}, this version reads forms {FORMS[0]} to {SCHEMA}")
    content["section"] = completed(content["section"])
    check(content, str(path))
    if content["hash"] != digest(content):
        raise ValueError(
            f"{path} has changed since it was exported: its hash {content['hash'][:12]}… is of another content; copy "
            "or export the bundle again"
        )
    return content


def check(content: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a field of another type, or out of bounds."""
    names, made = content["class_names"], content["tokenizer"]
    right = {
        "kind": (isinstance(content["kind"], str), "a string"),
        "class_names": (isinstance(names, list) and all(isinstance(x, str) for x in names), "a list of strings"),
        "tokenizer": (made is None or _is_facts(made), f'null, or a SHA-256 as "hash" and {", ".join(SIZES)}'),
        "provenance": (isinstance(content["provenance"], dict), "an object"),
        "weights_sha256": (_is_sha256(content["weights_sha256"]), "a SHA-256"),
        "hash": (_is_sha256(content["hash"]), "a SHA-256"),
    }
    for name, (fits, wanted) in right.items():
        if not fits:
            raise ValueError(f"{where}: {name} should be {wanted}")
    section = checked_section(content["kind"], content["section"], where)
    if content["kind"] != "generator":
        if made is not None:
            raise ValueError(f"{where}: tokenizer should be null, a {content['kind']} reads no ids")
        return
    if len(names) > section["num_classes"]:
        raise ValueError(f"{where}: {len(names)} class_names, but the section has {section['num_classes']} classes")
    for size in SIZES[:2] if made else ():
        if made[size] != section[size]:
            raise ValueError(f"{where}: {size} is {made[size]} of the tokenizer, {section[size]} of the section")


def digest(content: Mapping[str, Any]) -> str:
    """The hash of a bundle: of all that its `config.json` says but how it is run and where it comes from.

    A field that its family got later counts only where it is not as before: the hash of what was made then stays.
    """
    section = content["section"]
    before = ADDED.get(section["family"], {}).items()
    computed = {name: value for name, value in section.items() if name not in RUN_ONLY and (name, value) not in before}
    covered = [content["kind"], computed, content["weights_sha256"]]
    if content["schema"] > 1:
        covered += [content["class_names"], content["tokenizer"]]
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_facts(value: Any) -> bool:
    """Whether this is what is kept of a tokenizer."""
    if not isinstance(value, dict) or value.keys() != {"hash", *SIZES}:
        return False
    return _is_sha256(value["hash"]) and all(type(value[size]) is int and value[size] > 0 for size in SIZES)
