"""What the metric writers write is read back. The progress line and the alarm are in test_progress.py."""

import importlib.util
import io
import json
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from gigatok_jax.metrics import (
    JsonlWriter,
    MetricWriter,
    TensorBoardWriter,
    make_writer,
    read_metrics,
)


def read_events(folder):
    """All events of all files in TFRecord framing: length, its checksum, data, their checksum."""
    events = []
    for path in sorted(folder.glob("*tfevents*")):
        raw = path.read_bytes()
        at = 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            data = raw[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", raw, at + 8)[0] == masked_crc32c(raw[at : at + 8])
            assert struct.unpack_from("<I", raw, at + 12 + length)[0] == masked_crc32c(data)
            events.append(Event.FromString(data))
            at += 16 + length
    return events


def values(folder):
    return {(v.tag, e.step): v for e in read_events(folder) for v in e.summary.value}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scalars_reach_both_files(tmp_path):
    writer = make_writer(tmp_path / "run", is_main=True)
    assert isinstance(writer, MetricWriter)
    writer.write_scalars(3, {"loss": jnp.float32(0.1), "psnr": 18.123456789012, "images": np.int64(2**40)})
    writer.write_scalars(4, {"loss": jnp.bfloat16(0.5), "bad": float("nan"), "worse": jnp.float32(-np.inf)})
    writer.flush()
    found = values(tmp_path / "run")
    assert found["loss", 3].simple_value == np.float32(0.1)
    assert found["psnr", 3].simple_value == np.float32(18.123456789012)
    assert found["loss", 4].simple_value == 0.5
    first, second = lines(tmp_path / "run")
    assert first.pop("time") > 1.7e9
    assert first == {"step": 3, "loss": 0.1, "psnr": 18.123456789012, "images": 2**40}
    assert (second["loss"], second["bad"], second["worse"]) == (0.5, "nan", "-inf")
    writer.close()
    writer.close()


def test_each_line_is_on_disk_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write_scalars(1, {"loss": 1.0})
    assert lines(tmp_path)[0]["loss"] == 1.0
    writer.close()


def test_read_metrics_gives_columns(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write_scalars(10, {"a": 1.5, "b": float("inf")})
    writer.write_scalars(20, {"a": 2.5})
    writer.close()
    found = read_metrics(tmp_path / "m.jsonl")
    assert set(found) == {"a", "b"}
    np.testing.assert_array_equal(found["a"], ([10, 20], [1.5, 2.5]))
    np.testing.assert_array_equal(found["b"][1], [np.inf])
    assert set(read_metrics(tmp_path / "m.jsonl", ["b", "absent"])) == {"b"}


def test_resume_drops_what_will_be_trained_again(tmp_path):
    writer = make_writer(tmp_path, is_main=True)
    for step in (10, 20, 30):
        writer.write_scalars(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "ti')  # killed while writing
    writer = make_writer(tmp_path, is_main=True, resume_step=20)
    writer.write_scalars(30, {"loss": -1.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    starts = [e.step for e in read_events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [21]
    assert len(list(tmp_path.glob("*tfevents*"))) == 2


def test_reopening_without_a_step_keeps_all_but_a_broken_tail(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "time": 2.0, "a": 3.0}\n{"step": 2')
    JsonlWriter(path).write_scalars(5, {"a": 4.0})
    np.testing.assert_array_equal(read_metrics(path)["a"], ([1, 5], [3.0, 4.0]))


def test_reserved_names_and_remote_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="taken"):
        JsonlWriter(tmp_path / "m.jsonl").write_scalars(1, {"step": 2})
    with pytest.raises(ValueError, match="local"):
        make_writer("gs://bucket/run", is_main=True)


def test_other_processes_write_nothing(tmp_path):
    writer = make_writer(tmp_path / "run", is_main=False, resume_step=3)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {"grid": np.zeros((1, 4, 4, 3))})
    writer.write_hparams({"a": 1})
    writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_images_come_back_as_png(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    floats = np.zeros((2, 4, 6, 3), np.float32)
    floats[0, :, :, 0], floats[1] = 0.5, 1.7  # the second is clipped
    bytes_HWC = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    grey = np.full((1, 4, 6, 1), 200, np.uint8)
    writer.write_images(7, {"floats": floats, "bytes": bytes_HWC, "grey": jnp.asarray(grey)})
    writer.close()
    found = values(tmp_path)
    pictures = {tag: np.asarray(Image.open(io.BytesIO(v.image.encoded_image_string))) for (tag, _), v in found.items()}
    assert set(pictures) == {"floats/0", "floats/1", "bytes", "grey"}
    np.testing.assert_array_equal(pictures["bytes"], bytes_HWC)
    assert pictures["floats/0"][0, 0].tolist() == [128, 0, 0]
    assert pictures["floats/1"].min() == 255
    assert pictures["grey"].shape == (4, 6, 3) and pictures["grey"].max() == 200
    with pytest.raises(ValueError, match="N,H,W,C"):
        writer.write_images(8, {"wrong": np.zeros((2, 3, 8, 8))})


def test_texts_histograms_and_hparams(tmp_path):
    writer = make_writer(tmp_path, is_main=True)
    writer.write_texts(2, {"note": "hello"})
    writer.write_histograms(2, {"weights": np.arange(10.0)})
    writer.write_hparams({"lr": 1e-4, "model": {"depth": 2, "kind": None}, "sizes": (1, 2)})
    writer.write_videos(2, {"film": np.zeros((1, 2, 4, 4, 3))})  # not supported: a warning, no error
    writer.close()
    found = values(tmp_path)
    assert found["note/text_summary", 2].tensor.string_val == [b"hello"]
    assert found["weights", 2].histo.num == 10
    start = str(found["_hparams_/session_start_info", 0].metadata.plugin_data.content)
    assert all(name in start for name in ("lr", "model.depth", "model.kind", "sizes"))


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="clu then uses TensorFlow")
def test_clu_imports_without_tensorflow(tmp_path):
    code = (
        "import sys, gigatok_jax.metrics as m; from clu import metric_writers, periodic_actions\n"
        "w = metric_writers.create_default_writer(sys.argv[1], asynchronous=False)\n"
        "w.write_scalars(1, {'a': 2.0}); w.close(); assert 'tensorflow' not in sys.modules"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, env=environment)
    assert values(tmp_path)["a", 1].simple_value == 2.0
