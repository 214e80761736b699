"""Package metadata, and recipes and DeepSpeed configurations as package data of a wheel."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = {"launch/recipes": "_recipes", "ds_configs": "_ds_configs"}  # as `villa_ds.resources` looks for them


class BuildWithResources(build_py):
    """Copies what ships from outside the package into the wheel; an editable install reads it where it lies."""

    def run(self) -> None:
        """Build the package, then add the shipped folders."""
        super().run()
        if self.editable_mode:
            return
        for source, name in SHIPPED.items():
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, Path(self.build_lib, "villa_ds", name), dirs_exist_ok=True)


def version() -> str:
    """The version in `villa_ds/__init__.py`, read without importing torch and friends."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "villa_ds" / "__init__.py").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError("villa_ds/__init__.py has no line __version__ = ...")
    return found[1]


setup(
    name="villa_ds",
    version=version(),
    description="VILLA adversarial training of vision-and-language transformers on DeepSpeed ZeRO, exactly resumable",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["villa_ds", "villa_ds.*"]),
    package_data={"villa_ds": ["py.typed"]},
    cmdclass={"build_py": BuildWithResources},
    entry_points={"console_scripts": ["villa-ds = villa_ds.cli:program"]},
    install_requires=[
        "deepspeed>=0.15",
        "fsspec>=2024.2",
        "numpy>=1.24",
        "pillow>=9",
        "pyyaml>=6",
        "safetensors>=0.4",
        "tensorboard>=2.11",
        "tokenizers>=0.15",
        "torch>=2.3",
        "tqdm>=4.60",
        "webdataset>=0.2.86",
    ],
    # NVIDIA's apex (fused LayerNorm and FusedAdam) is an optional install from its source: https://github.com/NVIDIA/apex
    # It can't be an extra here: the name `apex` on PyPI belongs to another project.
    # Protocols of remote shards bring much along, and each user wants one of them.
    extras_require={
        "s3": ["s3fs>=2024.2"],
        "gs": ["gcsfs>=2024.2"],
        "hf": ["huggingface_hub>=0.20"],
        "convert": ["lmdb>=1.4", "lz4>=4", "msgpack>=1"],
        "detector": ["torchvision>=0.18"],
        "images": ["scikit-image>=0.20", "scipy>=1.10"],
        "parquet": ["pyarrow>=15"],
        "demo": ["easy-vqa>=1.0", "scikit-image>=0.20", "scipy>=1.10"],
        "plots": ["matplotlib>=3.7"],
        "dev": ["hypothesis>=6", "mypy>=1.8", "pytest>=8", "pytest-xdist>=3", "ruff>=0.8", "types-PyYAML"],
    },
)
