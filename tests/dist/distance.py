"""How far apart two states of training are."""

from collections.abc import Mapping

from torch import Tensor

from villa_ds.train.parameters import ParameterFiles


def relative_distance(
    kind: str, found: ParameterFiles, expected: ParameterFiles, initial: Mapping[str, Tensor] | None = None
) -> float:
    """||x - ref|| / ||ref|| over all parameters; of their changes since `initial`, if that is given."""
    assert sorted(found.names) == sorted(expected.names)
    difference = size = 0.0
    for name in expected.names:
        base = 0.0 if initial is None else initial[name].detach().double()
        left, right = found.get(kind, name).double() - base, expected.get(kind, name).double() - base
        difference += float((left - right).square().sum())
        size += float(right.square().sum())
    return (difference / size) ** 0.5
