"""`villa-ds doctor`: what is installed, which kernels will run, what is missing."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Iterator

import torch

from villa_ds import __version__
from villa_ds.config import EngineConfig, ModelConfig
from villa_ds.data.cache import GIB, Cache, default_folder
from villa_ds.kernels import kernels_of
from villa_ds.models.layers import fused_layer_norm_kernel

REQUIRED = ("torch", "numpy", "deepspeed", "webdataset", "tensorboard", "pyyaml", "safetensors", "tokenizers", "tqdm")
OPTIONAL = {"easy-vqa": "shards demo", "scikit-image": "shards demo", "scipy": "shards demo"}
OPTIONAL |= {"s3fs": "s3://", "gcsfs": "gs://", "huggingface_hub": "hf://"}
MATMUL = 512  # side of the square matrices of the precision test: large enough to show the kernel, done in a moment


def doctor() -> list[str]:
    """The report, line by line."""
    return [*_installed(), "", *_device(), "", *_kernels(), "", *_precision(), "", *_cache()]


def _installed() -> Iterator[str]:
    yield f"villa_ds {__version__}, python {platform.python_version()}, {platform.platform()}"
    for name in REQUIRED:
        yield f"  {name:14} {_version(name) or 'MISSING: pip install ' + name}"
    for name, use in OPTIONAL.items():
        yield f"  {name:14} {_version(name) or f'not installed (only `{use}` needs it)'}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Iterator[str]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"device cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield "ranks talk over nccl"
    else:
        yield f"device cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads a process"
        yield "ranks talk over gloo; start one rank per core or set OMP_NUM_THREADS, or their threads fight for cores"


def _kernels() -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for operation, kernel in kernels_of(device, ModelConfig(), EngineConfig()).items():
        yield f"{operation}: {kernel}"
    if fused_layer_norm_kernel() is None:
        yield "  (NVIDIA apex's LayerNorm needs CUDA and a build from its source; PyPI's `apex` is another project)"
    fused = "apex FusedAdam if built, else torch's fused AdamW" if torch.cuda.is_available() else "torch AdamW"
    yield f"optimizer: release_adamw (multi-tensor operations); `fused_adam` gives {fused}"


def _precision() -> Iterator[str]:
    if torch.cuda.is_available():
        supported = torch.cuda.is_bf16_supported()
        yield f"precision: bfloat16 {'supported' if supported else 'not supported, use float16 or float32'}"
        return
    ratio = _seconds(torch.bfloat16) / _seconds(torch.float32)
    advice = "use float32" if ratio > 1 else "bfloat16 pays"
    yield f"precision: a bfloat16 matrix product takes {ratio:.1f} times a float32 one on this CPU: {advice}"


def _cache() -> Iterator[str]:
    cache = Cache(default_folder(), 0)
    usage = cache.usage()
    yield (
        f"cache of remote shards: {cache.folder} (or data.cache), {usage.files} files and {usage.partial} begun, "
        f"{usage.bytes / GIB:.1f} GiB"
    )


def _seconds(dtype: torch.dtype) -> float:
    """Median seconds of a matrix product."""
    left, right = torch.ones(MATMUL, MATMUL, dtype=dtype), torch.ones(MATMUL, MATMUL, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
