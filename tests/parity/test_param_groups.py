"""Parameter groups of the reference's models, by name."""

import random
import re
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from tests.parity.golden import documents
from villa_ds.train.optim import parameter_groups

# LayerNorms that the reference does not call LayerNorm
OTHER_NORMS = re.compile(
    r"(img_layer_norm|pos_layer_norm|(feat_regress|region_classifier)\.net\.2|_output\.2)\.weight$"
)


def interleaved(lists: list[list[str]]) -> list[str]:
    """One list with the elements of all, those of each in order: what a model's own order can look like."""
    rest = [list(part) for part in lists]
    generator = random.Random(0)  # noqa: S311
    merged = []
    while any(rest):
        source = generator.choice([part for part in rest if part])
        merged.append(source.pop(0))
    return merged


def head_names(groups: list[dict[str, Any]]) -> tuple[str, ...]:
    """The head that has groups of its own: the reference then has four groups, the head's first."""
    return (groups[0]["params"][0].partition(".")[0],) if len(groups) == 4 else ()


MODELS = [
    pytest.param(model, id=f"{document.id}/{name}")
    for document in documents("param_groups.json")
    for name, model in document.values[0]["models"].items()
]


@pytest.mark.parametrize("model", MODELS)
def test_groups(model: dict[str, Any]) -> None:
    expected = model["groups"]
    named = {name: Parameter(torch.zeros(1)) for name in interleaved([group["params"] for group in expected])}
    groups = parameter_groups(named.items(), 0.01, head_names(expected), 10.0)
    names = {id(parameter): name for name, parameter in named.items()}
    seen = [
        {
            "weight_decay": group["weight_decay"] == 0.01,
            "top": group["lr_mul"] == 10.0,
            "params": [names[id(parameter)] for parameter in group["params"]],
        }
        for group in groups
    ]
    assert seen == expected

    decayed = [name for group in seen if group["weight_decay"] for name in group["params"]]
    listed = model["layernorm_weights_that_ARE_decayed"]
    assert sorted(name for name in decayed if OTHER_NORMS.search(name)) == sorted(listed)
