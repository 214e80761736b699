"""Read weights of UNITER, VILLA and BERT by their own key names, and write them back.

The reference's layout is a plain mapping name -> tensor. It differs from ours in two points: query, key and value
projections are three tensors each there, one here; and a head of several parts holds under ``HEAD.beside.PART`` what is
plain ``PART`` there. Names that are read besides: VILLA's prefix ``bert.``, a bare
encoder without prefix, and ``gamma`` / ``beta`` for LayerNorm's weight and bias.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from villa_ds.data.manifest import VOCABULARY_NAME, Vocabulary
from villa_ds.errors import WeightsError
from villa_ds.models.backbone import Backbone
from villa_ds.tensor_files import read_weights

FUSED, PARTS = ".qkv.", (".query.", ".key.", ".value.")
FOREIGN_PREFIXES = ("bert",)  # BERT's, and published VILLA checkpoints'
BESIDE = ".beside."
WORD_BIAS, WORD_DECODER = "cls.predictions.bias", "cls.predictions.decoder.weight"  # one for each word
LEGACY_NAMES = {"gamma": "weight", "beta": "bias"}
_SHOWN = 8  # cases that a refusal names
BERT_FILES = ("model.safetensors", "pytorch_model.bin")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adaptation:
    """How weights of another task are made to fit an objective's model.

    It only adds what the weights lack: weights that were trained for the objective are loaded as they are.
    """

    type_rows: tuple[int, ...] = (0, 1)  # for each row of the token type table the row that it starts from
    new_words: int = 0  # rows at the end of the word table that the weights lack; these keep their initial values
    copied_rows: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # parameter of one row -> (another, row)


@dataclass(frozen=True)
class LoadReport:
    """What did not match, in the reference's names. Everything else was loaded."""

    missing: tuple[str, ...]  # of the model, not among the weights: these keep their values
    unexpected: tuple[str, ...]  # among the weights, unknown to the model: these are left out


def reference_names(name: str) -> tuple[str, ...]:
    """The reference's names of our parameter `name`: three for a joined projection, in row order, otherwise one."""
    name = name.rpartition(BESIDE)[2]
    return tuple(name.replace(FUSED, part) for part in PARTS) if FUSED in name else (name,)


def to_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in the reference's layout: every name, tied ones too, each an independent tensor on the CPU."""
    return {name: view.to("cpu", copy=True) for name, view in _reference_views(state_dict).items()}


def _reference_views(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict by the reference's names; parts of a joined projection are views of it."""
    views: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        names = reference_names(name)
        views.update(zip(names, tensor.detach().chunk(len(names)), strict=True))
    return views


def load_reference(
    module: nn.Module, tensors: Mapping[str, Tensor], adaptations: Sequence[Adaptation] = ()
) -> LoadReport:
    """Copy `tensors` (any of the layouts above) into `module`, a backbone or a module that holds one.

    Of tied parameters one name suffices. What the weights lack is first made as `adaptations` say. A tensor of another
    shape, or tied names with different values, is a `WeightsError`; names on one side only are logged and returned.
    """
    backbone = next(part for part in module.modules() if isinstance(part, Backbone))
    own = _own_views(module, backbone)
    given = _canonical(tensors, backbone)
    for adaptation in adaptations:
        given = _adapted(given, own, adaptation, backbone.prefix)
    shared = [name for name in own if name in given]
    if not shared:
        raise WeightsError(
            f"none of the {len(given)} tensors is one of the model's; are these weights of such a model?"
        )
    differing = [
        f"{name} is {tuple(given[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in shared
        if given[name].shape != own[name].shape
    ]
    if differing:
        raise WeightsError(f"weights do not fit the model: {_listed(differing)}")
    useless = [name for name in shared if not (given[name].is_floating_point() and given[name].isfinite().all())]
    if useless:
        raise WeightsError(
            f"weights hold values that are no finite floating-point numbers in {_listed(useless)}: the file is "
            "damaged, or its training had diverged; take another"
        )
    filled: dict[tuple[int, int], str] = {}
    for name in shared:
        first = filled.setdefault(_place(own[name]), name)
        if not torch.equal(given[first], given[name]):
            raise WeightsError(f"weights hold {first} and {name} with different values, the model ties them")
        own[name].copy_(given[name])
    report = LoadReport(
        tuple(name for name in own if _place(own[name]) not in filled),
        tuple(name for name in given if name not in own),
    )
    _tell(report, len(shared))
    return report


def _own_views(module: nn.Module, backbone: Backbone) -> dict[str, Tensor]:
    """Parameters by the reference's full names, also where `module` is the bare backbone."""
    views = _reference_views(module.state_dict())
    return {f"{backbone.prefix}.{name}": view for name, view in views.items()} if module is backbone else views


def _place(view: Tensor) -> tuple[int, int]:
    """Identity of the memory behind a view: the same for tied names."""
    return view.data_ptr(), view.numel()


def _canonical(tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """`tensors` under the reference's full names."""
    parts = {name for name, _ in backbone.named_children()}
    canonical: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        path.append(LEGACY_NAMES.get(last, last))
        if path[0] in FOREIGN_PREFIXES:
            path[0] = backbone.prefix
        elif path[0] in parts:
            path.insert(0, backbone.prefix)
        full = ".".join(path)
        if full in canonical:
            raise WeightsError(f"weights hold {full[:200]} twice, once as {name[:200]}")
        canonical[full] = tensor
    return canonical


def _adapted(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], adaptation: Adaptation, prefix: str
) -> dict[str, Tensor]:
    """`given` with what `adaptation` adds to it; `own` are the model's parameters, both by the reference's names."""
    adapted = dict(given)
    types, words = f"{prefix}.embeddings.token_type_embeddings.weight", f"{prefix}.embeddings.word_embeddings.weight"
    if types in given and len(given[types]) < len(own[types]) == len(adaptation.type_rows):
        added = list(adaptation.type_rows[len(given[types]) :])
        adapted[types] = torch.cat([given[types], given[types][added]])
        _log.info("%s: %d rows added, copies of %s", types, len(added), added)
    if words in given and 0 < adaptation.new_words == len(own[words]) - len(given[words]):
        # The release makes its masked-language head anew where words are added; here it grows with them.
        for name in (words, WORD_BIAS):
            if name in given and name in own:
                adapted[name] = torch.cat([given[name], own[name][len(given[name]) :].to(given[name].dtype)])
                _log.info("%s: %d rows added, as initialised", name, adaptation.new_words)
        if WORD_DECODER in given:
            adapted[WORD_DECODER] = adapted[words]
    for name, (source, row) in adaptation.copied_rows.items():
        if name in own and name not in given and source in given:
            adapted[name] = given[source][row : row + 1]
            _log.info("%s: row %d of %s", name, row, source)
    return adapted


def _listed(cases: Sequence[str]) -> str:
    more = f"; and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
    return "; ".join(cases[:_SHOWN]) + more


def _tell(report: LoadReport, loaded: int) -> None:
    _log.info("loaded %d tensors", loaded)
    if report.missing:
        _log.info("not among the weights, left as initialised: %s", ", ".join(report.missing))
    if report.unexpected:
        _log.info("among the weights, left out: %s", ", ".join(report.unexpected))


def initialize_from(
    module: nn.Module,
    path: str | Path,
    vocabulary: Vocabulary | None = None,
    adaptations: Sequence[Adaptation] = (),
) -> LoadReport:
    """Load a weights file, or a Hugging Face BERT folder, into `module`; `adaptations` as for `load_reference`.

    With `vocabulary` (the data set's), a BERT folder with another vocabulary is refused: its word embeddings would
    belong to other words.
    """
    path = Path(path)
    if path.is_dir():
        backbone = next(part for part in module.modules() if isinstance(part, Backbone))
        _check_bert(path, backbone, vocabulary)
        for name in BERT_FILES:
            if (path / name).exists():
                return load_reference(module, read_weights(path / name), adaptations)
        raise WeightsError(f"{path}: a BERT folder holds {' or '.join(BERT_FILES)}, this one neither")
    return load_reference(module, read_weights(path), adaptations)


def _check_bert(folder: Path, backbone: Backbone, vocabulary: Vocabulary | None) -> None:
    """Compare what tensor shapes do not show (heads, activation) or show badly (vocabulary)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        words = (folder / VOCABULARY_NAME).read_bytes()
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder}: a BERT folder holds config.json and {VOCABULARY_NAME}: {error}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{folder}/config.json: expected a JSON object, found {type(config).__name__}")
    sizes = backbone.sizes
    wanted = {
        "vocab_size": sizes.vocabulary_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "intermediate_size": sizes.intermediate_size,
        "hidden_act": "gelu",
    }
    for key, value in wanted.items():
        if config.get(key) != value:
            found = repr(config.get(key))[:80]
            raise WeightsError(f"{folder}/config.json: {key} is {found}, the model's is {value!r}")
    count = len(words.splitlines())
    if count != sizes.vocabulary_size:
        raise WeightsError(f"{folder}/{VOCABULARY_NAME}: {count} word pieces, the model has {sizes.vocabulary_size}")
    if vocabulary is not None and hashlib.sha256(words).hexdigest() != vocabulary.sha256:
        raise WeightsError(
            f"{folder}/{VOCABULARY_NAME}: not the vocabulary of the shards; convert the data with this one, or start "
            "from weights that were trained with the shards' vocabulary"
        )
