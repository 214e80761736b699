"""Whole optimizer runs of the reference: groups, schedule, clipping and AdamW together, step by step."""

import os

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from tests.parity.golden import DTYPES, Case, Expectations, cases
from tests.parity.test_param_groups import MODELS, head_names, interleaved
from tests.parity.test_schedules import SCHEDULES, TABLES
from villa_ds.config import OptimizerConfig
from villa_ds.train.optim import build_optimizer, clip_gradients, learning_rate, parameter_groups, set_learning_rate

# other model families' optimizers carry a `family`; theirs are not the release's
RELEASE_CASES = [case for case in cases("optimizer") if case.values[0].spec.get("family", "uniter") == "uniter"]


def named_parameters(case: Case, dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    """Every name of the weights file; a name outside the groups is tied to the parameter that has its values."""
    weights = case.weights(dtype)
    names = interleaved([group["params"] for group in case.spec["groups"]])
    parameters = {name: Parameter(weights[name]) for name in names}
    tied = {
        name: next(first for first in names if torch.equal(weights[first], weights[name]))
        for name in weights
        if name not in parameters
    }
    return [*parameters.items(), *((name, parameters[first]) for name, first in tied.items())]


def optimizer_config(case: Case) -> OptimizerConfig:
    hyper, defaults = case.spec["hyper"], case.spec["adamw_defaults"]
    assert hyper["optim"] == "adamw"
    assert defaults["correct_bias"] is True
    return OptimizerConfig(
        learning_rate=hyper["learning_rate"],
        betas=tuple(hyper["betas"]),
        eps=defaults["eps"],
        weight_decay=hyper["weight_decay"],
        clip_norm=max(0.0, hyper["grad_norm"]),  # the reference switches clipping off with -1
        warmup_steps=hyper["warmup_steps"],
        head_multiplier=hyper["lr_mul"],
    )


def check_state(expected: Expectations, optimizer: torch.optim.Optimizer, named: dict[str, Parameter]) -> None:
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            expected.check(f"final/{moment}/{name}", state[moment])
        assert state["step"] == expected.peek(f"final/step/{name}")
        expected.check(f"final/step/{name}", state["step"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RELEASE_CASES)
def test_optimizer_run(case: Case, dtype: torch.dtype) -> None:
    config = optimizer_config(case)
    named = named_parameters(case, dtype)
    names = {id(parameter): name for name, parameter in reversed(named)}  # the first name of each wins
    groups = parameter_groups(named, config.weight_decay, head_names(case.spec["groups"]), config.head_multiplier)
    seen = [
        {
            "params": [names[id(parameter)] for parameter in group["params"]],
            "weight_decay": group["weight_decay"],
            "lr_mul": group["lr_mul"],
        }
        for group in groups
    ]
    assert seen == case.spec["groups"]

    optimizer = build_optimizer(config, groups)
    parameters = dict(named)
    each_once = [parameter for group in groups for parameter in group["params"]]
    gradients = case.inputs(dtype)
    unused = set(gradients)
    with case.expectations(dtype) as expected:
        for step in range(1, case.spec["hyper"]["n_steps"] + 1):
            for name in names.values():
                parameters[name].grad = gradients.get(f"step{step}/grad/{name}")
                unused.discard(f"step{step}/grad/{name}")
            set_learning_rate(optimizer, learning_rate(step, config, case.spec["hyper"]["num_train_steps"]))
            expected.check(f"step{step}/lr", np.array([group["lr"] for group in optimizer.param_groups]))
            expected.check(f"step{step}/grad_norm", clip_gradients(each_once, config.clip_norm))
            optimizer.step()
            for name in names.values():
                expected.check(f"step{step}/param/{name}", parameters[name])
        check_state(expected, optimizer, {name: parameters[name] for name in names.values()})
    assert not unused, "gradients that were never presented"


@pytest.mark.skipif("VILLA_DS_GOLDEN" in os.environ, reason="another folder may hold other kinds of cases only")
def test_something_was_found() -> None:
    assert RELEASE_CASES
    assert MODELS
    assert {schedule for schedule, _ in (table.values for table in TABLES)} == set(SCHEDULES)
