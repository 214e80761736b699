"""Files of named tensors, read without running code from them."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing but tensors is unpickled

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from villa_ds.errors import WeightsError

TENSOR_SUFFIXES = (".pt", ".pth", ".bin")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors, .pt, .pth or .bin file, on the CPU. Never runs code from the file."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        if path.suffix not in TENSOR_SUFFIXES:
            raise WeightsError(f"{path}: give a .safetensors, {', '.join(TENSOR_SUFFIXES)} file or a BERT folder")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise WeightsError(f"{path}: cannot read the weights: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: expected a plain mapping of names to tensors; export the state dict alone")
    return dict(content)


def write_weights(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as .safetensors, or as .pt, which the reference code reads."""
    path = Path(path)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(tensors), path)
    elif path.suffix == ".pt":
        torch.save(dict(tensors), path)
    else:
        raise WeightsError(f"{path}: weights are written as .safetensors or .pt, not {path.suffix!r}")
