"""The UNITER backbone and the sizes it is built from."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.unit.pairs import batch_of_lengths, sizes_of
from villa_ds.batch import Batch, Embeddings, Encoded, Reads
from villa_ds.config import ModelConfig
from villa_ds.errors import ConfigError
from villa_ds.models.backbone import builder_of
from villa_ds.models.presets import PRESETS, resolve_sizes
from villa_ds.models.uniter import UniterBackbone

DTYPE = torch.float64


def backbone(dropout: float = 0.0, seed: int = 0) -> UniterBackbone:
    torch.manual_seed(seed)
    made = UniterBackbone(sizes_of(dropout))
    for parameter in made.parameters():  # away from 0 and 1, so that no bias or norm can be left out
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return made.to(DTYPE)


def run(model: UniterBackbone, batch: Batch) -> Encoded:
    return model.encode(model.embed(batch), batch)


def pooled(model: UniterBackbone, batch: Batch) -> Tensor:
    result = run(model, batch).pooled
    assert result is not None
    return result


def weighted(states: Tensor) -> Tensor:
    """A scalar that every entry matters to."""
    return (states * torch.linspace(-1, 1, states.numel(), dtype=DTYPE).view_as(states)).sum()


def parameter_gradients(model: UniterBackbone, value: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(model.parameters(), found, strict=True)
    ]


def test_pooled_alone_equals_the_full_computation() -> None:
    model, batch = backbone(), batch_of_lengths(dtype=DTYPE)
    alone, full = pooled(model, dataclasses.replace(batch, reads=Reads.POOLED)), pooled(model, batch)
    torch.testing.assert_close(alone, full)
    torch.testing.assert_close(parameter_gradients(model, weighted(alone)), parameter_gradients(model, weighted(full)))


def test_read_slots_alone_equal_the_full_computation() -> None:
    model, batch = backbone(), batch_of_lengths(dtype=DTYPE)
    text = batch.input_ids.shape[1]
    slots = torch.tensor([[1, 4, text + 1], [2, 0, 0], [text, text + 3, 0]])  # 3, 1 and 2 real ones
    packed = torch.tensor([0, 1, 2, 3, 6, 7])
    some = run(model, dataclasses.replace(batch, reads=Reads.SLOTS, read_slots=slots, read_packed=packed))
    assert some.pooled is None
    rows = torch.arange(3)[:, None].expand_as(slots).flatten()[packed]
    full = run(model, batch).states[rows, slots.flatten()[packed]]
    torch.testing.assert_close(some.states, full)
    torch.testing.assert_close(
        parameter_gradients(model, weighted(some.states)), parameter_gradients(model, weighted(full))
    )


def test_last_layer_computes_only_what_is_read() -> None:
    model, lengths = backbone(), []
    model.encoder.layer[-1].register_forward_hook(lambda *call: lengths.append(call[-1].shape[1]))
    batch = batch_of_lengths(dtype=DTYPE)
    run(model, dataclasses.replace(batch, reads=Reads.POOLED))
    run(model, dataclasses.replace(batch, reads=Reads.SLOTS, read_slots=torch.ones(3, 2, dtype=torch.int64),
                                   read_packed=torch.arange(6)))  # fmt: skip
    run(model, batch)
    assert lengths == [1, 2, batch.joint_length]


def test_a_row_s_states_do_not_depend_on_its_batch() -> None:
    model, together = backbone(), batch_of_lengths(dtype=DTYPE)
    both = run(model, together)
    text = together.input_ids.shape[1]
    for row, (length, count) in enumerate(zip(together.text_lengths, together.region_counts, strict=True)):
        alone = dataclasses.replace(
            together,
            ids=together.ids[row : row + 1],
            input_ids=together.input_ids[row : row + 1, :length],
            token_types=together.token_types[row : row + 1, :length],
            text_lengths=together.text_lengths[row : row + 1],
            features=together.features[row : row + 1, :count],
            boxes=together.boxes[row : row + 1, :count],
            region_types=together.region_types[row : row + 1, :count],
            region_counts=together.region_counts[row : row + 1],
            joint_length=int(length + count),
        )
        states = run(model, alone).states[0]
        torch.testing.assert_close(both.states[row, :length], states[:length])
        torch.testing.assert_close(both.states[row, text : text + count], states[length:])
        assert not both.states[row, length:text].any()
        assert not both.states[row, text + count :].any()


@pytest.mark.parametrize(("text", "regions"), [((6, 3, 4), (0, 0, 0)), ((0, 0, 0), (2, 5, 4))])
@pytest.mark.parametrize("reads", [Reads.ALL, Reads.POOLED])
def test_one_modality_alone(text: tuple[int, ...], regions: tuple[int, ...], reads: Reads) -> None:
    model, batch = backbone(), batch_of_lengths(text, regions, reads, dtype=DTYPE)
    result = pooled(model, batch)
    gradients = dict(zip(dict(model.named_parameters()), parameter_gradients(model, weighted(result)), strict=True))
    used, unused = "embeddings.word_embeddings.weight", "img_embeddings.img_linear.weight"
    if not sum(text):
        used, unused = unused, used
    assert result.isfinite().all()
    assert gradients[used].any()
    assert not gradients[unused].any()


def test_dropout_follows_the_default_generator() -> None:
    model, batch = backbone(dropout=0.4), batch_of_lengths(dtype=DTYPE)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return pooled(model, batch)

    torch.testing.assert_close(seeded(1), seeded(1), rtol=0, atol=0)
    assert not torch.allclose(seeded(1), seeded(2))
    model.eval()
    torch.testing.assert_close(seeded(1), seeded(2), rtol=0, atol=0)


def test_states_are_dropped_after_both_embeddings_and_in_both_halves_of_a_layer() -> None:
    model, called = backbone(dropout=0.4), []
    for name, part in model.named_modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda *_, name=name: called.append(name))
            assert part.p == 0.4
    pooled(model, batch_of_lengths(dtype=DTYPE))
    assert called == [
        "embeddings.dropout",
        "img_embeddings.dropout",
        *(f"encoder.layer.{index}.{half}.dropout" for index in range(2) for half in ("attention.output", "output")),
    ]


def test_mask_embedding_is_row_one_alone() -> None:
    model = backbone()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2] = mask[2, 0] = True
    plain = batch_of_lengths(dtype=DTYPE)
    batch = dataclasses.replace(plain, features=plain.features * ~mask[..., None], region_mask=mask)
    table = model.img_embeddings.mask_embedding.weight
    before = table.detach().clone()
    assert before[0].abs().min() > 0

    features = model.embed(batch).regions
    torch.testing.assert_close(features, batch.features + mask[..., None] * before[1])
    weighted(pooled(model, batch)).backward()
    torch.testing.assert_close(table.detach(), before, rtol=0, atol=0)
    assert table.grad is not None
    assert not table.grad[0].any()
    assert table.grad[1].all()


def test_padding_word_gets_no_gradient_by_lookup() -> None:
    model, batch = backbone(), batch_of_lengths(dtype=DTYPE)
    batch.input_ids[1, 1] = 0  # even where it stands for a real token
    weighted(run(model, batch).states).backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[batch.input_ids[0]].any(dim=1).all()


def test_seam_gets_no_gradient_at_padding() -> None:
    model, batch = backbone(), batch_of_lengths(dtype=DTYPE)
    seam = model.embed(batch)
    leaves = Embeddings(seam.text.detach().requires_grad_(), seam.regions.detach().requires_grad_())
    weighted(model.encode(leaves, batch).states).backward()
    for leaf, valid in ((leaves.text, batch.text_valid), (leaves.regions, batch.region_valid)):
        assert leaf.grad is not None
        assert not leaf.grad[~valid].any()
        assert leaf.grad[valid].any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_model_keeps_the_embeddings_in_float32(dtype: torch.dtype) -> None:
    model = backbone().to(dtype)
    batch = batch_of_lengths(dtype=torch.float16)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for part in (model.embeddings.LayerNorm, model.img_embeddings.img_linear, model.img_embeddings.LayerNorm):
        part.register_forward_hook(lambda _, given, output: seen.append((given[0].dtype, output.dtype)))
    seam = model.embed(batch)
    assert seam.text.dtype == seam.regions.dtype == torch.float32
    encoded = model.encode(seam, batch)
    assert seen == [(torch.float32, torch.float32)] * 3
    assert encoded.states.dtype == dtype
    # A step far below 16 bits' resolution survives up to the encoder.
    small = torch.full_like(seam.regions, 1e-5)
    projection = model.img_embeddings.img_linear
    assert not torch.equal(projection(seam.regions + small), projection(seam.regions))


def test_building_is_deterministic_under_the_seed() -> None:
    first, second, other = backbone(seed=1), backbone(seed=1), backbone(seed=2)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=0, atol=0)
    assert not torch.equal(first.word_embedding, other.word_embedding)


def test_fresh_parameters() -> None:
    torch.manual_seed(0)
    model = UniterBackbone(sizes_of())
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "LayerNorm.weight" in name or "layer_norm.weight" in name:
            assert (value == 1).all(), name
        elif value.numel() > 100:
            assert value.std().item() == pytest.approx(0.02, rel=0.25), name


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.max_position_embeddings: 10 is too small for a text of 11 tokens"):
        backbone().embed(batch_of_lengths((11,), (2,), dtype=DTYPE))


def test_registry() -> None:
    assert builder_of("uniter") is UniterBackbone
    with pytest.raises(ConfigError, match=r"model\.backbone: 'unter' is not one of .*uniter"):
        builder_of("unter")


def test_presets_resolve_and_are_overridden() -> None:
    for name in PRESETS:
        resolved = resolve_sizes(ModelConfig(preset=name), 100, 8)
        assert (resolved.vocabulary_size, resolved.feature_width) == (100, 8)
        assert resolved.hidden_dropout_prob == resolved.attention_probs_dropout_prob == 0.1
    large = resolve_sizes(ModelConfig(preset="uniter-large", num_hidden_layers=3, hidden_dropout_prob=0.0), 100, 8)
    assert (large.hidden_size, large.num_hidden_layers, large.hidden_dropout_prob) == (1024, 3, 0.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(), r"model\.hidden_size: missing; give it a value, or name a model\.preset"),
        (ModelConfig(preset="uniter-huge"), r"model\.preset: 'uniter-huge' is not one of uniter-base, .*"),
        (ModelConfig(preset="uniter-demo", num_attention_heads=3), r"model\.num_attention_heads: 3 heads"),
        (ModelConfig(preset="uniter-demo", num_hidden_layers=0), r"model\.num_hidden_layers: 0 does not do"),
        (ModelConfig(preset="uniter-demo", initializer_range=-1.0), r"model\.initializer_range: -1\.0 does not do"),
        (ModelConfig(preset="uniter-demo", hidden_dropout_prob=1.0), r"model\.hidden_dropout_prob: 1\.0 does not do"),
    ],
)
def test_wrong_sizes_name_their_key(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_sizes(config, 100, 8)
