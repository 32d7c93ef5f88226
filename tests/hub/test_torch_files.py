"""Files of torch.save, written here byte by byte: which bytes are read, and what is refused."""

import os
import zipfile

import numpy as np
import pytest

from gigatok_jax.hub import published
from tests.hub.test_convert import text, torch_file, torch_pickle, zip_of

ROWS = 1000


def shared(rows):
    """{"w0": row 0, "w1": row 1, …} of one storage."""
    program = b"\x80\x02}"
    for row in range(rows):
        reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
        reference += b"J" + (rows * 3).to_bytes(4, "little") + b"tQ"
        view = b"J" + (3 * row).to_bytes(4, "little") + b"K\x03\x85K\x01\x85\x89}tRs"
        program += text(f"w{row}") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + view
    return program + b"."


def test_of_a_shared_storage_no_more_is_read_than_a_tensor_takes(tmp_path, monkeypatch):
    values = np.arange(3 * ROWS, dtype=np.float32)
    path, read, preadv = zip_of(tmp_path / "a.pt", shared(ROWS), values.tobytes()), [], os.preadv

    def counted(*args):
        read.append(preadv(*args))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda archive, name: archive.open(name).read())
    with published.opened([path]) as (state, _):
        for row in range(ROWS):
            np.testing.assert_array_equal(state[f"w{row}"], values[3 * row : 3 * row + 3])
    assert 0 < sum(read) <= ROWS * 100


def test_compressed_files_are_refused(tmp_path):
    """Few bytes of a compressed member are as many zeros as its writer likes."""
    path = zip_of(tmp_path / "a.pt", torch_pickle(False), bytes(24), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="this zip is compressed"), published.opened([path]):
        pass


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    program = torch_pickle(False)
    large = program.replace(b"K\x02K\x03\x86K\x03K\x01\x86", b"J\xff\xff\xff\x7fK\x03\x86K\x00K\x01\x86")
    assert large != program
    path = zip_of(tmp_path / "a.pt", large, bytes(24))
    with pytest.raises(ValueError, match="larger than its storage"), published.opened([path]):
        pass


def test_a_legacy_file_whose_counts_differ_is_refused(tmp_path):
    path = torch_file(tmp_path / "a.pt", legacy=True)
    data = path.read_bytes()
    path.write_bytes(data[:-32] + (5).to_bytes(8, "little") + data[-24:])
    with pytest.raises(ValueError, match="a storage of this file is malformed"), published.opened([path]):
        pass
