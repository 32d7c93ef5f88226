"""What one system has, another has by a config line: each mixture trains, and its bundle makes pictures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gigatok_jax import config, export, from_pretrained, sample, teachers
from gigatok_jax.hub import bundle, keymap, sections
from gigatok_jax.run import Run
from tests.networks import VITS, narrow
from tests.steps import train
from tests.teachers import test_convnext
from tests.test_first_stage import write_pictures
from tests.test_titok_run import titok_run
from tests.tiny import TINIEST, config_module, tiny_generator, tiny_masked, tiny_run

WITH_CODES, ADVERSARIAL = {"l2", "codebook", "commitment"}, {"adversarial", "discriminator"}
KL = {
    "tokenizer__bottleneck": "kl",
    "tokenizer__codebook_size": 0,
    "loss__kl_weight": 1e-2,
    "loss__entropy_weight": 0.0,
}
SEMANTIC = {"loss__semantic_weight": 0.5, "tokenizer__teacher_dim": VITS["dinov2-b"].width}
DINO = {"discriminator__name": "dino", "loss__discriminator_start": 1, "loss__lecam_weight": 0.0}
ALONE = {"loss__discriminator_start": 10**9}
BLUR = {"discriminator__name": "blur", "discriminator__base_channels": 32, "loss__lecam": "of_means"}


def titok_recipe(size):
    """What TiTok is published with, its discriminator from the first step; of 16 px, for LPIPS' five stages."""
    cfg = config_module("titok").get_config(size)
    groups = {f"groups__{name}": {**group, "warmup_steps": 0} for name, group in cfg.groups.items()}
    losses = {f"loss__{name}": value for name, value in cfg.loss.items()} | {"loss__discriminator_start": 1}
    tokenizer = {f"tokenizer__{field}": cfg.tokenizer[field] for field in ("head", "legacy", "normalized")}
    return groups | losses | tokenizer | BLUR | {"tokenizer__image_size": 16, "tokenizer__patch": 4}


# Family, what its config says otherwise, and the loss terms of the last step.
MIXTURES = {
    "titok entropy": ("titok", {"loss__entropy_weight": 0.1}, WITH_CODES | {"entropy"}),
    "titok semantic": ("titok", SEMANTIC, WITH_CODES | {"semantic"}),
    "titok dino": ("titok", DINO, WITH_CODES | ADVERSARIAL),
    "titok kl": ("titok", KL, {"l2", "kl"}),
    "titok clustering": ("titok", {"tokenizer__normalized": False, "tokenizer__clustering": True}, WITH_CODES),
    "titok folder": ("titok", {"data__source": "folder"}, WITH_CODES),
    "titok recipe": ("titok", titok_recipe("bl-64-vq"), WITH_CODES | ADVERSARIAL | {"perceptual", "convnext", "lecam"}),
    "gigatok kl": ("gigatok", ALONE | KL, {"l2", "kl"}),
    "gigatok 2d kl": ("gigatok", ALONE | KL | {"tokenizer__layout": "2d"}, {"l2", "kl"}),
    "gigatok blur": ("gigatok", BLUR, WITH_CODES | ADVERSARIAL | {"entropy", "lecam"}),
}  # fmt: skip
# The parts of a model that a term's gradient reaches; codes are read straight through.
REACHED = {
    "l2": {"encoder", "decoder"},
    "semantic": {"encoder", "decoder"},
    "perceptual": {"encoder", "decoder"},
    "convnext": {"encoder", "decoder"},
    "adversarial": {"encoder", "decoder"},
    "codebook": {"bottleneck"},
    "commitment": {"encoder"},
    "entropy": {"encoder", "bottleneck"},
    "kl": {"encoder"},
    "discriminator": {"discriminator"},
    "lecam": {"discriminator"},
}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs and pipelines of this process on its first device: a program of eight compiles longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def networks(tmp_path_factory):
    """Narrow frozen networks, for the length of the file."""
    with pytest.MonkeyPatch.context() as patch:
        for table in (teachers.CONVNETS, teachers.VITS, teachers.SEMANTIC):
            for name, value in table.items():
                patch.setitem(table, name, value)
        patch.setenv("GIGATOK_WEIGHTS", "")
        narrow(folder := tmp_path_factory.mktemp("weights"))
        patch.setitem(teachers.CONVNEXTS, "convnext-s", test_convnext.NARROW)
        patch.setattr(teachers, "CLASSIFIED", 32)  # px: a cell of its last map
        save_file(test_convnext.drawn(), folder / "convnext-s.safetensors")
        yield


def mixture(name, root):
    """The config of a mixture at the smallest sizes."""
    family, changes, _ = MIXTURES[name]
    cfg = titok_run() if family == "titok" else tiny_run(**TINIEST, loss__auxiliary_end=0)
    cfg.update(num_steps=2)
    cfg.frozen.dtype = "float32"
    cfg.tokenizer.update(encoder_depth=1, decoder_depth=1)
    if family == "titok":
        cfg.loss.entropy_weight = 0.0
    if changes.get("tokenizer__layout") == "2d":
        cfg.tokenizer.num_latent_tokens = 64
    if changes.get("data__source") == "folder":
        write_pictures(root / "pictures", 8, 0)
        cfg.data.root = str(root / "pictures")
    for dotted, value in changes.items():
        section, _, field = dotted.partition("__")
        cfg[section][field] = value
    return cfg.lock()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_a_config_line(name, tmp_path):
    cfg, terms = mixture(name, tmp_path), MIXTURES[name][2]
    one = train(cfg, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and not int(one.state.skipped)
    for line in lines:
        assert {key.removeprefix("loss/") for key in line if key.startswith("loss/")} == terms | {"total"}
        assert np.isfinite([line[f"loss/{term}"] for term in terms]).all()
        assert min(line[f"grad_norm/tokenizer/{part}"] for part in ("encoder", "decoder")) > 0
    assert reached(one) == {term: REACHED[term] for term in terms}
    export.export(tmp_path / "run", tmp_path / "bundle")
    pipeline, images = from_pretrained(tmp_path / "bundle"), pictures(3, cfg.tokenizer.image_size)
    if cfg.tokenizer.codebook_size:
        ids = pipeline.tokenize(images)
        assert ids.shape == (3, cfg.tokenizer.num_latent_tokens) and ids.max() < cfg.tokenizer.codebook_size
        made = pipeline.detokenize(ids)
    else:
        latents = pipeline.encode(images)
        assert latents.shape == (3, cfg.tokenizer.num_latent_tokens, cfg.tokenizer.code_dim)
        made = pipeline.decode(latents)
    assert made.shape == images.shape and made.dtype == np.uint8
    want, _ = one.objective.reconstruct(one.state.ema, {}, images / np.float32(127.5) - 1)
    assert np.abs(made - (127.5 * np.asarray(want) + 127.5).clip(0, 255)).max() <= 1


def pictures(count, size):
    """Blocks of colour, (count, size, size, 3) uint8."""
    blocks = np.random.default_rng(1).integers(0, 256, (count, 2, 2, 3)).astype(np.uint8)
    return blocks.repeat(size // 2, 1).repeat(size // 2, 2)


def reached(one):
    """{term: the parts of the models that its gradient reaches} of a run's last phase."""
    objective, state, size = one.objective, jax.device_get(one.state), one.cfg.tokenizer.image_size
    batch = {"image": pictures(4, size)}
    loss = objective.loss(objective.phase(one.cfg.num_steps))

    def terms(params):
        _, (_, metrics) = loss(params, state.state, one.frozen, batch, jax.random.key(0), jnp.int32(2))
        return {name[5:]: value for name, value in metrics.items() if name.startswith("loss/")}

    found = {}
    for term, parts in jax.jit(jax.jacrev(terms))(state.params).items():
        parts = {**parts["tokenizer"], "discriminator": parts.get("discriminator", {})}
        found[term] = {part for part, leaves in parts.items() if any(leaf.any() for leaf in jax.tree.leaves(leaves))}
    return found


SECTIONS = {"gigatok": {"num_latent_tokens": 8}, "titok": {}, "titok kl": {}}  # by mixture or family


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of two classes, and the bundles of drawn tokenizers."""
    root = tmp_path_factory.mktemp("generators")
    write_pictures(root / "pictures", 8, 0)
    for name, changes in SECTIONS.items():
        cfg = mixture({"gigatok": "gigatok blur", "titok": "titok entropy"}.get(name, name), root)
        section = {**config.to_json(cfg.tokenizer), **changes}
        init = jax.jit(sections.build_model("tokenizer", section).init)
        params = jax.device_get(init(jax.random.key(3), np.zeros((1, 8, 8, 3)))["params"])
        bundle.save(root / name, "tokenizer", section, keymap.flatten(params).__getitem__)
    return root


def generator(family, root, tokenizer, **changes):
    """A generator's config over the ids that a tokenizer's bundle makes of pictures inside the step."""
    cfg = config.masked() if family == "masked" else config.ar()
    cfg.update(num_steps=2, global_batch=8, dtype="float32")
    cfg.generator = tiny_masked("bert") if family == "masked" else tiny_generator()
    cfg.generator.update(depth=1, codebook_size=64, num_classes=2, num_latent_tokens=8 if tokenizer == "gigatok" else 4)
    cfg.generator.update(changes)
    cfg.groups.generator.update(learning_rate=1e-2, warmup_steps=0)
    cfg.first_stage.bundle = str(root / tokenizer)
    cfg.data.update(source="folder", root=str(root / "pictures"), num_threads=1)
    cfg.eval.every = 0
    cfg.log.every = 1
    return cfg.lock()


@pytest.mark.parametrize(("family", "name"), [("masked", "gigatok"), ("ar", "titok")])
def test_a_generator_writes_any_tokenizers_ids(family, name, root, tmp_path):
    one = train(generator(family, root, name), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line[f"loss/{family}"] for line in lines]).all() and len(lines) == 2
    assert not int(one.state.skipped)
    export.export(tmp_path / "run", tmp_path / "bundle")
    writer, tokenizer = from_pretrained(tmp_path / "bundle"), from_pretrained(root / name)
    sample.check_pair(writer, tokenizer)
    ids = writer.sample([0, 1, 0], seed=1, **({"num_steps": 2} if family == "masked" else {}))
    images = tokenizer.detokenize(ids)
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8
    drawn = [tokenizer.detokenize(some, float_images=True) for some in (ids, (ids + 1) % 64)]
    assert (drawn[0] != drawn[1]).any()
    other = from_pretrained(root / ("titok" if name == "gigatok" else "gigatok"))
    with pytest.raises(ValueError, match="give the bundle that its training ids were encoded with"):
        sample.check_pair(writer, other)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "titok",
            {"codebook_size": 32},
            r"codebook_size=32, but the ids' tokenizer has 64: set --config\.generator\.c",
        ),
        (
            "gigatok",
            {"codebook_size": 32, "num_latent_tokens": 4},
            r"codebook_size=32, config\.generator\.num_latent_tokens=4, but the ids' tokenizer has 64 and 8: set "
            r"--config\.generator\.codebook_size=64 --config\.generator\.num_latent_tokens=8",
        ),
        ("titok kl", {}, r"titok kl is of a tokenizer with continuous latents \(bottleneck=kl\), which have no ids"),
    ],
)
@pytest.mark.parametrize("family", ["masked", "ar"])
def test_ids_of_other_sizes_are_refused_in_one_error(family, name, changes, words, root, tmp_path):
    with pytest.raises(ValueError, match=words):
        Run(generator(family, root, name, **changes), tmp_path)
