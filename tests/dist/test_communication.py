"""What ZeRO stages send between ranks in an adversarial optimizer step: gradients once, however many passes it has."""

import json

import pytest

from tests.dist.ranks import run_ranks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("variant", ["zero1", "zero2"])
def test_gradients_are_reduced_once_whatever_k_is(variant: str) -> None:
    """Two micro-batches a rank, K passes each; one reduction of every parameter in float32, and some bytes of flags."""
    outputs = run_ranks(2, "benchmarks/zero.py", "--rank-of", variant, "--preset", "uniter-demo", "--steps", "3", "5")
    measured = json.loads(next(output for output in outputs if output).splitlines()[-1])
    counts = measured["collectives"]
    assert counts["plain"] == counts["K=3"] == counts["K=5"]
    reduced, whole = counts["plain"]["bytes"]["all_reduce"], 4 * measured["parameters"]
    assert 0.99 * whole < reduced < whole + 1024  # the mask embedding takes no part


def test_reducing_after_every_pass_is_what_it_saves() -> None:
    """So that the test above would notice if the setting had no effect."""
    run = ("benchmarks/zero.py", "--rank-of", "zero2, every pass", "--preset", "uniter-demo", "--steps", "3")
    measured = json.loads(next(output for output in run_ranks(2, *run) if output).splitlines()[-1])
    reduced = measured["collectives"]["K=3"]["bytes"]["all_reduce"]
    assert reduced > 0.99 * 2 * 3 * 4 * measured["parameters"]
