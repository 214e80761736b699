"""Which kernels run a model on a device: told by `villa-ds doctor` and in a run's first lines."""

import torch

from villa_ds.config import EngineConfig, ModelConfig
from villa_ds.models.layers import fused_layer_norm_kernel
from villa_ds.models.products import onednn_product


def kernels_of(device: torch.device, model: ModelConfig, engine: EngineConfig) -> dict[str, str]:
    """Operation -> what computes it, with what the recipe allows and this machine has."""
    cuda = device.type == "cuda"
    apex = cuda and model.fused_layer_norm and fused_layer_norm_kernel() is not None
    eager = model.onednn and not engine.compile
    onednn = eager and engine.precision == "float32" and onednn_product() is not None
    return {
        "LayerNorm": "apex's fused kernel" if apex else "torch's",
        "attention": "scaled_dot_product_attention, "
        + ("memory-efficient (a padding mask rules flash out)" if cuda else "its plain form where it drops out"),
        "products": "cuBLAS" if cuda else "oneDNN where large, torch's choice else" if onednn else "torch's choice",
        "layers": "compiled" if engine.compile else "not compiled",
    }
