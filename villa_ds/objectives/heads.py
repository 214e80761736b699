"""The head that several downstream tasks share."""

from torch import nn

from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize, make_layer_norm


def two_layer_head(backbone: Backbone, inner: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    """Linear, `activation`, LayerNorm, Linear: states [..., H] to [..., `outputs`] through `inner` units."""
    head = nn.Sequential(
        nn.Linear(backbone.hidden_size, inner),
        activation,
        make_layer_norm(inner, backbone.sizes.fused_layer_norm),
        nn.Linear(inner, outputs),
    )
    initialize(head, backbone.initializer_range)
    return head
