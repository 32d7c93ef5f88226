"""LlamaGen's tokenizer against the same computation in PyTorch, on the same drawn weights."""

import numpy as np
import pytest

from gigatok_jax import config
from gigatok_jax.hub import llamagen, models
from gigatok_jax.sampling.pipelines import TokenizerPipeline
from tests.compare import assert_close_tree
from tests.teachers.seeded import seeded

pytestmark = pytest.mark.parity
SIZES = {"conv_base": 32, "conv_multipliers": [1, 2], "codebook_size": 64, "image_size": 16, "num_latent_tokens": 64}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


class Net:
    """VQGAN's layers by the names of a published state dict."""

    def __init__(self, torch, state):
        self.F = torch.nn.functional
        self.state = {key: torch.from_numpy(value) for key, value in state.items()}

    def conv(self, key, x, **options):
        weight, bias = self.state[f"{key}.weight"], self.state[f"{key}.bias"]
        return self.F.conv2d(x, weight, bias, **({"padding": weight.shape[-1] // 2} | options))

    def norm(self, key, x):
        return self.F.group_norm(x, 32, self.state[f"{key}.weight"], self.state[f"{key}.bias"], 1e-6)

    def block(self, key, x):
        h = self.conv(f"{key}.conv1", self.F.silu(self.norm(f"{key}.norm1", x)))
        h = self.conv(f"{key}.conv2", self.F.silu(self.norm(f"{key}.norm2", h)))
        wider = f"{key}.nin_shortcut.weight" in self.state
        return h + (self.conv(f"{key}.nin_shortcut", x) if wider else x)

    def attention(self, key, x):
        h = self.norm(f"{key}.norm", x)
        q, k, v = (self.conv(f"{key}.{name}", h).flatten(2).mT[:, None] for name in "qkv")
        h = self.F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return x + self.conv(f"{key}.proj_out", h)

    def level(self, key, x, blocks, attended):
        for n in range(blocks):
            x = self.block(f"{key}.res.{n}", x)
            x = self.attention(f"{key}.attn.{n}", x) if attended else x
        return x

    def middle(self, key, x):
        return self.block(f"{key}.mid.2", self.attention(f"{key}.mid.1", self.block(f"{key}.mid.0", x)))

    def out(self, key, x):
        return self.conv(f"{key}.conv_out", self.F.silu(self.norm(f"{key}.norm_out", x)))

    def latents(self, image):
        x = self.level("encoder.conv_blocks.0", self.conv("encoder.conv_in", image), 2, False)
        x = self.conv("encoder.conv_blocks.0.downsample.conv", self.F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.middle("encoder", self.level("encoder.conv_blocks.1", x, 2, True))
        return self.conv("quant_conv", self.out("encoder", x))

    def images(self, ids):
        codes = self.F.normalize(self.state["quantize.embedding.weight"])[ids].mT
        x = self.conv("post_quant_conv", codes.reshape(len(ids), -1, 8, 8))
        x = self.level("decoder.conv_blocks.0", self.middle("decoder", self.conv("decoder.conv_in", x)), 3, True)
        x = self.conv("decoder.conv_blocks.0.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.out("decoder", self.level("decoder.conv_blocks.1", x, 3, False))


def test_ids_and_images_of_the_same_weights(torch):
    entries = llamagen.entries(config.llamagen_tokenizer().to_dict() | SIZES)
    state = seeded(entries)
    tokenizer = TokenizerPipeline(models.convert("llamagen", state, SIZES))
    net, images = Net(torch, state), np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    latents = net.latents(torch.from_numpy(2 * images - 1).permute(0, 3, 1, 2)).flatten(2).mT
    codes, unit = torch.nn.functional.normalize(net.state["quantize.embedding.weight"]), torch.nn.functional.normalize
    likeness = (unit(latents, dim=-1) @ codes.T).sort(-1, descending=True)
    sure = (likeness.values[..., 0] - likeness.values[..., 1] > 1e-5).numpy()
    ids = likeness.indices[..., 0].numpy()
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(tokenizer.tokenize(images)[sure], ids[sure])
    want = net.images(torch.from_numpy(ids)).permute(0, 2, 3, 1).numpy()
    got = tokenizer.detokenize(ids, float_images=True)
    assert_close_tree(got, np.clip(0.5 * want + 0.5, 0, 1), 1e-4)
