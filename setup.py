"""Package metadata; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cpsp-dist",
    version="0.1.0",
    description="Distributed, large-scale trainer for audio-visual event localization with CPSP",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["cpsp_dist", "cpsp_dist.*"]),
    install_requires=[
        "torch>=2.4",
        "deepspeed>=0.19",
        "accelerate>=1.0",
        "webdataset>=1.0",
        "submitit>=1.5",
        "mlflow>=3.0",
        "numpy>=1.26",
        "packaging>=23",  # the doctor compares versions
        "pydantic>=2.6",
        "PyYAML>=6.0",
        "safetensors>=0.4",
        "h5py>=3.10",
        "fsspec>=2024.2",  # shards at a URL
        "aiohttp>=3.9",  # fsspec's http
        "matplotlib>=3.7",  # preview --png
        "crc32c>=2.6",  # lets other threads run meanwhile, and prefetches: quickest on memory outside of the caches
        "scikit-learn>=1.3",  # the demo corpus's digit scans
    ],
    extras_require={
        "s3": ["s3fs>=2024.2"],  # shards at an s3:// URL
        "dev": [
            "google-crc32c>=1.5",
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "s3fs>=2024.2",
            "moto[server]>=5",
        ],
    },
    entry_points={"console_scripts": ["cpsp-dist=cpsp_dist.cli:main"]},
)
