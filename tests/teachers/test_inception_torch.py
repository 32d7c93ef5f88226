"""FID's Inception, its preparations and the distance against pytorch-fid and torch-fidelity, on drawn weights."""

import jax
import numpy as np
import pytest

from gigatok_jax.evals.fid import Statistics, frechet_distance
from gigatok_jax.hub import teachers as hub
from gigatok_jax.hub import weight_files
from gigatok_jax.teachers.inception import INCEPTION, Inception, Outputs, prepared
from tests.compare import assert_close_tree
from tests.teachers.seeded import seeded_inception
from tests.torch_shims import with_torchvision_declared

pytestmark = pytest.mark.parity
SIZES = (64, 256)


@pytest.fixture(scope="module")
def torch():
    with_torchvision_declared()
    for name in ("pytorch_fid", "torch_fidelity"):
        pytest.importorskip(name)
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def state(torch):
    return {key: torch.from_numpy(value) for key, value in seeded_inception(hub.entries("inception")).items()}


@pytest.fixture(scope="module")
def pytorch_fid(torch, state):
    """(its feature extractor, its whole network), with what it would download."""
    from pytorch_fid import inception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **options: state)
        return inception.InceptionV3().eval(), inception.fid_inception_v3().eval()


@pytest.fixture(scope="module")
def torch_fidelity(torch, state, tmp_path_factory):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("fidelity") / "weights.pth"
    torch.save(state, path)
    wanted = ["2048", "logits_unbiased", "logits"]
    return FeatureExtractorInceptionV3("drawn", wanted, feature_extractor_weights_path=str(path))


@pytest.fixture(scope="module")
def network():
    return jax.jit(Inception(INCEPTION).apply)


def pictures(size):
    """A few blocks of colour under noise, 8 bits."""
    rng = np.random.default_rng(size)
    blocks = rng.integers(20, 230, (2, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (blocks + rng.integers(-20, 20, blocks.shape)).astype(np.uint8)


def published(torch, model, folder):
    """A library's own state dict as a file of torch.save, converted and loaded."""
    names = set(model.state_dict())
    assert names == {entry.key for entry in hub.entries("inception")} | set(hub.droppable("inception"))
    torch.save(model.state_dict(), folder / "published.pth")
    (facts,) = weight_files.convert("inception", [folder / "published.pth"], folder)
    assert facts["tensors"] == 472
    return hub.load("inception", hub.find("inception", folder))


@pytest.mark.parametrize("size", SIZES)
def test_pytorch_fid(torch, pytorch_fid, network, tmp_path, size):
    extractor, whole = pytorch_fid
    variables, images = published(torch, whole, tmp_path), pictures(size)
    got = network(variables, prepared(images, "pytorch-fid"))
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        features = extractor(x)[0][:, :, 0, 0].numpy()
        logits = whole(2 * torch.nn.functional.interpolate(x, (299, 299), mode="bilinear") - 1).numpy()
    assert 0.1 < np.std(features) < 10
    want = Outputs(features, logits, logits - whole.fc.bias.detach().numpy())
    assert_close_tree(got, want, 1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_torch_fidelity(torch, torch_fidelity, network, tmp_path, size):
    variables, images = published(torch, torch_fidelity, tmp_path), pictures(size)
    got = network(variables, prepared(images, "torch-fidelity"))
    with torch.no_grad():
        found = torch_fidelity(torch.from_numpy(images).permute(0, 3, 1, 2))
    features, unbiased, logits = (x.numpy() for x in found)
    assert_close_tree(got, Outputs(features, logits, unbiased), 1e-4)


def test_distances(torch):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(0)
    sets = [rng.gamma(shape, size=(200, 24)) @ rng.standard_normal((24, 24)) for shape in (1.0, 1.2)]
    got = frechet_distance(*map(Statistics.of, sets))
    statistics = [fid_features_to_statistics(torch.from_numpy(features)) for features in sets]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    first, second = ((part["mu"], part["sigma"]) for part in statistics)
    assert got == pytest.approx(fidelity, rel=1e-8)
    assert got == pytest.approx(calculate_frechet_distance(*first, *second), rel=1e-8)
