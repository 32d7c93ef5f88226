"""Key lists of layers that several published models are made of."""

from collections.abc import Iterator

from gigatok_jax.hub.keymap import Entry


def conv(key: str, path: str, out: int, inp: int, size: int, bias: bool = True) -> Iterator[Entry]:
    """A `size`×`size` convolution."""
    yield Entry(f"{key}.weight", (f"{path}/kernel",), "conv", (out, inp, size, size))
    if bias:
        yield Entry(f"{key}.bias", (f"{path}/bias",), "vector", (out,))


def dense(key: str, path: str, out: int, inp: int, layer: int | None = None, kind: str = "dense") -> Iterator[Entry]:
    """A biased linear layer; of kind "conv1x1" where it is published as a convolution."""
    shape = (out, inp) if kind == "dense" else (out, inp, 1, 1)
    yield Entry(f"{key}.weight", (f"{path}/kernel",), kind, shape, layer)
    yield Entry(f"{key}.bias", (f"{path}/bias",), "vector", (out,), layer)


def norm(key: str, path: str, width: int, layer: int | None = None) -> Iterator[Entry]:
    """A norm's scale and bias."""
    yield Entry(f"{key}.weight", (f"{path}/scale",), "vector", (width,), layer)
    yield Entry(f"{key}.bias", (f"{path}/bias",), "vector", (width,), layer)


def resnet(key: str, path: str, inp: int, out: int) -> Iterator[Entry]:
    """A residual block."""
    yield from norm(f"{key}.norm1", f"{path}/norm1", inp)
    yield from conv(f"{key}.conv1", f"{path}/conv1", out, inp, 3)
    yield from norm(f"{key}.norm2", f"{path}/norm2", out)
    yield from conv(f"{key}.conv2", f"{path}/conv2", out, out, 3)
    if inp != out:
        yield from conv(f"{key}.nin_shortcut", f"{path}/shortcut", out, inp, 1)
