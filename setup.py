"""All package metadata; `pyproject.toml` holds tool settings only."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "array_record>=0.8",  # shards of images; also what grain and TFDS read
    "clu>=0.0.12",
    "flatbuffers>=25",  # exported programs
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10",
    "ml_collections>=1.1",
    "msgpack>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=11",
    "safetensors>=0.5",
    "simplejpeg>=1.8",  # decodes JPEG faster than Pillow, to the same pixels; the code runs without it too
    "tensorboardX>=2.6",  # TensorBoard event files without TensorFlow
    "tensorflow-datasets>=4.9.10",
]
# Real photographs that come inside the wheels of two well-kept libraries.
DEMO = ["scikit-image>=0.26", "scikit-learn>=1.5"]
INT8 = ["qwix>=0.1.8"]  # sampling with int8 weights

setup(
    name="gigatok_jax",
    version="0.1.0",
    description="Latent-token image tokenizers and generators in JAX/Flax: train, scale, evaluate, serve",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gigatok_jax", "gigatok_jax.*"]),
    install_requires=CORE,
    extras_require={
        "demo": DEMO,
        "test": [*DEMO, *INT8, "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.9", "dm-pix>=0.4"],
        "hub": ["huggingface_hub>=1.0"],  # "hf://owner/name@revision"
        "int8": INT8,
        # What the tests marked so compare with.
        "parity": [
            "torch==2.13.*",
            "torchvision==0.28.*",
            "transformers==5.24.0",
            "timm==1.0.31",
            "pytorch-fid==0.3.0",
            "torch-fidelity==0.4.0",
        ],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },
)
