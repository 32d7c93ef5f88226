"""Malicious pickles: nothing that they name is looked up, and no object of this process is changed."""

import io
import pickle
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.hub import pickles, published
from tests.hub.test_convert import torch_pickle, zip_of


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def called(module, name):
    return f"c{module}\n{name}\n".encode()


BUILD_DTYPE = b"(K\x03" + text("|") + b"N(" + text("a") + b"t}" + text("a") + b"(%bK\x00tsK\x10K\x01K\x00tb"
DTYPE = called("numpy", "dtype")
NUMBERS = DTYPE + b"(" + text("f4") + b"K\x00K\x01tR"
FIELDS = DTYPE + b"(" + text("V16") + b"K\x00K\x01tR"
SETS_FIELDS = NUMBERS + BUILD_DTYPE.replace(b"%b", NUMBERS)
ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(tR"


def arrays(state):
    return ARRAY + b"(K\x01K\x01\x85" + state + b"tb."


@pytest.mark.parametrize(
    ("bomb", "told"),
    [
        (called("os", "system") + b"(" + text("true") + b"tR.", r"calls os\.system"),
        (text("os") + text("system") + b"\x93(" + text("true") + b"tR.", r"calls os\.system"),
        (called("subprocess", "Popen") + b"(" + text("true") + b"t\x81.", r"calls subprocess\.Popen"),
        (called("subprocess", "Popen") + b"(t}\x92.", r"calls subprocess\.Popen"),
        (b"(ios\nsystem\n.", r"calls os\.system"),
        (b"(" + called("os", "system") + text("true") + b"o.", r"calls os\.system"),
        (called("builtins", "getattr") + b"(" + DTYPE + text("__init__") + b"tR.", r"calls builtins\.getattr"),
        (called("builtins", "getattr") + b"(tR(" + text("a") + b"tR.", r"calls builtins\.getattr"),
        (text("true") + b"(tR.", "calls a str"),
        (DTYPE + text("abc") + b"R.", "calls a Name"),
        (DTYPE + b"}" + text("char") + text("x") + b"sb.", "sets the state of a Name"),
        (called("torch", "FloatStorage") + b"(K\x03Nt" + b"b.", "sets the state of a Name"),
        (called("numpy", "ndarray") + b"(K\x03NtR.", "not an array of numbers"),
        (FIELDS + b".", "dtype 'V16' is not an array of numbers"),
        (DTYPE + b"(" + text("O8") + b"tR.", "dtype 'O8' is not an array of numbers"),
        (DTYPE + b"(" + NUMBERS + b"tR.", "is not an array of numbers"),
        (SETS_FIELDS + b".", "a dtype with fields is not an array of numbers"),
        (arrays(called("numpy", "dtype") + b"\x89C\x04aaaa"), "not an array of numbers"),
        (b"\x82\x01.", "an operation that no file of weights needs"),
        (b"\x96" + struct.pack("<Q", 1 << 40) + b".", "an operation that no file of weights needs"),
        (b"Pevil\n.", "refers to data outside itself"),
        (text("evil") + b"Q.", "refers to data outside itself"),
    ],
)
def test_what_runs_or_changes_anything_is_refused(bomb, told):
    with pytest.raises(ValueError, match=told):
        pickles.read_numpy_pickle(bomb)


def test_arrays_of_every_protocol_and_order_are_read():
    tree = {"a": np.arange(6.0).reshape(2, 3).T, "b": {"c": np.arange(3, dtype=">i4"), "d": np.zeros(2, bool)}}
    for protocol in (3, 4):
        got = pickles.read_numpy_pickle(pickle.dumps(tree, protocol))
        np.testing.assert_array_equal(got["a"], tree["a"])
        for key in "cd":
            np.testing.assert_array_equal(got["b"][key], tree["b"][key])


@pytest.mark.parametrize("name", ["BFloat16Storage", "FloatStorage"])
def test_the_state_of_a_storage_s_name_is_not_set(tmp_path, name):
    before = np.dtype(jnp.bfloat16).itemsize, np.dtype(np.float32).byteorder
    bomb = (
        b"\x80\x02" + called("torch", name) + b"(K\x03" + text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb."
    )
    with (
        pytest.raises(ValueError, match="sets the state of a Name"),
        published.opened([zip_of(tmp_path / "a.pt", bomb)]),
    ):
        pass
    assert (np.dtype(jnp.bfloat16).itemsize, np.dtype(np.float32).byteorder) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (text("storage"), text("Storage")),
        (called("torch", "FloatStorage"), text("FloatStorage")),
        (text("0") + text("cpu"), b"K\x00" + text("cpu")),
        (text("0") + text("cpu"), text("../data.pkl") + text("cpu")),
        (b"K\x06tQ", b"J\xff\xff\xff\xfftQ"),
        (b"K\x06tQ", b"K\x07tQ"),
        (b"K\x06tQ", b"N" + b"tQ"),
        (b"tQ", b"tK\x01\x86Q"),
    ],
)
def test_references_to_anything_but_a_storage_are_refused(tmp_path, old, new):
    program = torch_pickle(False)
    assert old in program
    path = zip_of(tmp_path / "a.pt", program.replace(old, new), np.zeros(6, np.float32).tobytes())
    with pytest.raises(ValueError, match=r"a\.pt cannot be read"), published.opened([path]):
        pass


def test_an_inert_record_takes_everything_and_shares_nothing():
    program = called("collections", "deque") + b"(tR(K\x01K\x02eK\x01a}" + text("maxlen") + b"K\x01sb."
    made = pickles.Reader(io.BytesIO(program), {}).load()
    assert isinstance(made, pickles.Inert) and vars(made) == {"name": "collections.deque"}
    assert not hasattr(pickles.Inert, "maxlen")
