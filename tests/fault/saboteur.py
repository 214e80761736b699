"""`villa_ds` with something wrong in it: saboteur.py KIND=VALUE... -- ARGUMENTS, or `sabotage` in this process.

slow=SECONDS              every optimizer step takes this much longer
slow_validation=SECONDS   every validation micro-batch does
slow_saving=SECONDS       every rank's share of a checkpoint does
hang=RANK:STEP            the rank stands still in the forward passes of the step
hang_loading=RANK:STEP    the rank waits for data that never come
die=RANK:STEP             the rank kills itself, as the kernel does when memory runs out
freeze=RANK:STEP          the rank stops as by SIGSTOP
bug=RANK:STEP             the rank raises an error that nobody expects
damage=RANK:STEP          the rank raises the error of damaged data
nan=STEP,STEP...          the features of rank 0's first micro-batch are NaN; each time the step is taken
nan_gradient=STEP         a gradient of rank 0 is infinite though the loss is not
jump=STEP,STEP...         rank 0 reports a loss of 1000
ask=STEP                  rank 0 gets SIGTERM in the step
fill=STEP:PATH            rank 0 writes PATH until the disk is full
empty=STEP:PATH           rank 0 removes PATH
clock=SECONDS             time.time() jumps forth and back by this much at every call
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import villa_ds.train.checkpoint
import villa_ds.train.loop
from villa_ds.cli import main
from villa_ds.errors import DamageError
from villa_ds.train.metrics import SumTable
from villa_ds.train.step import MicroBatchPasses, StepInput
from villa_ds.train.watch import INTERVAL_S

RANK = int(os.environ.get("RANK", "0"))
replace: Callable[[Any, str, Any], None] = setattr  # a test puts one that undoes it in the end


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Have `action` called with the arguments of `owner.name` before it."""
    original = getattr(owner, name)

    def both(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return original(*arguments, **options)

    replace(owner, name, both)


def at_step(place: str, action: Callable[[], None]) -> None:
    """Have `action` called on RANK:STEP in the step, late enough for a heartbeat to tell of it."""
    rank, step = map(int, place.split(":"))

    def act(_: Any, work: StepInput, *__: Any) -> None:
        if (RANK, work.step) == (rank, step):
            time.sleep(1.5 * INTERVAL_S)
            action()

    before(villa_ds.train.loop, "take_step", act)


def bug() -> None:
    raise ZeroDivisionError("a bug in rank-dependent code")


def damage() -> None:
    raise DamageError("shard-000007.tar: bytes are damaged")


def hang_loading(place: str) -> None:
    rank, step = map(int, place.split(":"))
    original = villa_ds.train.loop.training_loader

    class Waiting:
        def __init__(self, loader: Any) -> None:
            self._loader = loader

        def __getattr__(self, name: str) -> Any:
            return getattr(self._loader, name)

        def __iter__(self) -> Iterator[Any]:
            for batches in self._loader:
                if (RANK, batches.step) == (rank, step):
                    time.sleep(3600)
                yield batches

    replace(villa_ds.train.loop, "training_loader", lambda *arguments: Waiting(original(*arguments)))


def nan(steps: str) -> None:
    chosen, original = {int(step) for step in steps.split(",")}, villa_ds.train.loop.take_step

    def take_step(engine: Any, work: Any, *rest: Any) -> Any:
        if RANK == 0 and work.step in chosen:
            broken = dataclasses.replace(work.batches[0], features=work.batches[0].features * float("nan"))
            work = dataclasses.replace(work, batches=(broken, *work.batches[1:]))
        return original(engine, work, *rest)

    replace(villa_ds.train.loop, "take_step", take_step)


def nan_gradient(step: str) -> None:
    def spoil(passes: MicroBatchPasses, scalar: torch.Tensor, **_: Any) -> None:
        if RANK == 0 and passes._work.step == int(step) and scalar.requires_grad:
            scalar.register_hook(lambda gradient: gradient * float("inf"))

    before(MicroBatchPasses, "backward", spoil)


def jump(steps: str) -> None:
    chosen, now = {int(step) for step in steps.split(",")}, [0]
    original = SumTable.peak_loss
    before(villa_ds.train.loop, "take_step", lambda _, work, *__: now.__setitem__(0, work.step))
    replace(SumTable, "peak_loss", lambda self: 1000.0 if RANK == 0 and now[0] in chosen else original(self))


def on_rank_0(step: str, action: Callable[[], None]) -> None:
    """Have `action` called on rank 0 at the beginning of the step."""
    before(
        villa_ds.train.loop, "take_step", lambda _, work, *__: action() if (RANK, work.step) == (0, int(step)) else 0
    )


def fill(place: str) -> None:
    step, path = place.split(":", 1)

    def write() -> None:
        with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
            while file.write(b"x" * 512):
                pass

    on_rank_0(step, write)


def clock(seconds: str) -> None:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (-1) ** calls[0] * float(seconds)

    replace(time, "time", jumping)


KINDS: dict[str, Callable[[str], None]] = {
    "slow": lambda value: before(villa_ds.train.loop, "take_step", lambda *_: time.sleep(float(value))),
    "slow_validation": lambda value: before(
        villa_ds.train.torch_engine.TorchEngine, "probe", lambda *_: time.sleep(float(value))
    ),
    "slow_saving": lambda value: before(villa_ds.train.checkpoint, "_write_share", lambda *_: time.sleep(float(value))),
    "hang": lambda value: at_step(value, lambda: time.sleep(3600)),
    "hang_loading": hang_loading,
    "die": lambda value: at_step(value, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "freeze": lambda value: at_step(value, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "bug": lambda value: at_step(value, bug),
    "damage": lambda value: at_step(value, damage),
    "nan": nan,
    "nan_gradient": nan_gradient,
    "jump": jump,
    "ask": lambda value: on_rank_0(value, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "fill": fill,
    "empty": lambda value: on_rank_0(value.split(":", 1)[0], lambda: os.unlink(value.split(":", 1)[1])),
    "clock": clock,
}


def sabotage(wishes: Sequence[str]) -> None:
    """Make each KIND=VALUE true."""
    for wish in wishes:
        kind, value = wish.split("=", 1)
        KINDS[kind](value)


if __name__ == "__main__":
    split = sys.argv.index("--")
    sabotage(sys.argv[1:split])
    sys.exit(main(sys.argv[split + 1 :]))
