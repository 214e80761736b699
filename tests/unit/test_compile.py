"""`engine.compile: true`: the same gradients, few graphs for many lengths, and layers as they are where it fails.

Traced and differentiated as in earnest, but without the machine code, whose making takes a minute
(`benchmarks/step.py --compile` has it, and compares gradients too).
"""

import functools
from typing import Any

import pytest
import torch

from tests.tiny import tiny_batch, tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig
from villa_ds.train.adversary import Adversary
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import TorchEngine

ADVERSARY = Adversary(AdversaryConfig(modality="both", text=ModalityConfig(0.1), image=ModalityConfig(0.1)))


def engine_of(compile_: bool) -> TorchEngine:
    module = tiny_module("vqa", dtype=torch.float32)
    return TorchEngine(module, EngineConfig(device="cpu", compile=compile_), OptimizerConfig())


def gradients(engine: TorchEngine) -> list[dict[str, torch.Tensor]]:
    """Of plain and adversarial steps on batches of several sizes and lengths."""
    objective, found = engine.module.objectives["vqa"], []
    for start in range(0, 10, 3):
        batch = tiny_batch(objective, rows=3 + start % 2, start=start, dtype=torch.float32)
        work = StepInput(1, 0, objective, (batch,), (0,))
        for adversarial in (False, True):
            adversarial_step(engine, work, ADVERSARY, 1.0) if adversarial else train_step(engine, work)
            named = engine.module.named_parameters()
            found.append({name: value.grad.clone() for name, value in named if value.grad is not None})
            engine.discard()
    return found


def assert_same(ours: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> None:
    for own, other in zip(ours, others, strict=True):
        assert own.keys() == other.keys()
        scale = max(float(value.norm()) for value in own.values())
        for name, value in own.items():
            assert float((value - other[name]).norm()) <= 1e-5 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_have_the_gradients_of_the_layers(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    compiled, plain = engine_of(True), engine_of(False)
    for engine in (compiled, plain):
        engine.module.backbone.encoder.activation_checkpointing = recompute  # type: ignore[union-attr]
    assert_same(gradients(plain), gradients(compiled))
    # The one of the start, and every layer or only what is read, with and without a gradient of the input; not one for
    # each layer, size or length.
    assert 2 <= counters["stats"]["unique_graphs"] <= 6
    torch._dynamo.reset()


def test_where_compiling_fails_the_layers_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    caplog.set_level("WARNING", "villa_ds")
    ours, others = gradients(engine_of(True)), gradients(engine_of(False))
    assert [record.message for record in caplog.records] == [
        "torch.compile does not work here, layers run as they are: no C++ compiler"
    ]
    for own, other in zip(ours, others, strict=True):
        assert all(torch.equal(own[name], other[name]) for name in own)


def test_warming_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    engine = engine_of(True)
    assert all(parameter.grad is None for parameter in engine.module.parameters())
