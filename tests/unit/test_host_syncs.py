"""A step asks the device nothing: on a GPU every answer would have to wait for all that was begun."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import tiny_batch, tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig
from villa_ds.train.adversary import Adversary
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import TorchEngine

# Operations that give the host a value, or a tensor whose shape depends on values.
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal")


class Questions(TorchDispatchMode):
    """Counts the operations that a device would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if name in ASKING or masks:
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


def questions(run: Callable[[], object]) -> dict[str, int]:
    with Questions() as mode:
        run()
    return dict(mode.asked)


def test_what_asks_is_counted() -> None:
    values = torch.tensor([1.0, 0.0])
    assert questions(lambda: float(values[0])) == {"_local_scalar_dense": 1}
    assert questions(lambda: values[values > 0]) == {"index": 1}
    assert questions(values.nonzero) == {"nonzero": 1}


VARIANTS: dict[str, dict[str, Any]] = {
    "keep": {},
    "recompute": {"clean_graph": "recompute"},
    "alternate": {"modality": "alternate"},
    "linf": {"norm": "linf"},
    "uniform start": {"init": "uniform"},
    "uniform start, recompute": {"init": "uniform", "clean_graph": "recompute"},
    "detached": {"clean": "detached"},
    "textbook": {"schedule": "textbook", "dropout": "independent"},
}
CASES = [
    (name, variant) for name in ("mlm", "mrfr", "mrc", "mrckl", "itm", "retrieval-hard") for variant in (None, "keep")
]
CASES += [("vqa", variant) for variant in (None, *VARIANTS)]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_step_asks_nothing(name: str, variant: str | None) -> None:
    engine = TorchEngine(
        tiny_module(name, dropout=0.1, dtype=torch.float32), EngineConfig(device="cpu"), OptimizerConfig()
    )
    objective = engine.module.objectives[name]
    batches = tuple(tiny_batch(objective, start=start, dtype=torch.float32) for start in (0, 4))
    work = StepInput(1, 0, objective, batches, (0, 1))
    step = ModalityConfig(0.1, max_norm=0.3, init_norm=0.2)
    settings: dict[str, Any] = {"text": step, "image": step, "modality": "both"}
    if variant is None:
        assert questions(lambda: train_step(engine, work)) == {}
    else:
        adversary = Adversary(AdversaryConfig(**settings | VARIANTS[variant]))
        assert questions(lambda: adversarial_step(engine, work, adversary, 1.0)) == {}
    assert questions(lambda: engine.update(1e-4)) == {"_local_scalar_dense": 1}  # the gradient's norm
