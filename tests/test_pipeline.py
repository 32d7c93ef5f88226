"""A tokenizer's run to one page about the generator of its ids, every stage by its own entry point."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from gigatok_jax import config, pipeline, run, stages
from gigatok_jax.preemption import StopSignal
from tests.entry_points import entry_point
from tests.tiny import tiny_run

GENERATOR = """
from gigatok_jax import config
from tests.tiny import tiny_generator, tiny_masked

def get_config(objective):
    cfg = config.ar() if objective == "ar" else config.masked()
    cfg.update(num_steps=3, global_batch=8, dtype="float32")
    ids = dict(codebook_size=64, num_latent_tokens=8, num_classes=1, depth=1)
    cfg.generator = tiny_generator(**ids) if objective == "ar" else tiny_masked("bert", **ids)
    cfg.groups.generator.update(learning_rate=1e-2, warmup_steps=0)
    cfg.data.update(eval_source="tokens", num_threads=1)
    cfg.eval.update(every=0, batch=8, num_images=8)
    cfg.log.every = 1
    return cfg.lock()
"""


def tokenizer_run(workdir):
    """A run of a tokenizer that is at its end; nobody asks how good it is, so nothing is trained."""
    one = run.Run(tiny_run(num_steps=1, data__eval_source="photographs", discriminator__name="none").lock(), workdir)
    with StopSignal() as stop:
        one.evaluate(1, stop)
    one.state = one.state._replace(step=one.state.step + 1)
    one.save(1)
    one.finish(1.0, "python -m gigatok_jax.train --config=<tiny>")


@pytest.fixture
def in_this_process(monkeypatch):
    """Stages run here, by their entry points' `main`, and are counted."""
    ran = []

    def call(self, command):
        ran.append(command[2])
        with entry_point(command[2:], monkeypatch) as module:
            try:
                module.main([command[2]])
            except SystemExit as end:
                return end.code if isinstance(end.code, int) else int(bool(end.code))
        return 0

    monkeypatch.setattr(stages.Running, "__call__", call)
    return ran


def ready(tmp_path, objective, **sampling):
    """The folder of a finished tokenizer's run, and the config of a pipeline after it."""
    tokenizer_run(tmp_path / "run")
    (tmp_path / "generator.py").write_text(GENERATOR)
    cfg = config.pipeline()
    cfg.encode_train = dict(source="photographs", crop="scale", num_views=4)
    cfg.encode_eval = dict(source="photographs", split="eval", tiles=8)
    cfg.train_generator = dict(config=f"{tmp_path / 'generator.py'}:{objective}")
    cfg.sample = dict(num_images=8, batch=8, **sampling)
    return tmp_path / "run", cfg


def test_from_a_tokenizer_to_the_page(tmp_path, in_this_process):
    folder, cfg = ready(tmp_path, "ar")
    before = (folder / "report.json").read_text()
    page = pipeline.run(cfg, folder)
    programs = [f"gigatok_jax.{name}" for name in ("export", "encode", "encode", "train", "export", "sample")]
    assert in_this_process == programs
    report = json.loads((folder / "report.json").read_text())
    scores = {name: report[name] for name in ("ar_val_loss", "unigram_entropy")}
    assert report == json.loads(before) | scores and all(0 < score < 5 for score in scores.values())
    check_page(page.read_text(), report)
    (folder / "report.json").write_text(before)  # as the training command, given again, leaves it
    assert pipeline.run(cfg, folder) == page and in_this_process == programs
    assert json.loads((folder / "report.json").read_text()) == report
    cfg.sample.scale = 2.0
    with pytest.raises(stages.StageFailed, match=f"delete {folder / 'samples'} and give the same command again"):
        pipeline.run(cfg, folder)
    shutil.rmtree(folder / "samples")
    pipeline.run(cfg, folder)
    assert json.loads((folder / "samples" / "sampling.json").read_text())["scale"] == 2


def test_a_masked_generator_comes_to_the_page_as_well(tmp_path, in_this_process):
    folder, cfg = ready(tmp_path, "masked", scale=0.0, num_steps=2)
    stale = json.loads((folder / "report.json").read_text()) | {"ar_val_loss": 1.0}  # of another generator, before
    (folder / "report.json").write_text(json.dumps(stale))
    page = pipeline.run(cfg, folder)
    report = json.loads((folder / "report.json").read_text())
    assert 0 < report["masked_val_loss"] < 5 and "ar_val_loss" not in report
    assert f"{report['masked_val_loss']:.2f} nats" in page.read_text()


def check_page(text, report):
    """Headline figures, pictures inside the page, every command, and nothing from elsewhere."""
    for value in (f"{report['psnr_last']:.2f} dB", f"{report['ar_val_loss']:.2f} nats"):
        assert value in text
    assert f"{report['unigram_entropy']:.2f}" in text
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s]{0,30})', text)
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert "python -m gigatok_jax.train --config=&lt;tiny&gt;" in re.sub(r"</?span>", "", text)
    for stage in config.STAGES:
        assert f"<b>{stage}</b>" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config.data.eval_source": ""}, "no data.eval_source"),
        ({"config.num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"config.num_step": 3}, "num_step"),
        ({"config": "nowhere.py"}, "nowhere.py"),
        ({"config": "configs/quickstart.py"}, "objective='tokenizer', and the page is about one of ar, masked"),
    ],
)
def test_a_generator_that_cannot_be_trained_is_refused_before_any_stage(tmp_path, in_this_process, change, words):
    (tmp_path / "config.json").write_text('{"num_steps": 1}')
    (tmp_path / "report.json").write_text('{"num_steps": 1}')
    (tmp_path / "generator.py").write_text(GENERATOR)
    cfg = config.pipeline().to_dict()
    cfg["train_generator"] = {"config": f"{tmp_path / 'generator.py'}:ar", **change}
    with pytest.raises((ValueError, OSError), match=words):
        pipeline.run(SimpleNamespace(to_dict=lambda: cfg), tmp_path)
    assert in_this_process == []


def test_a_run_that_is_not_at_its_end_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run of a tokenizer: train one there first"):
        pipeline.check_finished(tmp_path)
    (tmp_path / "config.json").write_text('{"num_steps": 2}')
    (tmp_path / "report.json").write_text('{"num_steps": 1}')
    with pytest.raises(ValueError, match=r"is at step 1 of 2: let it go on to its end, `python -m gigatok_jax\.train"):
        pipeline.check_finished(tmp_path)
