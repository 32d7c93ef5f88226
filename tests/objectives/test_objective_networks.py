"""An objective that looks through frozen networks: perceptual and semantic losses, and a discriminator over one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gigatok_jax import objectives, teachers
from gigatok_jax.discriminators.dino import DinoDiscriminator
from gigatok_jax.hub import keymap
from gigatok_jax.hub import teachers as hub
from gigatok_jax.hub.vit_keys import vit_entries
from gigatok_jax.nn.vit import ViTSizes
from gigatok_jax.objectives.teachers import perceptual, semantic
from tests.networks import TINY_VGG
from tests.teachers.seeded import seeded
from tests.tiny import tiny_run


@pytest.fixture
def setting(monkeypatch, tmp_path):
    """(objective, frozen, batch): LPIPS and VGG16 features at 16 px, and DINO heads over a one-layer ViT."""
    monkeypatch.setitem(teachers.CONVNETS, "vgg16", TINY_VGG)
    save_file(seeded(hub.entries("vgg16")), tmp_path / "vgg16.safetensors")
    frozen = hub.load_roles({"perceptual": "vgg16", "semantic": "vgg16"}, tmp_path, grid=(8, 8))
    sizes = ViTSizes(16, 1, 2, 16, 14, "gelu_tanh", layer_scale=False)
    frozen["discriminator"] = keymap.from_published(vit_entries(sizes), seeded(vit_entries(sizes)))

    cfg = tiny_run(loss__perceptual_weight=1.0, loss__semantic_weight=0.5, loss__auxiliary_end=0)
    cfg.tokenizer.update(image_size=16, teacher_dim=8)
    roles = {"perceptual": perceptual("vgg16"), "semantic": semantic("vgg16", (8, 8))}
    objective = objectives.build(cfg, roles)
    head = DinoDiscriminator(width=16, depth=1, num_heads=2, taps=(0, 1))
    batch = {"image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)}
    return objective._replace(discriminator=head), frozen, batch


def test_every_term_is_there_and_the_frozen_networks_get_no_gradient(setting):
    objective, frozen, batch = setting
    params, state = jax.jit(objective.init)(jax.random.key(0))
    assert state["discriminator"].keys() == {"spectral"}
    loss = objective.loss(objective.phase(0))

    def total(params, frozen, key):
        return loss(params, state, frozen, batch, key, jnp.int32(0))

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (new, metrics)), gradients = step(params, frozen, jax.random.key(1))
    terms = {name for name in metrics if name.startswith("loss/")}
    assert {"loss/perceptual", "loss/semantic", "loss/adversarial", "loss/discriminator", "loss/lecam"} <= terms
    assert all(np.isfinite(metrics[name]) for name in terms)
    assert metrics["loss/perceptual"] > 0 and -0.5 <= metrics["loss/semantic"] <= 0.5
    assert jax.tree.structure(new) == jax.tree.structure(state)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new["discriminator"], state["discriminator"])
    assert min(leaf for path, leaf in keymap.flatten(moved).items() if "logits/u" not in path) > 0
    heads = keymap.flatten(gradients["discriminator"])
    assert all(np.abs(leaf).max() > 0 for path, leaf in heads.items() if path.endswith("kernel"))
    assert np.abs(gradients["tokenizer"]["decoder"]["cnn"]["conv_out"]["kernel"]).max() > 0

    # Augmentation is drawn from the step's key, nothing else is.
    (_, (_, again)), _ = step(params, frozen, jax.random.key(1))
    (_, (_, other)), _ = step(params, frozen, jax.random.key(2))
    assert again["loss/discriminator"] == metrics["loss/discriminator"] != other["loss/discriminator"]
    assert other["loss/perceptual"] == metrics["loss/perceptual"]
