"""Modules of the classes that golden cases name, with their weights loaded."""

from pathlib import Path
from typing import Any

import torch

from tests.parity.golden import Case
from villa_ds.config import ModelConfig
from villa_ds.config_objectives import (
    ItmConfig,
    Nlvr2Config,
    ObjectivesConfig,
    RefexpConfig,
    RetrievalConfig,
    VqaConfig,
)
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.store import LocalStore
from villa_ds.models.weights import load_reference, to_reference
from villa_ds.objectives.base import build_objective
from villa_ds.train.module import TrainModule, build_module

# Reference class -> objectives of ours with the same heads, in the order of its state dict.
BUILT = {
    "UniterModel": (),
    "UniterForPretraining": ("mlm", "mrfr", "mrc", "mrckl", "itm"),
    "UniterForPretrainingForVCR": ("mlm", "mrfr", "mrc", "mrckl", "itm"),
    "UniterForVisualQuestionAnswering": ("vqa",),
    "UniterForVisualEntailment": ("ve",),
    "UniterForVisualCommonsenseReasoning": ("vcr",),
    "UniterForReferringExpressionComprehension": ("refexp",),
    "UniterForImageTextRetrieval": ("retrieval",),
    "UniterForImageTextRetrievalHardNeg": ("retrieval-hard",),
    "UniterForNlvr2Paired": ("nlvr2",),
    "UniterForNlvr2Triplet": ("nlvr2",),
    "UniterForNlvr2PairedAttn": ("nlvr2",),
}
FORMS = {"UniterForNlvr2Paired": "paired", "UniterForNlvr2Triplet": "triplet"}  # of NLVR2; otherwise paired-attn
MASK_ID = 3


def manifest_of(vocabulary_size: int, feature_width: int, detector_classes: int = 0) -> Manifest:
    """A manifest that only declares sizes."""
    vocabulary = Vocabulary(vocabulary_size, "", pad=0, unk=4, cls=1, sep=2, mask=MASK_ID, random_low=5)
    return Manifest(
        store=LocalStore(Path("golden")),
        shards=(),
        feature_width=feature_width,
        detector_classes=detector_classes,
        label_format="dense" if detector_classes else "none",
        vocabulary=vocabulary,
        answers=(),
        extractor="",
        source="",
        command="",
        fingerprint="",
        index_files={},
    )


def model_config(config: dict[str, Any], type_rows: int) -> ModelConfig:
    """The reference's transformer config as ours."""
    assert config["hidden_act"] == "gelu"
    names = set(ModelConfig.__dataclass_fields__) & set(config) - {"type_vocab_size"}
    return ModelConfig(**{name: config[name] for name in names}, type_vocab_size=type_rows)


def settings_of(model: dict[str, Any], itm_ot_lambda: float = 0.0) -> ObjectivesConfig:
    """The head options of a case's `model` entry as our settings."""
    kwargs = model["kwargs"]
    return ObjectivesConfig(
        itm=ItmConfig(ot_weight=itm_ot_lambda),
        vqa=VqaConfig(num_answers=kwargs.get("num_answer")),
        refexp=RefexpConfig(
            loss=kwargs.get("loss", "cls"),
            layers=kwargs.get("mlp", 1),
            margin=kwargs.get("margin", 0.2),
            hard_ratio=kwargs.get("hard_ratio", 0.3),
        ),
        retrieval=RetrievalConfig(margin=kwargs.get("margin", 0.2), hard_negatives=kwargs.get("hard_size", 31)),
        nlvr2=Nlvr2Config(form=FORMS.get(model["class"], "paired-attn")),
    )


def build(
    model: dict[str, Any], word_rows: int, type_rows: int, itm_ot_lambda: float = 0.0, device: str = "cpu"
) -> TrainModule:
    """The module for a case's `model` entry (class, config, kwargs), freshly initialised."""
    kwargs = model["kwargs"]
    manifest = manifest_of(word_rows, kwargs["img_dim"], kwargs.get("img_label_dim", 0))
    settings = settings_of(model, itm_ot_lambda)
    objectives = [build_objective(name, settings, manifest) for name in BUILT[model["class"]]]
    with torch.device(device):
        return build_module(model_config(model["config"], type_rows), objectives, manifest)


def module_of(case: Case, dtype: torch.dtype) -> TrainModule:
    """The module of a case with its weights, in training mode (golden cases have dropout 0)."""
    weights, ot_weight = case.weights(dtype), case.spec.get("hyper", {}).get("itm_ot_lambda", 0.0)
    # Tables were enlarged after construction in some cases: their rows count, not the config's.
    word_rows, type_rows = (
        next(len(value) for name, value in weights.items() if name.endswith(f"embeddings.{table}_embeddings.weight"))
        for table in ("word", "token_type")
    )
    module = build(case.spec["model"], word_rows, type_rows, ot_weight).to(dtype)
    report = load_reference(module, weights)
    assert report.missing == ()
    assert report.unexpected == ()
    return module


def gradients(module: TrainModule) -> dict[str, torch.Tensor]:
    """Gradients by the reference's names, each parameter once; zero where a parameter took no part."""
    return to_reference(
        {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in module.named_parameters()
        }
    )
