"""State dicts: keys, shapes, ties and sizes of the released models, and round trips of their weights."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.golden import Case, cases, documents
from tests.parity.modules import build, model_config, module_of
from villa_ds.config import ModelConfig
from villa_ds.models.presets import PRESETS, resolve_sizes
from villa_ds.models.uniter import UniterBackbone
from villa_ds.models.weights import reference_names, to_reference

Inventory = dict[str, Any]
KEYS = {"config", "img_dim", "img_label_dim", "reference", "format", "common_uniter", "heads", "bare_UniterModel"}
INVENTORIES = [item for item in documents("*.json") if "common_uniter" in item.values[0]]


def reference_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Names and shapes in the reference's layout."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in module.state_dict().items():
        names = reference_names(name)
        for part in names:
            shapes[part] = [tensor.shape[0] // len(names), *tensor.shape[1:]]
    return shapes


def ties_of(module: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_presets_are_the_released_sizes(inventory: Inventory) -> None:
    assert set(inventory) == KEYS
    config = inventory["config"]
    preset = next(
        name
        for name, sizes in PRESETS.items()
        if name.startswith("uniter-") and sizes["hidden_size"] == config["hidden_size"]
    )
    sizes = resolve_sizes(ModelConfig(preset=preset), config["vocab_size"], inventory["img_dim"])
    assert sizes == resolve_sizes(
        model_config(config, config["type_vocab_size"]), config["vocab_size"], inventory["img_dim"]
    )


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_bare_model(inventory: Inventory) -> None:
    config = inventory["config"]
    sizes = resolve_sizes(model_config(config, config["type_vocab_size"]), config["vocab_size"], inventory["img_dim"])
    with torch.device("meta"):
        shapes = reference_shapes(UniterBackbone(sizes))
    assert inventory["bare_UniterModel"] == 'same keys without the "uniter." prefix'
    assert {f"uniter.{name}": shape for name, shape in shapes.items()} == inventory["common_uniter"]


@pytest.mark.parametrize(
    ("inventory", "name"),
    [
        pytest.param(item.values[0], name, id=f"{item.id}-{name}")
        for item in INVENTORIES
        for name in item.values[0]["heads"]
    ],
)
def test_head(inventory: Inventory, name: str) -> None:
    entry = inventory["heads"][name]
    assert entry["n_state_dict_keys"] == len(inventory["common_uniter"]) + len(entry["extra"])
    expected = {**inventory["common_uniter"], **entry["overrides"], **entry["extra"]}
    word_rows, _ = expected["uniter.embeddings.word_embeddings.weight"]
    type_rows, _ = expected["uniter.embeddings.token_type_embeddings.weight"]
    module = build(entry | {"config": inventory["config"]}, word_rows, type_rows, device="meta")
    shapes = reference_shapes(module)
    assert shapes == expected
    assert ties_of(module) == entry["tied"]
    assert sum(parameter.numel() for parameter in module.parameters()) == entry["n_parameters_unique"]


@pytest.mark.parametrize("case", cases("encoder", "pretrain", "head", "itm_hard_negative", "villa", "optimizer"))
def test_round_trip(case: Case) -> None:
    module = module_of(case, torch.float32)
    if case.spec["kind"] != "optimizer":  # whose description stops at the groups
        assert ties_of(module) == case.spec["tied_state_dict_keys"]
        table = module.get_submodule("uniter.embeddings")
        rows = {name: len(table.get_parameter(f"{name}_embeddings.weight")) for name in ("word", "token_type")}
        assert rows == case.spec["embedding_rows_in_weights"]
    stored, written = case.weights(torch.float32), to_reference(module.state_dict())
    if not module.objectives:
        written = {key.removeprefix("uniter."): value for key, value in written.items()}
    assert set(written) == set(stored)
    for key, value in stored.items():
        torch.testing.assert_close(written[key], value, rtol=0, atol=0, msg=key)
