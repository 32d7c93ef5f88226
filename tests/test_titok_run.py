"""TiTok by the house's one loop: its forms on one device and on eight, its two stages, what it refuses."""

import shutil

import jax
import numpy as np
import pytest

from gigatok_jax import config, export, objectives, sharding
from gigatok_jax.hub import bundle, frozen, keymap, sections
from gigatok_jax.run import Run
from tests.steps import MESHES, ONE, assert_same_leaves, full_step, train
from tests.tiny import tiny_run

SIZES = {"patch": 2, "legacy": False, "head": "pixels", "normalized": True, "clustering": False, "bottleneck": "vq"}
STAGE_1, STAGE_2 = {"legacy": True, "head": "proxy"}, {"legacy": True, "head": "proxy_pixels"}
FORMS = {
    "stage1": STAGE_1,
    "stage2": STAGE_2,
    "plain codes": {"normalized": False},
    "clustering": {"normalized": False, "clustering": True},
    "kl": {"bottleneck": "kl", "codebook_size": 0},
}


def titok_run(form=(), **changes):
    """A config of 8 px, 4×4 cells and 4 latent tokens; `form` are fields of its tokenizer's section."""
    cfg = tiny_run(loss__auxiliary_end=0, loss__feature_weight=0.0, loss__discriminator_start=10**9, **changes)
    section = config.titok_tokenizer()
    section.update(image_size=8, num_latent_tokens=4, codebook_size=64, codebook_chunk=32, code_dim=4, remat="none")
    section.update(proxy_codebook_size=32, proxy_code_dim=8, proxy_conv_base=8, proxy_conv_multipliers=(1, 2))
    section.update(proxy_decoder_conv_blocks=1, proxy_norm_groups=4, remat_convs=False, distill_layer=1)
    for side in ("encoder", "decoder"):
        section.update({f"{side}_width": 16, f"{side}_depth": 2, f"{side}_heads": 2})
    section.update({**SIZES, **dict(form)})
    cfg.tokenizer = section
    if section.bottleneck == "kl":
        cfg.loss.update(kl_weight=1e-2, entropy_weight=0.0)
    return cfg


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """The bundle of a drawn proxy tokenizer."""
    section = config.maskgit_vqgan_tokenizer()
    section.update(image_size=8, num_latent_tokens=16, conv_base=8, conv_multipliers=(1, 2), norm_groups=4)
    section.update(encoder_conv_blocks=1, decoder_conv_blocks=1, codebook_size=32, code_dim=8, kernel_gain=1.0)
    section, folder = config.to_json(section), tmp_path_factory.mktemp("proxy")
    model = sections.build_model("tokenizer", section)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(5), np.zeros((1, 8, 8, 3)))["params"])
    # As far apart as latents are: else all cells have one id.
    params["bottleneck"]["codebook"] = 32 * params["bottleneck"]["codebook"]
    bundle.save(folder, "tokenizer", section, keymap.flatten(params).__getitem__)
    return str(folder)


@pytest.mark.parametrize("form", FORMS)
def test_eight_devices_take_the_step_of_one(form, proxy):
    cfg, results = titok_run(FORMS[form]), []
    if form == "stage1":
        cfg.first_stage.bundle = proxy
    cfg = frozen.resolved(cfg)
    objective = objectives.build(cfg)
    for layout in (ONE, MESHES["mixed"]):
        mesh = sharding.make_mesh(layout[0], jax.devices()[: int(np.prod(list(layout[0].values())))])
        results.append(full_step(layout, cfg, objective, frozen.of_config(cfg, mesh))[0])
    (want, want_state, want_metrics), (grads, state, metrics) = results
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    # On one device, too, the batch in another order moves a leaf by up to 4e-5.
    assert_same_leaves(grads, want, 1e-4)
    assert_same_leaves((state.params, state.state), (want_state.params, want_state.state), 1e-5)
    assert "loss/proxy" in metrics if form == "stage1" else "loss/l2" in metrics
    if form == "clustering":
        codebook = objective.init(jax.random.key(cfg.seed))[0]["tokenizer"]["bottleneck"]["codebook"]
        moved = np.abs(want_state.params["tokenizer"]["bottleneck"]["codebook"] - codebook)
        assert (moved.max(-1) > 1e-3).sum() > 32  # most entries are seldom used


def steps_of(workdir, cfg, **options):
    one = train(cfg.lock(), workdir, **options)
    return one, jax.device_get(one.state)


def test_stage_1_then_stage_2_resumed_to_the_bit(proxy, tmp_path):
    first = titok_run(STAGE_1, num_steps=4, first_stage__bundle=proxy)
    _, state = steps_of(tmp_path / "stage1", first)
    export.export(tmp_path / "stage1", tmp_path / "bundle", weights="raw")
    content = export.joined(tmp_path / "bundle", proxy)
    assert content["provenance"]["frozen"]["first_stage"] == content["provenance"]["joined"]["proxy"]

    def second():
        cfg = titok_run(STAGE_2, num_steps=6, start__bundle=str(tmp_path / "bundle"))
        cfg.groups.tokenizer.trainable = "decoder/.*"
        cfg.loss.update(codebook_weight=0.0, commitment_weight=0.0, entropy_weight=0.0, discriminator_start=4)
        cfg.checkpoint.every = 2
        return cfg

    one, whole = steps_of(tmp_path / "whole", second())
    for part in ("encoder", "bottleneck"):
        jax.tree.map(np.testing.assert_array_equal, whole.params["tokenizer"][part], state.params["tokenizer"][part])
    moved = jax.tree.map(
        np.subtract, whole.params["tokenizer"]["decoder"]["stack"], state.params["tokenizer"]["decoder"]["stack"]
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(moved))
    assert one.evaluator is None
    steps_of(tmp_path / "parts", second(), until=3)
    shutil.rmtree(tmp_path / "bundle")  # a run that goes on needs it no more
    _, parts = steps_of(tmp_path / "parts", second())
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_weights_that_would_stay_as_drawn_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"trainable='decoder/\.\*' would keep bottleneck/codebook and \d+ more as they are"
    ):
        Run(titok_run(groups__tokenizer__trainable="decoder/.*").lock(), tmp_path)


def test_a_pattern_of_all_weights_keeps_none(tmp_path):
    Run(titok_run(groups__tokenizer__trainable="(encoder|bottleneck|decoder)/.+").lock(), tmp_path)


def test_a_first_stage_that_is_not_joined_starts_no_second(proxy, tmp_path):
    section = config.to_json(titok_run(STAGE_1).tokenizer)
    arrays = {
        name: np.zeros(leaf.shape, np.float32) for name, leaf in sections.parameter_shapes("tokenizer", section).items()
    }
    bundle.save(tmp_path / "first", "tokenizer", section, arrays.__getitem__)
    cfg = titok_run(STAGE_2, start__bundle=str(tmp_path / "first"))
    with pytest.raises(ValueError, match=r"join it with that one's bundle, .*--proxy=BUNDLE"):
        Run(cfg.lock(), tmp_path / "run")


def test_a_start_of_another_model_is_refused(proxy, tmp_path):
    cfg = titok_run(start__bundle=proxy)
    with pytest.raises(ValueError, match=r"start.bundle=.* is of another model.*family='maskgit_vqgan'"):
        Run(cfg.lock(), tmp_path)


@pytest.mark.parametrize(
    "form, bundle_of, said",
    [
        (STAGE_1, "", "first_stage.bundle=FOLDER"),
        ({"head": "pixels"}, "proxy", "first_stage.bundle is of no use"),
        (STAGE_1 | {"proxy_codebook_size": 16}, "proxy", "codebook_size=32, this tokenizer's decoder wants 16"),
        ({"patch": 3}, "", "no multiple of tokenizer.patch=3"),
        (STAGE_2 | {"patch": 1}, "", "patch=1 is no multiple of the 2 pixels"),
        ({"bottleneck": "kl"}, "", "codebook_size=64"),
        ({"codebook_size": 0}, "", "codebook_size=0"),
        ({"encoder_heads": 3}, "", "does not divide into 3 heads"),
    ],
)
def test_what_cannot_work_is_refused(form, bundle_of, said, proxy):
    cfg = titok_run(form, first_stage__bundle=proxy if bundle_of else "")
    with pytest.raises(ValueError, match=said):
        objectives.build(frozen.resolved(cfg))


@pytest.mark.parametrize("form", ["kl", "plain codes"])
def test_trains_and_is_scored(form, tmp_path):
    cfg = titok_run(FORMS[form], num_steps=3)
    cfg.data.update(eval_source="photographs", eval_root="")
    cfg.eval.every = 2
    one, _ = steps_of(tmp_path, cfg)
    assert ("loss/kl" if form == "kl" else "codebook/usage") in one.objective.shown
    assert (tmp_path / "grids" / "step_00000003.png").exists()


def test_a_first_stage_with_statistics_is_resumed_to_the_bit(proxy, tmp_path):
    def stage():
        return titok_run(STAGE_1 | FORMS["clustering"], num_steps=4, first_stage__bundle=proxy)

    _, whole = steps_of(tmp_path / "whole", stage())
    steps_of(tmp_path / "parts", stage(), until=2)
    one, parts = steps_of(tmp_path / "parts", stage())
    assert one.start == 2
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    usage = whole.state["tokenizer"]["statistics"]["bottleneck"]["usage"]
    np.testing.assert_allclose(usage.sum(), 1 - 0.99**4, rtol=1e-4)  # of all steps, before the resume and after
