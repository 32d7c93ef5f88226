"""The page of a pipeline: what it says, and that nothing of it lies elsewhere."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gigatok_jax.evals.page import write_page

REPORT = {"image_size": 32, "num_latent_tokens": 64, "codebook_size": 8, "ar_val_loss": 3.25, "unigram_entropy": 5.5}
SCORES = {"psnr_last": 21.15, "psnr_mean_colour": 17.42, "codebook_usage": 0.98}
PICTURE = Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3))


def page(tmp_path, report, counts, command="python -m it --name='<b>'"):
    """The text of a page."""
    PICTURE.save(tmp_path / "curves.png")
    write_page(
        tmp_path / "page.html",
        title="a & b",
        report=report,
        reconstructions=PICTURE,
        drawn=[("Samples:", "drawn", PICTURE)],
        curves=[("Tokenizer", tmp_path / "curves.png")],
        counts_V=np.array(counts),
        stages=[("first", 65.0, command), ("second", None, "x")],
    )
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "curves.png"}
    return (tmp_path / "page.html").read_text()


def test_it_says_what_was_measured_and_needs_nothing_else(tmp_path):
    text = page(tmp_path, REPORT | SCORES, [5, 0, 1, 1, 1, 0, 0, 0])
    said = re.sub(r"<[^>]+>", " ", text)
    for words in (
        "21.15 dB",
        "17.42 dB",
        "98%",
        "3.25 nats",
        "5.50",
        "Per held-out id the generator needs 2.25 nats less",
        "4 of 8 occur",
        "1m05s",
    ):
        assert words in said, words
    assert "a &amp; b" in text and "--name=&#x27;&lt;b&gt;&#x27;" in text
    pictures = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 3 == text.count("<img")
    for picture in pictures:
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(picture))), PICTURE)
    assert not re.search(r"https?:|url\(|<link|<script|@import", text)


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    text = page(tmp_path, REPORT, [0] * 8)
    assert " dB" not in text and "0 of 8 occur" in text and "nan" not in text


@pytest.mark.parametrize("codes", [3, 5000])
def test_the_histogram_falls_from_the_most_used(tmp_path, codes):
    counts = np.random.default_rng(0).integers(1, 100, codes)
    path = re.search(r'class="area" d="([^"]+)"', page(tmp_path, REPORT, counts)).group(1)
    heights = [float(y) for y in re.findall(r"V([\d.]+) H", path)]
    assert len(heights) == min(codes, 1000) and heights == sorted(heights)


def test_a_masked_generators_loss_is_said_to_be_of_masked_ids(tmp_path):
    report = {name: value for name, value in REPORT.items() if name != "ar_val_loss"}
    text = page(tmp_path, report | {"masked_val_loss": 1.75}, [5, 0, 1])
    assert "1.75 nats" in text and "Per masked id of held-out images the generator needs 3.75 nats less" in text
