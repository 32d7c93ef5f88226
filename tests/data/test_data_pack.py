"""Packing: the same bytes however often it is killed, damaged shards made again, bad records left out and named."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_zoo import BAD, GOOD, encoded, smooth
from forms import some_images, write_folder, write_tars
from PIL import Image

from gigatok_jax import pack as program
from gigatok_jax.data import BadRecord, Encoded, ImageFolder, array_record, make_source, packing
from gigatok_jax.data.array_record import ArrayRecordSet, from_bytes, to_bytes
from gigatok_jax.data.packing import finished_records, pack

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    """Twelve images and two bad ones."""
    files = some_images() | {"birds/00a.png": b"bad", "cats/99.jpg": b""}
    return ImageFolder(write_folder(tmp_path / "folder", files))


class Killed(Exception):
    pass


def killing(at: int):
    def on_progress(done: int) -> None:
        if done == at:
            raise Killed

    return on_progress


@pytest.mark.parametrize("at", [1, 4, 5, 8, 9, 14])
def test_an_interrupted_pack_goes_on_to_the_same_bytes(folder, tmp_path, at):
    options = {"made_from": {"what": "folder"}, "shard_records": 4, "num_threads": 2}
    pack(folder, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        pack(folder, tmp_path / "parts", **options, on_progress=killing(at))
    before = {path.name: path.stat().st_ino for path in (tmp_path / "parts").glob("*.array_record")}
    assert len(before) == (at - 1) // 4 and finished_records(tmp_path / "parts") == 4 * len(before)
    with pytest.raises(ValueError, match="has not finished: run its pack command again"):
        ArrayRecordSet(tmp_path / "parts")
    again = []
    pack(folder, tmp_path / "parts", **options, on_progress=again.append)
    assert again == list(range(4 * len(before) + 1, 15))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    after = {path.name: path.stat().st_ino for path in (tmp_path / "parts").glob("*.array_record")}
    assert before.items() <= after.items(), "finished shards are kept"


def test_killed_by_the_system(folder, tmp_path):
    code = f"""
import os, signal
from gigatok_jax.data import ImageFolder
from gigatok_jax.data.packing import pack
kill = lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == 11 else None
pack(ImageFolder({str(folder.root)!r}), {str(tmp_path / "parts")!r}, made_from={{}}, shard_records=4, on_progress=kill)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and finished_records(tmp_path / "parts") == 8
    for out in ("parts", "whole"):
        pack(folder, tmp_path / out, made_from={}, shard_records=4)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_stopped_while_the_first_shard_is_written_down(folder, tmp_path, monkeypatch):
    real = packing.write_json

    def full(path, content):
        if content["shards"]:
            raise OSError(28, "No space left on device")
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(packing, "write_json", full)
        pack(folder, tmp_path / "parts", made_from={}, shard_records=4)
    assert [path.name for path in (tmp_path / "parts").glob("*.array_record")], "the shard has its name already"
    for out in ("parts", "whole"):
        pack(folder, tmp_path / out, made_from={}, shard_records=4)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_stopped_before_the_first_shard_another_pack_may_begin(folder, tmp_path):
    with pytest.raises(Killed):
        pack(folder, tmp_path / "out", made_from={}, shard_records=4, on_progress=killing(2))
    assert pack(folder, tmp_path / "out", made_from={"root": "b"}, shard_records=5)["records"] == 12


def test_the_hash_names_records_and_order_and_not_shards(folder, tmp_path):
    hashes = [pack(folder, tmp_path / str(n), made_from={}, shard_records=n)["hash"] for n in (1, 4, 100)]
    assert len(set(hashes)) == 1
    chain = bytes(32)
    source = ArrayRecordSet(tmp_path / "4")
    for index in range(len(source)):
        chain = hashlib.sha256(chain + hashlib.sha256(to_bytes(source.read(index))).digest()).digest()
    assert chain.hex() == hashes[0] == source.identity
    (folder.root / "birds" / "00.jpg").write_bytes(encoded(Image.fromarray(smooth(41, 60, 5)), "JPEG"))
    assert pack(folder, tmp_path / "other", made_from={})["hash"] != hashes[0]


def test_bad_records_are_left_out_and_named(zoo, tmp_path):
    index = pack(ImageFolder(zoo), tmp_path, made_from={}, shard_records=3)
    assert index["dropped"].keys() == BAD.keys() and all(BAD[n] in reason for n, reason in index["dropped"].items())
    source = make_source("array_record", root=tmp_path)
    assert [(source[i].name, source[i].label) for i in range(len(source))] == list(GOOD.items())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of 1 records is usable; the first is x.png"):
        pack(ImageFolder(tmp_path / "bad"), tmp_path / "none", made_from={})


@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_packing_a_finished_set_again_mends_it(folder, tmp_path, harm):
    out, options = tmp_path / "out", {"made_from": {}, "shard_records": 4}
    pack(folder, out, **options)
    whole = contents(out)
    shard = out / "images-00001-of-00004.array_record"
    data = bytearray(shard.read_bytes())
    if harm == "lose":
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=r"shard .*00001-of-00004.array_record' is missing"):
            ArrayRecordSet(out)
    else:
        data[len(data) // 3] ^= 1
        shard.write_bytes(data if harm == "flip" else data[:-1000])
    if harm == "cut":
        with pytest.raises(ValueError, match=r"00001-of-00004.array_record' has \d+ bytes, dataset.json says \d+"):
            ArrayRecordSet(out)
    pack(folder, out, **options)
    assert contents(out) == whole


def test_another_source_is_not_mixed_in(folder, tmp_path):
    with pytest.raises(Killed):
        pack(folder, tmp_path / "out", made_from={"root": "a"}, shard_records=4, on_progress=killing(7))
    for changes in ({"made_from": {"root": "b"}}, {"shard_records": 5}):
        with pytest.raises(ValueError, match=r"holds a pack of .* which is not"):
            pack(folder, tmp_path / "out", **({"made_from": {"root": "a"}, "shard_records": 4} | changes))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.array_record").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no dataset.json: give an empty folder"):
        pack(folder, tmp_path / "foreign", made_from={})


def change(source: ImageFolder, how: str) -> None:
    first = source.root / source.name_of(0)
    if how == "renamed":
        first.rename(first.with_name(f"99{first.suffix}"))
    elif how == "repaired":
        (source.root / "birds" / "00a.png").write_bytes(encoded(Image.fromarray(smooth(41, 60, 5)), "PNG"))
    else:
        first.write_bytes(first.read_bytes())
        os.utime(first, ns=(0, 0))


@pytest.mark.parametrize("how", ["renamed", "repaired", "written again"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_source_that_has_changed_is_not_gone_on_with(folder, tmp_path, how, finished):
    options = {"made_from": {"root": "a"}, "shard_records": 4}
    if finished:
        pack(folder, tmp_path / "out", **options)
    else:
        with pytest.raises(Killed):
            pack(folder, tmp_path / "out", **options, on_progress=killing(7))
    change(folder, how)
    with pytest.raises(ValueError, match=r"source has changed since .*/out' was .*; give another folder, or delete"):
        pack(ImageFolder(folder.root), tmp_path / "out", **options)


def test_a_tar_that_has_changed_is_not_gone_on_with(tmp_path):
    write_tars(tmp_path / "tars", some_images())
    pack(make_source("webdataset", root=tmp_path / "tars"), tmp_path / "out", made_from={})
    pack(make_source("webdataset", root=tmp_path / "tars"), tmp_path / "out", made_from={})
    os.utime(tmp_path / "tars" / "part-0.tar", ns=(0, 0))
    with pytest.raises(ValueError, match="source has changed since"):
        pack(make_source("webdataset", root=tmp_path / "tars"), tmp_path / "out", made_from={})


def test_a_set_of_before_the_digest_is_read_but_not_gone_on_with(folder, tmp_path):
    pack(folder, tmp_path, made_from={})
    index = json.loads((tmp_path / "dataset.json").read_text())
    assert len(index["made_from"].pop("source_digest")) == 64
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert len(ArrayRecordSet(tmp_path)) == 12
    with pytest.raises(ValueError, match=r"did not note the source's files, .*: give another folder, or delete"):
        pack(folder, tmp_path, made_from={})


def test_wrong_folders_and_damaged_files_are_told(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no dataset.json in .*gigatok_jax.pack"):
        make_source("array_record", root=tmp_path)
    monkeypatch.chdir(tmp_path)
    told = r"no dataset.json in 'data/emoji' or its sub-folder 'eval': .*pack --source=emoji --out=data/emoji`$"
    with pytest.raises(FileNotFoundError, match=told):
        make_source("emoji", split="eval")
    out = tmp_path / "out"
    pack(folder, out, made_from={})
    text = (out / "dataset.json").read_text()
    for broken, message in (
        (text[:100], "dataset.json is damaged .JSONDecodeError"),
        (text.replace('"class_names"', '"classes"'), "dataset.json is damaged .KeyError: 'class_names'"),
    ):
        (out / "dataset.json").write_text(broken)
        with pytest.raises(ValueError, match=message) as caught:
            ArrayRecordSet(out)
        assert f"delete the folder {str(out)!r} and run the pack command again" in str(caught.value)
    (out / "dataset.json").write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="has form 2, this version reads form 1"):
        ArrayRecordSet(out)


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch):
    limits = [(1024, 4096)]
    monkeypatch.setattr(array_record.resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(array_record.resource, "setrlimit", lambda kind, limit: limits.append(limit))
    array_record.allow_open_files(100)
    assert len(limits) == 1
    array_record.allow_open_files(1024)
    assert limits[1:] == [(1536, 4096)]
    with pytest.raises(ValueError, match=r"4000 shards stay open, this process may open 4096 files: raise"):
        array_record.allow_open_files(4000)


def test_records_are_described_by_themselves():
    record = Encoded(b"\xff\x00", 3, "ü/1.png", "a cat")
    assert from_bytes(to_bytes(record), "x") == record
    for data in (b"", b"nothing", to_bytes(record)[:-3], to_bytes(record).replace(b"label", b"class")):
        with pytest.raises(BadRecord, match=r"^shard.3.: not a packed image"):
            from_bytes(data, "shard[3]")
    with pytest.raises(BadRecord, match="packed in form 2"):
        from_bytes(to_bytes(record).replace(b"\xa1v\x01", b"\xa1v\x02"), "x")


def test_tars_keep_their_captions(tmp_path):
    write_tars(tmp_path / "tars", some_images())
    facts = program.run("webdataset", str(tmp_path / "tars"), tmp_path / "out", "train", shard_records=5)
    source = make_source("array_record", root=tmp_path / "out")
    assert facts["records"] == len(source) == 12 and source[3].caption == "a picture"
    np.testing.assert_array_equal(source[3].image, make_source("webdataset", root=tmp_path / "tars")[3].image)


def run_program(*arguments: str, home: Path) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-m", "gigatok_jax.pack", *arguments], os.environ | {"HOME": str(home)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)


def test_program(zoo, tmp_path):
    made = program.run("folder", str(zoo), tmp_path / "out", "train", shard_records=4)
    # The second time checks what the first has made.
    (tmp_path / "zoo").symlink_to(zoo)
    done = run_program("--source=folder", "--root=~/zoo", "--out=~/out", "--shard_records=4", home=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == made and (facts["records"], facts["dropped"]) == (len(GOOD), len(BAD))
    assert "11 of 11 records were packed before" in done.stdout
    for name in BAD:
        assert f"left out: {name}: " in done.stdout
    done = run_program("--source=folder", f"--root={tmp_path}/missing", f"--out={tmp_path}/no", home=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: image folder ") and "Traceback" not in done.stderr
