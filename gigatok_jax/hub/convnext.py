"""The published weights of ConvNeXt in torchvision's names ↔ the parameters of `teachers.convnext.ConvNeXt`.

`features.0` is the stem (convolution, norm), `features.{2n}` what halves the map in front of stage n counted from 0
(norm, convolution), `features.{2n + 1}` that stage, `classifier.0` the last norm and `classifier.2` the logits.
"""

from collections.abc import Iterator

from gigatok_jax.hub.conv_keys import conv, dense, norm
from gigatok_jax.hub.keymap import Entry
from gigatok_jax.teachers.convnext import ConvNeXtSizes


def entries(sizes: ConvNeXtSizes) -> list[Entry]:
    """Every tensor of a network of these sizes."""
    found, inp = [], 3
    for n, (depth, width) in enumerate(zip(sizes.depths, sizes.widths)):
        at, order = f"features.{2 * n}", (1, 0) if n else (0, 1)
        found += conv(f"{at}.{order[0]}", f"cnn/conv_{n}", width, inp, 2 if n else 4)
        found += norm(f"{at}.{order[1]}", f"cnn/norm_{n}", inp if n else width)
        for layer in range(depth):
            found += _block(f"features.{2 * n + 1}.{layer}", f"cnn/stage_{n}/layers", width, layer)
        inp = width
    found += norm("classifier.0", "cnn/norm_out", inp)
    return [*found, *dense("classifier.2", "cnn/logits", sizes.classes, inp)]


def _block(key: str, path: str, width: int, layer: int) -> Iterator[Entry]:
    yield Entry(f"{key}.layer_scale", (f"{path}/scale",), "channels", (width, 1, 1), layer)
    yield Entry(f"{key}.block.0.weight", (f"{path}/depthwise/kernel",), "conv", (width, 1, 7, 7), layer)
    yield Entry(f"{key}.block.0.bias", (f"{path}/depthwise/bias",), "vector", (width,), layer)
    yield from norm(f"{key}.block.2", f"{path}/norm", width, layer)
    yield from dense(f"{key}.block.3", f"{path}/in", 4 * width, width, layer)
    yield from dense(f"{key}.block.5", f"{path}/out", width, 4 * width, layer)
