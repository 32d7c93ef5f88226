"""Whole runs: killed and resumed to the bit, on other meshes, in several processes, on broken images."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from gigatok_jax import data, objectives, optim, run, sharding, train_state
from gigatok_jax.checkpoint import Checkpointer, CheckpointMismatch
from gigatok_jax.config import to_json
from gigatok_jax.metrics import read_metrics
from gigatok_jax.preemption import StopSignal
from tests import steps
from tests.tiny import ROOT, tiny_run

# Both phase changes (auxiliary path off at 3, discriminator on at 5) lie inside the eight steps.
PHASED = ["loss__discriminator_start=5"]
NO_GAN = {"discriminator__name": "none", "loss__auxiliary_end": 0, "loss__lecam_weight": 0.0}


def worker(workdir, *args, devices=1, processes=1, check=True):
    """Runs tests/worker.py to its end; returns the finished process."""
    command = [sys.executable, str(ROOT / "tests" / "worker.py"), str(workdir), *args]
    if processes > 1:
        launcher = [sys.executable, str(ROOT / "launch" / "local.py"), f"--num_processes={processes}"]
        command = [*launcher, f"--devices_per_process={devices}", "--", *command]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550, cwd=ROOT)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def seen(workdir, process=0):
    """{step: (ids, losses)} of the last time each step was run."""
    lines = [json.loads(line) for line in (Path(workdir) / f"seen_{process}.jsonl").read_text().splitlines()]
    return {line.pop("step"): (line.pop("ids"), line) for line in lines}


def final_state(workdir, cfg, devices=1):
    objective = objectives.build(cfg)
    groups = optim.make_groups(cfg)
    mesh = sharding.make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
    abstract = train_state.abstract(objective, groups, cfg.seed, mesh, "replicated")
    with Checkpointer(Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore(abstract, config=to_json(cfg))[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    worker(workdir, *PHASED)
    return workdir


def assert_same_run(resumed, whole):
    cfg = tiny_run(loss__discriminator_start=5)
    one, other = final_state(resumed, cfg), final_state(whole, cfg)
    assert int(one.step) == 8
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert seen(resumed) == seen(whole)


def test_killed_and_resumed_to_the_bit(uninterrupted, tmp_path):
    """Killed after step 6, two steps past the checkpoint of step 4."""
    killed = worker(tmp_path, *PHASED, "--kill=9", "--at=6", check=False)
    assert killed.returncode == -signal.SIGKILL
    worker(tmp_path, *PHASED)
    assert_same_run(tmp_path, uninterrupted)


def test_terminated_and_resumed_to_the_bit(uninterrupted, tmp_path):
    """SIGTERM in the middle of a run saves where it is (not at the cadence) and exits with the code asked for."""
    stopped = worker(tmp_path, *PHASED, "--kill=15", "--at=2", "--code=42", check=False)
    assert stopped.returncode == 42, stopped.stderr[-3000:]
    with Checkpointer(tmp_path / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.latest_step()
    assert 2 <= step < 4
    worker(tmp_path, *PHASED)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.multiprocess
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    run = ("num_steps=2", 'data__eval_source="photographs"', "--mesh=2,4,1")
    worker(tmp_path / "one", *run, devices=8)
    worker(tmp_path / "two", *run, devices=4, processes=2)
    scores = [read_metrics(tmp_path / name / "metrics.jsonl", ["eval/psnr"])["eval/psnr"] for name in ("one", "two")]
    assert list(scores[0][0]) == list(scores[1][0]) == [0, 2]
    np.testing.assert_allclose(scores[0][1], scores[1][1], rtol=1e-5)
    whole, halves = seen(tmp_path / "one"), [seen(tmp_path / "two", process) for process in (0, 1)]
    for step, (ids, losses) in whole.items():
        assert halves[0][step][0] + halves[1][step][0] == ids
        for name, value in losses.items():
            for half in halves:
                np.testing.assert_allclose(half[step][1][name], value, rtol=1e-6, err_msg=name)


def test_a_stop_asked_for_while_starting_up_saves_and_leaves(tmp_path):
    cfg = tiny_run(**NO_GAN)
    with StopSignal(preemption_code=42) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        one = run.Run(cfg, tmp_path)
        assert one.train(stop)
        one.finish(1.0)
        assert stop.exit_status == 42
    with Checkpointer(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [0]
    assert json.loads((tmp_path / "report.json").read_text())["num_steps"] == 0
    assert run.Run(cfg, tmp_path).start == 0


def test_restore_onto_other_meshes(tmp_path):
    """8 → 1 → 4 devices, every leaf bit-equal."""
    cfg = tiny_run()
    objective = objectives.build(cfg)
    groups = optim.make_groups(cfg)
    config, first = to_json(cfg), None
    layouts = [({"data": 2, "fsdp": 4, "tensor": 1}, "fsdp"), ({"data": 1, "fsdp": 1, "tensor": 1}, "replicated"),
               ({"data": 1, "fsdp": 2, "tensor": 2}, "fsdp+tensor")]  # fmt: skip
    for step, (sizes, preset) in enumerate(layouts):
        mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        if first is None:
            state = train_state.init(objective, groups, 0, mesh, preset)
            first = jax.device_get(state)
        else:
            abstract = train_state.abstract(objective, groups, 0, mesh, preset)
            with Checkpointer(tmp_path) as checkpoints:
                state, _ = checkpoints.restore(abstract, config=config)
            jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding or pytest.fail("misplaced"), state, abstract)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), first)
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(step, state, config=config, wait=True)
    sharded = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert len(sharded) > 20


def test_another_config_is_refused_with_a_diff(uninterrupted):
    cfg = tiny_run(loss__discriminator_start=5, tokenizer__codebook_size=128)
    with pytest.raises(CheckpointMismatch, match=r"tokenizer\.codebook_size: saved 64, now 128"):
        final_state(uninterrupted, cfg)


def test_what_a_run_leaves(uninterrupted):
    saved = json.loads((uninterrupted / "config.json").read_text())
    assert saved == to_json(tiny_run(loss__discriminator_start=5)) | {"mesh": saved["mesh"]}
    report = json.loads((uninterrupted / "report.json").read_text())
    assert report["num_steps"] == 8 and report["skipped_updates"] == 0
    assert set(report["losses"]["adversarial"]) == {"first", "last"}
    assert (uninterrupted / "curves.png").stat().st_size > 1000
    assert list(uninterrupted.glob("events*"))


@pytest.mark.parametrize("moment", ["compile", "evaluate", "save"])
def test_terminated_in_the_middle_of_something(uninterrupted, tmp_path, moment):
    """After step 4: compiling the next phase and evaluating are given up; a save under way is finished."""
    evaluation = ("eval__every=4", 'data__eval_source="photographs"') if moment == "evaluate" else ()
    stopped = worker(tmp_path, *PHASED, *evaluation, "--kill=15", f"--during={moment}", "--code=42", check=False)
    assert stopped.returncode == 42, stopped.stderr[-3000:]
    assert not (tmp_path / "waited").exists()
    with Checkpointer(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 4
    worker(tmp_path, *PHASED, *evaluation)
    assert_same_run(tmp_path, uninterrupted)
    if evaluation:
        assert read_metrics(tmp_path / "metrics.jsonl", ["eval/psnr"])["eval/psnr"][0].tolist() == [0, 4, 8]
        report = json.loads((tmp_path / "report.json").read_text())
        for key in ("psnr_first", "psnr_last", "psnr_mean_colour", "codebook_usage", "images_per_second"):
            assert np.isfinite(report[key]), key


def test_a_folder_with_broken_images_trains_through(tmp_path):
    """Each broken file is replaced, counted and named; each convertible one is used."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for index in range(6):
        (root / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"class{index % 2}" / f"good{index}.png")
    Image.fromarray(pixels).convert("CMYK").save(root / "class0" / "cmyk.jpg")
    Image.fromarray(pixels).convert("P").save(root / "class0" / "palette.png")
    Image.fromarray(rng.integers(0, 65536, (24, 32)).astype(np.uint16)).save(root / "class1" / "sixteen.png")
    whole = (root / "class0" / "cmyk.jpg").read_bytes()
    broken = {
        "class0/truncated.jpg": whole[: len(whole) // 2],
        "class0/text.jpg": b"this is no picture",
        "class1/empty.png": b"",
        "class1/huge.png": huge_png_header(60_000),
    }
    for name, content in broken.items():
        (root / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(root / "class1" / "one.png")
    cfg = tiny_run(data__source="folder", data__root=str(root), data__crop="adm", num_steps=5, **NO_GAN)
    cfg.mesh.update(data=1, fsdp=8)
    one = steps.train(cfg, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["bad_records"]) == {*broken, "class1/one.png"}
    assert report["num_steps"] == 5
    used = {one.source.name_of(i) for batch in loader_at(cfg, 0, one.source, 5) for i in batch["id"]}
    assert used == {f"class{i % 2}/good{i}.png" for i in range(6)} | {"class0/cmyk.jpg", "class0/palette.png",
                                                                      "class1/sixteen.png"}  # fmt: skip


def huge_png_header(side):
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_too_many_broken_updates_stop_the_run_and_say_how_to_rebuild_the_batch(tmp_path):
    cfg = tiny_run(num_steps=8, loss__commitment_weight=float("inf"), **NO_GAN)
    one = run.Run(cfg, tmp_path)
    with StopSignal() as stop, pytest.raises(run.NonFiniteRun, match=r"3 updates in a row.*commitment"):
        one.train(stop)
    record = json.loads((tmp_path / "nonfinite_0.json").read_text())
    assert record["terms"] == ["commitment"] and record["step"] == 2
    rebuilt = next(loader_at(cfg, record["step"], one.source, record["step"] + 1))
    assert rebuilt["id"].tolist() == record["ids_of_this_process"]


def loader_at(cfg, first, source, stop):
    """The batches of steps [first, stop)."""
    return data.TrainLoader(
        source, global_batch=cfg.global_batch, seed=cfg.seed, num_steps=stop, start_step=first,
        element=data.element(cfg), num_threads=1,
    )  # fmt: skip


def test_other_images_under_the_same_root_are_refused_on_resume(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for index in range(4):
        Image.new("RGB", (16, 16), (60 * index, 30, 200)).save(root / f"{index}.png")
    cfg = tiny_run(data__source="folder", data__root=str(root), data__crop="adm", num_steps=1, **NO_GAN)
    steps.train(cfg, tmp_path / "run")
    (root / "0.png").rename(root / "9.png")
    with pytest.raises(CheckpointMismatch, match=r"trained on 4 images .* has 4 .*--allow_config_change"):
        run.Run(cfg, tmp_path / "run")
    assert run.Run(cfg, tmp_path / "run", allow_config_change=True).start == 1


def test_held_out_images_that_cannot_be_read_end_the_run_in_one_error(tmp_path):
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(b"this is no picture")
    cfg = tiny_run(data__eval_source="folder", data__eval_root=str(tmp_path), **NO_GAN)
    one = run.Run(cfg, tmp_path / "run")
    with StopSignal() as stop, pytest.raises(data.NoUsableImages, match="none of the held-out images can be read"):
        one.train(stop)
