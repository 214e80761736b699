"""Plain PyTorch behind the engine protocol: zeros for what took no part, bad gradients, exact saves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.runs import differing
from tests.tiny import tiny_batch, tiny_module
from villa_ds.config import EngineConfig, OptimizerConfig
from villa_ds.errors import CheckpointError, ConfigError, NonFiniteError
from villa_ds.train.engine import build_engine
from villa_ds.train.optim import ReleaseAdamW
from villa_ds.train.parameters import KINDS, ParameterFiles
from villa_ds.train.torch_engine import TorchEngine

OBJECTIVES = ("mlm", "itm", "mrfr")


def engine_of(seed: int = 0, precision: str = "float32", **optimizer: object) -> TorchEngine:
    module = tiny_module(*OBJECTIVES, dtype=torch.float32, seed=seed)
    settings = OptimizerConfig(**{"clip_norm": 1.0, **optimizer})  # type: ignore[arg-type]
    return TorchEngine(module, EngineConfig(device="cpu", precision=precision), settings)  # type: ignore[arg-type]


def accumulate(engine: TorchEngine, name: str, start: int = 0) -> None:
    batch = tiny_batch(engine.module.objectives[name], start=start, dtype=torch.float32)
    engine.backward(engine.forward(batch, name, None).loss, boundary=True)


def weights(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def stored(folder: Path) -> dict[str, Tensor]:
    files = ParameterFiles(folder)
    assert files.updates == 4
    return {f"{kind}/{name}": files.get(kind, name) for kind in KINDS for name in files.names}


def take_steps(engine: TorchEngine, first: int, last: int) -> None:
    for step in range(first, last + 1):
        accumulate(engine, OBJECTIVES[step % 3], start=10 * step)
        engine.update(0.01)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_what_took_no_part_gets_zeros() -> None:
    """Step 2 leaves the MLM head out: its moments decay as if its gradient were zero, and it goes on moving."""
    engine = engine_of(clip_norm=0.0, weight_decay=0.0, betas=(0.9, 0.98))
    accumulate(engine, "mlm")
    gradient = engine.module.get_parameter("cls.predictions.bias").grad
    assert gradient is not None
    gradient = gradient.clone()
    engine.update(0.01)
    before = weights(engine)["cls.predictions.bias"]
    accumulate(engine, "itm")
    assert engine.module.get_parameter("cls.predictions.bias").grad is None
    engine.update(0.01)
    saved = engine._get(engine.module.get_parameter("cls.predictions.bias"), "exp_avg")
    torch.testing.assert_close(saved, 0.9 * 0.1 * gradient)
    assert not torch.equal(weights(engine)["cls.predictions.bias"], before)


def test_weight_decay_reaches_what_took_no_part() -> None:
    engine = engine_of(weight_decay=0.1)
    before = weights(engine)["itm_output.weight"]
    accumulate(engine, "mlm")
    engine.update(0.5)
    torch.testing.assert_close(weights(engine)["itm_output.weight"], before * (1 - 0.5 * 0.1))


def test_the_norm_is_that_before_clipping_and_clipping_happens() -> None:
    loose, tight = engine_of(clip_norm=0.0), engine_of(clip_norm=0.01)
    for engine in (loose, tight):
        accumulate(engine, "mlm")
    squares = [value.grad.double().square().sum() for value in loose.module.parameters() if value.grad is not None]
    expected = float(torch.stack(squares).sum().sqrt())
    assert loose.update(0.01) == pytest.approx(expected, rel=1e-6)
    assert tight.update(0.01) == pytest.approx(expected, rel=1e-6)
    parameter = "uniter.encoder.layer.0.intermediate.dense.weight"
    first = tight._get(tight.module.get_parameter(parameter), "exp_avg")
    whole = loose._get(loose.module.get_parameter(parameter), "exp_avg")
    torch.testing.assert_close(first, whole * (0.01 / (expected + 1e-6)), rtol=1e-4, atol=0.0)


def test_gradients_do_not_survive_an_update() -> None:
    engine = engine_of()
    accumulate(engine, "mlm")
    assert engine.passes == 1
    engine.update(0.01)
    assert engine.passes == 0
    assert all(value.grad is None for value in engine.module.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_raises_before_any_weight_or_moment_changed(bad: float) -> None:
    engine = engine_of()
    take_steps(engine, 1, 2)
    before = weights(engine)
    moments = {name: engine._get(value, "exp_avg").clone() for name, value in engine.module.named_parameters()}
    handle = engine.module.get_parameter("uniter.pooler.dense.bias").register_hook(
        lambda gradient: torch.full_like(gradient, bad)
    )
    accumulate(engine, "itm")
    with pytest.raises(NonFiniteError, match="the gradient is not finite"):
        engine.update(0.01)
    handle.remove()
    assert equal(weights(engine), before)
    assert equal({name: engine._get(value, "exp_avg") for name, value in engine.module.named_parameters()}, moments)


def test_a_loss_that_is_not_finite_raises_too() -> None:
    """Not clipped: the norm is looked at all the same."""
    engine = engine_of(clip_norm=0.0)
    before = weights(engine)
    objective = engine.module.objectives["mrfr"]
    batch = tiny_batch(objective, dtype=torch.float32)
    batch.features[0, 0, 0] = float("nan")
    loss = engine.forward(batch, "mrfr", None).loss
    assert not torch.isfinite(loss)
    engine.backward(loss, boundary=True)
    with pytest.raises(NonFiniteError):
        engine.update(0.01)
    assert equal(weights(engine), before)


@pytest.mark.parametrize("name", ["release_adamw", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_save_and_load_continue_bit_for_bit(tmp_path: Path, name: str, precision: str) -> None:
    straight = engine_of(name=name, precision=precision)
    take_steps(straight, 1, 4)
    saved, again = tmp_path / "saved", tmp_path / "again"
    saved.mkdir()
    again.mkdir()
    straight.snapshot()(saved)
    other = engine_of(name=name, precision=precision, seed=9)
    take_steps(other, 1, 1)  # an optimizer state of its own, to be replaced
    assert not equal(weights(other), weights(straight))
    other.load(saved)
    assert equal(weights(other), weights(straight))
    other.snapshot()(again)
    assert differing(stored(again), stored(saved)) == []
    take_steps(straight, 5, 8)
    take_steps(other, 5, 8)
    assert equal(weights(other), weights(straight))


def test_a_save_before_the_first_update_loads(tmp_path: Path) -> None:
    straight = engine_of()
    straight.snapshot()(tmp_path)
    other = engine_of(seed=9)
    other.load(tmp_path)
    for engine in (straight, other):
        take_steps(engine, 1, 2)
    assert equal(weights(other), weights(straight))


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    TorchEngine(tiny_module("mlm", dtype=torch.float32), EngineConfig(device="cpu"), OptimizerConfig()).snapshot()(
        tmp_path
    )
    engine = engine_of()
    before = weights(engine)
    with pytest.raises(CheckpointError, match=r"parameter feat_regress.* is not in the checkpoint"):
        engine.load(tmp_path)
    assert equal(weights(engine), before)


def test_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.precision: float16 needs loss scaling.*bfloat16"):
        engine_of(precision="float16")


def test_the_release_optimizer_is_the_default_and_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module("mlm", dtype=torch.float32)
    engine = build_engine(module, EngineConfig(device="cpu"), OptimizerConfig())
    assert isinstance(engine, TorchEngine)
    assert isinstance(engine._optimizer, ReleaseAdamW)
    assert (engine.rank, engine.world) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"engine\.name: 'torch' runs in one process: use engine\.name=deepspeed"):
        build_engine(module, EngineConfig(device="cpu"), OptimizerConfig())


def test_a_ds_config_that_nobody_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    build_engine(tiny_module("mlm"), EngineConfig(device="cpu", ds_config="zero3"), OptimizerConfig())
    assert caplog.messages == ["engine.ds_config: 'zero3' is not read: engine.name is torch"]
