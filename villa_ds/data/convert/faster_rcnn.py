"""Regions from torchvision's Faster R-CNN (Ren et al., 2015), with weights that the user has as a file.

Chosen as bottom-up attention chooses (Anderson et al., CVPR 2018): each proposal is moved to the box of its best class,
near-duplicates within a class go, the most confident stay. Features and class distribution are then taken from the
boxes that were kept, so that what is stored describes the very box that is stored.

Shape legend: h, w image size; p proposals, r regions, D feature width, C classes (0 the background).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.data.convert.extractor import ExtractedRegions
from villa_ds.data.convert.region_files import Selection
from villa_ds.errors import ConfigError, WeightsError
from villa_ds.mapping import require
from villa_ds.tensor_files import read_weights

NAME = "faster-rcnn"
VERSION = "torchvision regions 1"  # change it with anything that changes a feature or a box
_CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"  # [C, D]


@dataclass(frozen=True)
class FasterRcnnSettings:
    """The detector, its weights, and which regions are kept (bottom-up attention's numbers)."""

    weights: str  # a .pth or .safetensors file of the model's state dict; nothing is ever downloaded
    model: str = "fasterrcnn_resnet50_fpn"  # a builder of torchvision.models.detection
    min_size: int = 800  # pixels that the shorter side is brought to, as torchvision's models are trained
    max_size: int = 1333  # and that the longer side does not exceed
    overlap: float = 0.5  # of two boxes of a class with a larger intersection over union the less likely one goes
    confidence: float = 0.2  # regions above it are kept, but
    min_regions: int = 10  # at least so many, if there are
    max_regions: int = 100  # and at most so many
    device: str = "cpu"  # decides no feature but for rounding, so not part of the fingerprint

    def __post_init__(self) -> None:
        require(self.model.startswith("fasterrcnn_"), "model", self.model, "give one of torchvision's fasterrcnn_...")
        require(1 <= self.min_regions <= self.max_regions, "min_regions", self.min_regions, "give 1 to max_regions")
        require(1 <= self.min_size <= self.max_size, "min_size", self.min_size, "give 1 to max_size")
        for name in ("overlap", "confidence"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "give 0 to 1")


class FasterRcnnExtractor:
    """Features are the box head's representation [r, D], labels its class distribution [r, C].

    Construction reads the weights' shapes and their hash; the model itself is built on first use, in each process.
    """

    def __init__(self, settings: FasterRcnnSettings) -> None:
        self.settings = settings
        _builder(settings.model)  # a missing package or a wrong name is said now
        path = Path(settings.weights)
        state = read_weights(path)
        if _CLASSIFIER not in state or state[_CLASSIFIER].ndim != 2:
            raise WeightsError(f"{path}: has no {_CLASSIFIER}; give the state dict of torchvision's {settings.model}")
        self.detector_classes, self.feature_width = state[_CLASSIFIER].shape
        said = {key: value for key, value in asdict(settings).items() if key not in ("weights", "device")}
        content = json.dumps([VERSION, said, hashlib.sha256(path.read_bytes()).hexdigest()], sort_keys=True)
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.fingerprint = f"{VERSION}, {settings.model}, {self.detector_classes} classes, sha256 {sha256}"

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes read the weights from the file: it is faster than sending them, and nothing is held twice.
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    @cached_property
    def _model(self) -> nn.Module:
        settings = self.settings
        size = {"min_size": settings.min_size, "max_size": settings.max_size}
        build = _builder(settings.model)
        model: nn.Module = build(weights=None, weights_backbone=None, num_classes=self.detector_classes, **size)
        path = Path(settings.weights)
        try:
            model.load_state_dict(read_weights(path))
        except RuntimeError as error:
            told = " ".join(str(error).split())[:300]
            raise WeightsError(f"{path}: these are not the weights of {settings.model}: {told}") from None
        try:
            return model.to(settings.device).eval()
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            raise ConfigError(f"device: {settings.device!r} cannot be used here: {told}") from None

    @torch.inference_mode()
    def extract(self, image: NDArray[np.uint8]) -> ExtractedRegions:
        """Regions of an RGB image [h, w, 3], most confident first; the whole image where nothing is proposed."""
        model: Any = self._model
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).to(self.settings.device) / 255
        resized, _ = model.transform([pixels])
        maps = model.backbone(resized.tensors)
        proposals, _ = model.rpn(resized, maps)
        size = resized.image_sizes[0]
        boxes = self._chosen(model.roi_heads, maps, proposals[0], size)
        features, logits, _ = _heads(model.roi_heads, maps, boxes, size)
        scale = boxes.new_tensor([size[1], size[0], size[1], size[0]])
        return ExtractedRegions(
            features.float().cpu().numpy(),
            (boxes / scale).clamp(0, 1).float().cpu().numpy(),
            logits.float().softmax(-1).cpu().numpy(),
        )

    def _chosen(self, heads: Any, maps: Any, proposals: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes [r, 4] to describe, of proposals [p, 4], in pixels of the resized image."""
        from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes  # noqa: PLC0415

        _, logits, moves = _heads(heads, maps, proposals, size)
        scores, classes = logits.softmax(-1)[:, 1:].max(-1)
        moved = heads.box_coder.decode(moves, [proposals])  # [p, C, 4]
        boxes = clip_boxes_to_image(moved[torch.arange(len(moved)), classes + 1], size)
        sound = remove_small_boxes(boxes, 1.0)
        boxes, scores, classes = boxes[sound], scores[sound], classes[sound]
        kept = batched_nms(boxes, scores, classes, self.settings.overlap)  # by decreasing score
        settings = self.settings
        selection = Selection(settings.confidence, settings.min_regions, settings.max_regions)
        chosen: Tensor = boxes[kept[: selection.count(scores[kept].cpu().numpy())]]
        return chosen if len(chosen) else chosen.new_tensor([[0, 0, size[1], size[0]]])


def _heads(heads: Any, maps: Any, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Representation [p, D], class logits [p, C] and moves [p, C x 4] of boxes [p, 4]."""
    features: Tensor = heads.box_head(heads.box_roi_pool(maps, [boxes], [size]))
    logits, moves = heads.box_predictor(features)
    return features, logits, moves


def _builder(name: str) -> Callable[..., nn.Module]:
    """torchvision's function of that name. ConfigError, with what to type, if it or the package is missing."""
    try:
        from torchvision.models import detection  # noqa: PLC0415
    except (ImportError, RuntimeError, OSError) as error:  # the latter two: built for another torch
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            mend = "pip install torchvision"
        else:
            mend = f"the one installed does not fit torch {torch.__version__} ({' '.join(str(error).split())[:120]})"
        raise ConfigError(
            f"extractor {NAME!r} needs torchvision: {mend}; beside a CPU build of torch: "
            "pip install torchvision --index-url https://download.pytorch.org/whl/cpu"
        ) from None
    build: Callable[..., nn.Module] | None = getattr(detection, name, None)
    if build is None:
        known = ", ".join(sorted(item for item in dir(detection) if item.startswith("fasterrcnn_")))
        raise ConfigError(f"model: torchvision has no {name!r}; it has {known}")
    return build
