"""torchvision's Faster R-CNN as an extractor, with random weights; without torchvision, what the user is told."""

import builtins
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.features import LENIENT, row, samples, write_texts
from tests.unit.test_from_images import picture
from villa_ds.cli import main
from villa_ds.data.convert.extractors import load_extractor
from villa_ds.data.convert.images import from_images
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import load_manifest
from villa_ds.errors import ConfigError, WeightsError

MODEL = "fasterrcnn_mobilenet_v3_large_320_fpn"
SMALL = ("min_size=64", "max_size=96", "min_regions=4", "max_regions=7", "confidence=0.9")
CLASSES, WIDTH = 6, 1024


def test_without_torchvision_one_line_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_import = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
        return plain_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    command = ["shards", "from-images", "--images", str(tmp_path), "--texts", "t", "--vocabulary", "v"]
    assert main([*command, "--extractor", "faster-rcnn", "--set", "weights=w.pth", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "needs torchvision: pip install torchvision" in told
    assert told.count("\n") == 1


def detection() -> Any:
    """torchvision's detectors; a torchvision that was built for another torch does not do either."""
    try:
        from torchvision.models import detection as module
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"no torchvision that fits this torch: {str(error).splitlines()[0]}")
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict with 6 classes whose heads tell regions apart."""
    build = getattr(detection(), MODEL)
    torch.manual_seed(0)
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES)
    for name, parameter in model.named_parameters():
        if name.startswith("roi_heads.box_head"):
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.startswith("roi_heads.box_predictor.cls"):
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(model.state_dict(), path)
    return path


def extractor_of(weights: Path, *settings: str) -> Any:
    return load_extractor("faster-rcnn", [f"weights={weights}", f"model={MODEL}", *SMALL, *settings])


@pytest.mark.slow
def test_features_and_labels_are_the_heads_of_the_stored_boxes(weights: Path, tmp_path: Path) -> None:
    """Against torchvision's own pieces at the stored boxes, and its own detections for the best of them."""
    extractor = extractor_of(weights)
    assert (extractor.feature_width, extractor.detector_classes) == (WIDTH, CLASSES)
    pixels = np.asarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3)), np.uint8)
    found = extractor.extract(pixels)
    assert 4 <= len(found.boxes) <= 7
    assert found.features.shape == (len(found.boxes), WIDTH)
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= 1
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    np.testing.assert_allclose(found.labels.sum(1), 1, rtol=1e-5)

    model = getattr(detection(), MODEL)(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=64, max_size=96
    )
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    with torch.no_grad():
        images, _ = model.transform([torch.from_numpy(pixels).permute(2, 0, 1) / 255])
        maps = model.backbone(images.tensors)
        height, width = images.image_sizes[0]
        boxes = torch.from_numpy(found.boxes) * torch.tensor([width, height, width, height])
        features = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, [boxes], images.image_sizes))
        labels = model.roi_heads.box_predictor(features)[0].softmax(-1)
        np.testing.assert_allclose(found.features, features, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.labels, labels, rtol=1e-3, atol=1e-4)
        model.roi_heads.score_thresh = 0.0
        own = model([torch.from_numpy(pixels).permute(2, 0, 1) / 255])[0]["boxes"]
    scaled = torch.from_numpy(found.boxes) * torch.tensor([80, 48, 80, 48])
    assert (scaled[0] - own).abs().amax(1).min() < 0.1  # the most confident box is one of its detections


@pytest.mark.slow
def test_worker_processes_get_the_settings_and_give_the_same(weights: Path) -> None:
    extractor = extractor_of(weights)
    pixels = np.full((40, 40, 3), 200, np.uint8)
    found = extractor.extract(pixels)
    again = copy.copy(extractor)  # by __getstate__, as for another process
    assert "_model" in vars(extractor)
    assert "_model" not in vars(again)
    np.testing.assert_array_equal(again.extract(pixels).features, found.features)
    assert again.fingerprint == extractor.fingerprint


@pytest.mark.slow
def test_the_fingerprint_is_of_settings_and_weights(weights: Path, tmp_path: Path) -> None:
    prints = {extractor_of(weights).fingerprint, extractor_of(weights, "overlap=0.4").fingerprint}
    moved = tmp_path / "moved.pth"
    moved.write_bytes(weights.read_bytes())
    assert extractor_of(moved, "device=meta").fingerprint in prints  # neither path nor device is part of it
    state = torch.load(weights, weights_only=True)
    state["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(state, moved)
    prints.add(extractor_of(moved).fingerprint)
    assert len(prints) == 3


@pytest.mark.slow
def test_pictures_to_shards(weights: Path, tmp_path: Path) -> None:
    picture(tmp_path / "pictures/a.png", (64, 48))
    picture(tmp_path / "pictures/b.jpg", (40, 90))
    texts = write_texts(tmp_path / "t.jsonl", [row("a", "1"), row("b", "2")])
    extractor = extractor_of(weights)
    from_images(tmp_path / "out", tmp_path / "pictures", TextsFile(texts), extractor, LENIENT)
    assert sorted(samples(tmp_path / "out")) == ["1", "2"]
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.extractor, manifest.feature_width) == (extractor.fingerprint, WIDTH)
    assert (manifest.label_format, manifest.detector_classes) == ("dense", CLASSES)


@pytest.mark.slow
def test_weights_of_another_model_are_refused(weights: Path, tmp_path: Path) -> None:
    other = load_extractor("faster-rcnn", [f"weights={weights}", "model=fasterrcnn_resnet50_fpn", *SMALL])
    with pytest.raises(WeightsError, match=r"these are not the weights of fasterrcnn_resnet50_fpn: .*Missing key"):
        other.extract(np.zeros((40, 40, 3), np.uint8))
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"has no roi_heads\.box_predictor\.cls_score\.weight"):
        extractor_of(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="cannot read the weights"):
        extractor_of(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "faster-rcnn.weights: missing"),
        (("weights=w", "model=fasterrcnn_nothing"), "torchvision has no 'fasterrcnn_nothing'; it has fasterrcnn_mob"),
        (("weights=w", "model=maskrcnn_resnet50_fpn"), "give one of torchvision's fasterrcnn_..."),
        (("weights=w", "min_regions=200"), "faster-rcnn.min_regions: 200 does not do"),
    ],
)
def test_wrong_settings(settings: tuple[str, ...], message: str) -> None:
    detection()
    with pytest.raises(ConfigError) as refusal:
        load_extractor("faster-rcnn", settings)
    assert message in str(refusal.value)
