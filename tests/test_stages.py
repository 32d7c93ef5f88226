"""Stages: their commands name what is there; run in order, not again when whole, and stopped with a name."""

import itertools
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags

from gigatok_jax import config, stages
from gigatok_jax.stages import Stage, StageFailed
from tests.entry_points import entry_point
from tests.tiny import config_module

PIPELINES = ("quickstart", "emoji")
PROGRAM = """
import os, pathlib, signal, sys, time
name, what = sys.argv[1:]
with open("ran", "a") as file:
    file.write(name + " ")
if what.startswith("SIG"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.kill(os.getppid(), getattr(signal, what))
    time.sleep(20)
if what == "fail":
    sys.exit(3)
pathlib.Path(name).mkdir(exist_ok=True)
pathlib.Path(name, "whole").touch()
"""


@pytest.mark.parametrize("name", PIPELINES)
def test_commands_are_understood_by_their_entry_points(name, monkeypatch):
    cfg = config_module(f"pipelines/{name}").get_config().to_dict()
    planned = stages.plan(cfg, Path("runs/x"))
    assert [stage.name for stage in planned] == list(config.STAGES)
    for stage in planned:
        with entry_point(stage.arguments, monkeypatch):
            assert set(cfg[stage.name]) <= set(flags.FLAGS), stage.name
            if stage.name == "train_generator":
                data = flags.FLAGS.config.data
                assert data.root == data.eval_root == "runs/x/tokens" and data.eval_source == "tokens"


def test_a_flag_that_is_not_there_is_found(monkeypatch):
    with (
        pytest.raises(flags.UnrecognizedFlagError, match="num_view"),
        entry_point(("gigatok_jax.encode", "--bundle=x", "--source=emoji", "--out=y", "--num_vues=2"), monkeypatch),
    ):
        pass


def test_every_path_that_a_stage_reads_was_written_before(monkeypatch):
    cfg = config_module("pipelines/quickstart").get_config().to_dict()
    run = Path("runs/x")
    written = {run / "metrics.jsonl", run / "generator" / "metrics.jsonl", Path("configs/quickstart_ar.py")}
    for stage in stages.plan(cfg, run):
        assert set(stage.reads) <= written, stage.name
        written |= set(stage.writes)


def test_a_config_with_other_stages_is_refused():
    cfg = config_module("pipelines/quickstart").get_config().to_dict()
    with pytest.raises(ValueError, match="unknown or missing stages: sampel"):
        stages.plan({**cfg, "sampel": {}}, Path("x"))
    with pytest.raises(ValueError, match="train_generator"):
        stages.plan({**cfg, "train_generator": {}}, Path("x"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where `program.py` is, which notes that it ran and does what it is told."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "input").write_text("1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name, what="write"):
    return Stage(name, ("program", name, what), (Path("input"),), Path(name), (Path(name, "whole"),))


def ran(planned):
    """Names of the stages that a run ran."""
    Path("ran").write_text("")
    stages.run(planned, Path("notes.json"))
    return Path("ran").read_text().split()


def test_runs_in_order_and_only_what_is_not_whole(folder, capfd, monkeypatch):
    planned = [stage("a"), stage("b"), stage("c")]
    assert ran(planned) == ["a", "b", "c"]
    assert f"[2/3] b\n{sys.executable} -m program b write\n" in capfd.readouterr().out
    assert ran(planned) == []
    (folder / "b" / "whole").unlink()
    assert ran(planned) == ["b"]
    assert ran([stage("a"), stage("b", "anew"), stage("c")]) == ["b"]
    (folder / "input").write_text("2")
    (folder / "c" / "whole").unlink()
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    before = json.loads(Path("notes.json").read_text())
    assert ran(planned) == ["a", "b", "c"]
    after = json.loads(Path("notes.json").read_text())
    assert after["a"]["seconds"] == round(before["a"]["seconds"] + 1, 1), "it goes on from what is there"
    assert after["c"]["seconds"] == 1, "begun anew"


def test_a_hang_up_lets_the_stage_save(folder):
    with pytest.raises(StageFailed, match="stopped in stage a") as caught:
        ran([stage("a", "SIGHUP")])
    assert caught.value.status == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stages.Running():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_of_another_command_is_named_where_a_stage_fails(folder):
    ran([stage("a")])
    for _ in range(2):
        with pytest.raises(StageFailed, match=r"a holds what another command.* delete a and give the same command"):
            ran([stage("a", "fail")])
    shutil.rmtree("a")
    with pytest.raises(StageFailed) as caught:
        ran([stage("a", "fail")])
    assert "delete" not in str(caught.value)


def test_a_stage_that_fails_stops_the_rest_and_is_named(folder):
    with pytest.raises(StageFailed, match=r"stage b failed with status 3: .* -m program b fail") as caught:
        ran([stage("a"), stage("b", "fail"), stage("c")])
    assert caught.value.status == 3 and Path("ran").read_text().split() == ["a", "b"]
    assert ran([stage("a"), stage("b"), stage("c")]) == ["b", "c"]


def test_sigterm_goes_on_to_the_stage_and_ends_the_pipeline(folder, monkeypatch):
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    with pytest.raises(StageFailed, match="stopped in stage b; the same command goes on") as caught:
        ran([stage("a"), stage("b", "SIGTERM"), stage("c")])
    assert caught.value.status == 143 and Path("ran").read_text().split() == ["a", "b"]
    notes = json.loads(Path("notes.json").read_text())
    assert notes["a"]["whole"] and not notes["b"]["whole"]
    assert notes["b"]["seconds"] == 1
    with pytest.raises(StageFailed):
        ran([stage("a"), stage("b", "SIGTERM"), stage("c")])
    assert json.loads(Path("notes.json").read_text())["b"]["seconds"] == 2, "of both attempts"
