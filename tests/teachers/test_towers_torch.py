"""Vision transformers against `transformers` and `timm` on the same drawn weights, from images to patch tokens.

Embeddings are drawn small, so that a LayerNorm's epsilon tells; the files are those that the libraries write.
"""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gigatok_jax import teachers
from gigatok_jax.hub import teachers as hub
from gigatok_jax.hub.vit_keys import vit_entries
from tests.compare import assert_close_tree
from tests.networks import tiny
from tests.torch_shims import with_torchvision_declared

pytestmark = pytest.mark.parity
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def torch():
    with_torchvision_declared()
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def vision_transformer(torch):
    return pytest.importorskip("timm.models.vision_transformer")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    for name, sizes in teachers.VITS.items():
        hidden = 48 if sizes.mlp == "swiglu" else 24 if sizes.hidden else 0  # 48: of 16 channels, by DINOv2's rule
        monkeypatch.setitem(teachers.VITS, name, tiny(sizes)._replace(hidden=hidden))


def drawn(shapes):
    """Tensors by name and shape."""
    rng, state = np.random.default_rng(0), {}
    for key, shape in shapes.items():
        x = rng.standard_normal(shape)
        if key.endswith(("gamma", "lambda1")):
            x = 0.5 + 0.1 * x
        elif any(part in key for part in ("embed", "token", "conv1")):
            x = 0.05 * x
        elif len(shape) == 1:
            x = 0.1 * x + key.endswith("weight")
        elif len(shape) > 1:
            x = 1.5 * x / np.sqrt(shape[-1])
        state[key] = x.astype(np.float32)
    return state


def draw(torch, model):
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in drawn(shapes).items()})
    return model.eval()


def images():
    return np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)


def preprocessed(torch, name, size):
    """`images` as the published train step prepares them for a teacher of that name, for another size than 224."""
    x = (torch.from_numpy(images()).permute(0, 3, 1, 2) + 1) / 2

    def normalised(x, mean, std):
        return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    resized = functools.partial(torch.nn.functional.interpolate, size=size, mode="bicubic")
    if name.startswith("dinov2"):
        return resized(normalised(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    if name.startswith("siglip"):
        return normalised(resized(x), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return normalised(resized(x), CLIP_MEAN, CLIP_STD)


def features(name, path, grid=(5, 5)):
    params = hub.load_roles({"semantic": name}, path.parent, grid=grid)["semantic"]
    return jax.jit(teachers.semantic(name, grid))(params, images())


def in_transformers(transformers, name):
    """A narrow model of the library, and its patch tokens as the published code takes them."""
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**common, "image_size": 20, "patch_size": 4}
    text = {**common, "intermediate_size": 24, "vocab_size": 9, "max_position_embeddings": 4}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if name.endswith("-reg"):
        config = transformers.Dinov2WithRegistersConfig(**vision, use_swiglu_ffn=name == "dinov2-g-reg")
        return transformers.Dinov2WithRegistersModel(config), lambda model, x: model(x).last_hidden_state[:, 5:]
    if name.startswith("dinov2"):
        config = transformers.Dinov2Config(**vision, use_swiglu_ffn=name == "dinov2-g")
        return transformers.Dinov2Model(config), lambda model, x: model(x).last_hidden_state[:, 1:]
    if name.startswith("siglip"):
        config = transformers.SiglipConfig(vision_config={**vision, "intermediate_size": 24}, text_config=text)
        return transformers.SiglipModel(config), lambda model, x: model.vision_model(x).last_hidden_state
    vision |= {"intermediate_size": 64, "hidden_act": "quick_gelu"}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)

    def tokens(model, x):  # this library leaves the last LayerNorm to the class token
        vision = model.vision_model
        return vision.post_layernorm(vision(x).last_hidden_state[:, 1:])

    return transformers.CLIPModel(config), tokens


@pytest.mark.parametrize(
    "name", ["dinov2-s", "dinov2-g", "dinov2-b-reg", "dinov2-g-reg", "siglip-so400m", "dfn-clip-l"]
)
def test_files_of_transformers(torch, transformers, tmp_path, name):
    model, tokens = in_transformers(transformers, name)
    draw(torch, model).save_pretrained(tmp_path)
    with torch.no_grad():
        want = tokens(model, preprocessed(torch, name, (20, 20))).numpy()
    (tmp_path / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    assert_close_tree(features(name, tmp_path / f"{name}.safetensors"), want)


def in_timm(vision_transformer, name):
    """A narrow model of the library, for any image size, and how many tokens come before the patches."""
    layers = pytest.importorskip("timm.layers")
    options = {"img_size": 20, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    if name.startswith("dfn-clip"):
        norm = functools.partial(layers.LayerNorm, eps=1e-5)
        options |= {"act_layer": "quick_gelu", "norm_layer": norm, "pre_norm": True}
    else:
        options |= {"init_values": 1.0}
    if name.endswith("-reg"):
        options |= {"reg_tokens": 4, "no_embed_class": True}
    if name.startswith("dinov2-g"):
        options |= {"mlp_layer": layers.SwiGLUPacked, "mlp_ratio": 6, "act_layer": "silu"}
    return vision_transformer.VisionTransformer(**options, dynamic_img_size=True).eval()


@pytest.mark.parametrize("name", ["dinov2-b", "dinov2-g", "dinov2-s-reg", "dinov2-g-reg", "dfn-clip-l"])
@pytest.mark.parametrize("grid", [(5, 5), (3, 7)])
def test_original_files_and_those_of_timm(torch, vision_transformer, tmp_path, name, grid):
    """timm reads the original layouts by a key map of its own; on another grid it resamples positions."""
    layout, path = "original" if name.startswith("dinov2") else "open_clip", tmp_path / f"{name}.safetensors"
    entries = vit_entries(teachers.VITS[name], layout, mask_token=layout == "original")
    state = drawn({entry.key: entry.shape for entry in entries})
    save_file(state, path)
    model = in_timm(vision_transformer, name)
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    model.load_state_dict(vision_transformer.checkpoint_filter_fn(tensors, model))
    with torch.no_grad():
        x = preprocessed(torch, name, (4 * grid[0], 4 * grid[1]))
        want = model.forward_features(x)[:, model.num_prefix_tokens :].numpy()
    assert_close_tree(features(name, path, grid), want)
    if layout == "original":
        save_file({key: value.numpy() for key, value in model.state_dict().items()}, path)
        assert load_file(path).keys() != state.keys()
        assert_close_tree(features(name, path, grid), want)


@pytest.mark.parametrize("name", ["siglip-so400m", "dfn-clip-l"])
def test_every_tensor_of_a_published_file_is_kept_or_dropped_by_name(torch, transformers, monkeypatch, name):
    """At the published sizes, of which nothing is allocated."""
    monkeypatch.undo()
    vision = {"image_size": 224, "patch_size": 14, "num_attention_heads": 16}
    if name.startswith("siglip"):
        towers = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        config = transformers.SiglipConfig(vision_config={**vision, **towers}, text_config=towers)
    else:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "hidden_act": "quick_gelu"}
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=768)
    with torch.device("meta"):
        model = (transformers.SiglipModel if name.startswith("siglip") else transformers.CLIPModel)(config)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    kept = {entry.key: entry.shape for entry in hub.entries(name, state)}
    assert kept.items() <= state.items()
    assert (state.keys() - kept.keys()) <= set(hub.droppable(name))
    assert sum(key.startswith("vision_model.") for key in state.keys() - kept.keys()) == (
        11 if name.startswith("siglip") else 0
    )


@pytest.mark.parametrize("name", [f"dinov2-{size}{kind}" for kind in ("", "-reg") for size in "sblg"])
def test_published_parameter_counts(torch, transformers, monkeypatch, name):
    monkeypatch.undo()
    sizes = teachers.VITS[name]
    kind = "Dinov2WithRegisters" if sizes.num_registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=name.startswith("dinov2-g"),
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    count = sum(int(np.prod(entry.shape)) for entry in vit_entries(sizes, "dinov2-hf", mask_token=True))
    assert count == model.num_parameters()
