"""What a run's first lines say of the kernels that will run."""

import pytest
import torch

from villa_ds import kernels
from villa_ds.config import EngineConfig, ModelConfig
from villa_ds.kernels import kernels_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "built", "model", "expected"),
    [
        (CUDA, True, ModelConfig(), "apex's fused kernel"),
        (CUDA, True, ModelConfig(fused_layer_norm=False), "torch's"),
        (CUDA, False, ModelConfig(), "torch's"),
        (CPU, True, ModelConfig(), "torch's"),
    ],
)
def test_layer_norm(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, built: bool, model: ModelConfig, expected: str
) -> None:
    monkeypatch.setattr(kernels, "fused_layer_norm_kernel", lambda: torch.layer_norm if built else None)
    assert kernels_of(device, model, EngineConfig())["LayerNorm"] == expected


@pytest.mark.parametrize(
    ("device", "there", "model", "engine", "expected"),
    [
        (CPU, True, ModelConfig(), EngineConfig(), "oneDNN where large, torch's choice else"),
        (CPU, False, ModelConfig(), EngineConfig(), "torch's choice"),
        (CPU, True, ModelConfig(onednn=False), EngineConfig(), "torch's choice"),
        (CPU, True, ModelConfig(), EngineConfig(precision="bfloat16"), "torch's choice"),
        (CPU, True, ModelConfig(), EngineConfig(compile=True), "torch's choice"),
        (CUDA, True, ModelConfig(), EngineConfig(), "cuBLAS"),
    ],
)
def test_products(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, there: bool, model: ModelConfig, engine: EngineConfig,
    expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "onednn_product", lambda: torch.mm if there else None)
    assert kernels_of(device, model, engine)["products"] == expected


def test_layers() -> None:
    assert kernels_of(CPU, ModelConfig(), EngineConfig(compile=True))["layers"] == "compiled"
    assert kernels_of(CPU, ModelConfig(), EngineConfig())["layers"] == "not compiled"
