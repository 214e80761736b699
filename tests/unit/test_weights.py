"""Weights by the reference's names: every layout that is read, and what is refused."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.tiny import VOCABULARY, tiny_module
from villa_ds.errors import WeightsError
from villa_ds.models.uniter import UniterBackbone
from villa_ds.models.weights import (
    Adaptation,
    initialize_from,
    load_reference,
    reference_names,
    to_reference,
)
from villa_ds.tensor_files import read_weights, write_weights
from villa_ds.train.module import TrainModule

Weights = dict[str, Tensor]
PRETRAINING = ("mlm", "mrfr", "mrckl", "itm")


def fresh(*names: str, seed: int = 0) -> TrainModule:
    return tiny_module(*names, dtype=torch.float32, seed=seed)


def weights(*names: str, seed: int = 1) -> Weights:
    """Reference weights of a model with these objectives, none of them a fresh model's zeros or ones."""
    source = fresh(*names, seed=seed)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    return to_reference(source.state_dict())


def assert_holds(module: nn.Module, expected: Weights) -> None:
    written = to_reference(module.state_dict())
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=0, msg=name)


def test_joined_projections_have_three_names() -> None:
    assert reference_names("uniter.encoder.layer.3.attention.self.qkv.bias") == tuple(
        f"uniter.encoder.layer.3.attention.self.{part}.bias" for part in ("query", "key", "value")
    )
    assert reference_names("cls.predictions.bias") == ("cls.predictions.bias",)


def test_reference_layout_of_a_module() -> None:
    module = fresh(*PRETRAINING)
    written = to_reference(module.state_dict())
    projection = "uniter.encoder.layer.1.attention.self"
    stacked = torch.cat([written[f"{projection}.{part}.weight"] for part in ("query", "key", "value")])
    torch.testing.assert_close(stacked, module.state_dict()[f"{projection}.qkv.weight"], rtol=0, atol=0)
    assert not any("qkv" in name for name in written)
    assert "cls.predictions.decoder.weight" in written
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for tensor in written.values():  # independent copies: tied names and parts of a projection too
        tensor.zero_()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def as_is(name: str) -> str:
    return name


def villa(name: str) -> str:
    return name.replace("uniter.", "bert.")


def tensorflow_names(name: str) -> str:
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("rename", [as_is, villa, tensorflow_names])
def test_layouts_that_are_read(rename: Callable[[str], str]) -> None:
    source, module = weights(*PRETRAINING), fresh(*PRETRAINING)
    report = load_reference(module, {rename(name): value for name, value in source.items()})
    assert report.missing == report.unexpected == ()
    assert_holds(module, source)


def test_bare_encoder_into_a_module_and_back() -> None:
    source, module = weights("vqa"), fresh("vqa")
    encoder = {name.removeprefix("uniter."): value for name, value in source.items() if name.startswith("uniter.")}
    report = load_reference(module, encoder)
    assert all(name.startswith("vqa_output.") for name in report.missing)
    assert len(report.missing) == 6
    assert report.unexpected == ()
    assert_holds(module.backbone, encoder)
    other = fresh("vqa", seed=5).backbone
    assert load_reference(other, source).missing == ()
    assert_holds(other, encoder)


def test_another_head_s_weights_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    source, module = weights("itm", "mrfr"), fresh("itm", "vqa")
    before = module.get_parameter("vqa_output.0.weight").detach().clone()
    with caplog.at_level(logging.INFO):
        report = load_reference(module, source)
    assert report.missing == tuple(f"vqa_output.{layer}.{name}" for layer in (0, 2, 3) for name in ("weight", "bias"))
    assert set(report.unexpected) == {name for name in source if name.startswith("feat_regress")}
    for name in (*report.missing, *report.unexpected):
        assert name in caplog.text
    torch.testing.assert_close(module.get_parameter("vqa_output.0.weight"), before, rtol=0, atol=0)


def test_one_name_of_tied_parameters_suffices() -> None:
    for left_out in ("cls.predictions.decoder.weight", "uniter.embeddings.word_embeddings.weight"):
        source, module = weights("mlm"), fresh("mlm")
        partial = {name: value for name, value in source.items() if name != left_out}
        assert load_reference(module, partial).missing == ()
        assert_holds(module, source)


def test_tied_names_must_agree() -> None:
    source = weights("mlm")
    source["cls.predictions.decoder.weight"] = source["cls.predictions.decoder.weight"] + 1
    with pytest.raises(WeightsError, match=r"word_embeddings\.weight and cls\.predictions\.decoder\.weight"):
        load_reference(fresh("mlm"), source)


def test_part_of_a_projection_is_reported_and_loaded() -> None:
    source, module = weights("itm"), fresh("itm")
    key = "uniter.encoder.layer.0.attention.self.key.weight"
    before = to_reference(module.state_dict())[key]
    report = load_reference(module, {name: value for name, value in source.items() if name != key})
    assert report.missing == (key,)
    assert_holds(module, {**source, key: before})


def test_the_same_tensor_twice_is_refused() -> None:
    source = weights("itm")
    source["bert.pooler.dense.bias"] = source["uniter.pooler.dense.bias"]
    with pytest.raises(WeightsError, match=r"hold uniter\.pooler\.dense\.bias twice, once as bert\.pooler"):
        load_reference(fresh("itm"), source)


def test_shape_mismatch_names_the_tensor_and_both_shapes() -> None:
    source, module = weights("itm"), fresh("itm")
    before = to_reference(module.state_dict())
    source["uniter.encoder.layer.0.attention.self.value.bias"] = torch.zeros(17)
    source["uniter.embeddings.position_embeddings.weight"] = torch.zeros(512, 16)
    message = (
        r"position_embeddings\.weight is \(512, 16\), the model's is \(20, 16\); "
        r".*self\.value\.bias is \(17,\), the model's is \(16,\)"
    )
    with pytest.raises(WeightsError, match=message):
        load_reference(module, source)
    assert_holds(module, before)  # nothing was loaded


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.full((16,), float("nan")), "self.value.bias"),
        (torch.full((16,), float("inf"), dtype=torch.float16), "self.value.bias"),
        (torch.zeros(16, dtype=torch.int64), "self.value.bias"),
        (torch.zeros(16, dtype=torch.complex64), "self.value.bias"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(value: Tensor, found: str) -> None:
    source, module = weights("itm"), fresh("itm")
    before = to_reference(module.state_dict())
    source["uniter.encoder.layer.0.attention.self.value.bias"] = value
    with pytest.raises(WeightsError, match=rf"no finite floating-point numbers in uniter\..*{found}: the file is dam"):
        load_reference(module, source)
    assert_holds(module, before)


def test_weights_without_one_tensor_of_the_model_are_refused() -> None:
    with pytest.raises(WeightsError, match="none of the 2 tensors is one of the model's"):
        load_reference(fresh("itm"), {"a": torch.zeros(1), "b.c": torch.zeros(2)})


def test_a_refusal_names_some_cases_and_counts_the_others() -> None:
    source = {name: torch.zeros(1, 1, 1) for name in weights("mlm")}
    with pytest.raises(WeightsError, match=r"\(1, 1, 1\).*; and \d+ more$") as caught:
        load_reference(fresh("mlm"), source)
    assert str(caught.value).count("(1, 1, 1)") == 8


def grown(types: int, words: int, *names: str) -> TrainModule:
    """A tiny model with so many token types and so many words more than `weights` has."""
    sizes = fresh().backbone.sizes
    sizes = replace(sizes, type_vocab_size=types, vocabulary_size=sizes.vocabulary_size + words)
    torch.manual_seed(0)
    return TrainModule(UniterBackbone(sizes), fresh(*names).objectives.values())


def test_tables_grow_as_the_objective_says() -> None:
    source, module = weights("mlm"), grown(4, 3, "mlm")
    before = to_reference(module.state_dict())
    report = load_reference(module, source, [Adaptation(), Adaptation(type_rows=(0, 1, 0, 0), new_words=3)])
    types, words = (source[f"uniter.embeddings.{name}_embeddings.weight"] for name in ("token_type", "word"))
    own = before["uniter.embeddings.word_embeddings.weight"][-3:]
    assert report.missing == ()
    expected, bias = dict(source), "cls.predictions.bias"  # the release makes this head anew; here it grows
    expected[bias] = torch.cat([source[bias], before[bias][-3:]])
    expected["uniter.embeddings.token_type_embeddings.weight"] = torch.cat([types, types[:1], types[:1]])
    for name in ("uniter.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"):
        expected[name] = torch.cat([words, own])
    assert_holds(module, expected)
    again = grown(4, 3, "mlm")  # weights that lack nothing are loaded as they are
    assert load_reference(again, to_reference(module.state_dict()), [Adaptation((0, 1, 0, 0), 3)]).missing == ()
    assert_holds(again, to_reference(module.state_dict()))


def test_a_third_type_starts_as_the_second() -> None:
    source, module = weights(), grown(3, 0)
    load_reference(module, source, [Adaptation(type_rows=(0, 1, 1))])
    types = source["uniter.embeddings.token_type_embeddings.weight"]
    assert_holds(module, {"uniter.embeddings.token_type_embeddings.weight": torch.cat([types, types[1:]])})


@pytest.mark.parametrize(("types", "words"), [(3, 0), (4, 2), (2, 3)])
def test_tables_grow_by_no_other_number(types: int, words: int) -> None:
    with pytest.raises(WeightsError, match=r"weights do not fit the model: .*embeddings\.weight"):
        load_reference(grown(types, words), weights(), [Adaptation(type_rows=(0, 1, 0, 0), new_words=4)])


def test_other_types_are_converted() -> None:
    source, module = weights("itm"), fresh("itm")
    load_reference(module, {name: value.to(torch.float64) for name, value in source.items()})
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert_holds(module, source)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    source, module = weights(*PRETRAINING), fresh(*PRETRAINING)
    path = tmp_path / f"weights{suffix}"
    write_weights(path, source)
    stored = read_weights(path)
    assert set(stored) == set(source)
    assert initialize_from(module, path).missing == ()
    assert_holds(module, source)


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self._path),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"weight": Payload(trap)}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"weights\.pt: cannot read the weights"):
        read_weights(tmp_path / "weights.pt")
    assert not trap.exists()


def zip_of_names(name: bytes) -> bytes:
    """A .pt whose archive holds a file of this name."""
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, stream)
    return stream.getvalue().replace(b"byteorder", name)


DAMAGED = {
    "empty.pt": b"",
    "half.pt": b"\x80\x02",
    "nonsense.pt": zip_of_names(b"\xff\xfe\xffeorder"),
    "endless.safetensors": (2**63).to_bytes(8, "little") + b"{}",
    "nested.safetensors": (100_000).to_bytes(8, "little") + b"[" * 100_000,
}


def test_unreadable_files(tmp_path: Path) -> None:
    for name in ("absent.safetensors", "absent.pt"):
        with pytest.raises(WeightsError, match=rf"{name}: cannot read the weights"):
            read_weights(tmp_path / name)
    for name in ("torn.safetensors", "torn.pt"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(WeightsError, match=rf"{name}: cannot read the weights"):
            read_weights(tmp_path / name)
    for name, content in DAMAGED.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{name}: cannot read the weights: .") as caught:
            read_weights(tmp_path / name)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))
    torch.save({"model": {"weight": torch.zeros(1)}, "step": 3}, tmp_path / "wrapped.pt")
    with pytest.raises(WeightsError, match="a plain mapping of names to tensors"):
        read_weights(tmp_path / "wrapped.pt")
    for act in (read_weights, lambda path: write_weights(path, {})):
        with pytest.raises(WeightsError, match=r"\.safetensors"):
            act(tmp_path / "weights.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_written_into_a_new_folder_or_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"weights{suffix}"
    write_weights(path, {"weight": torch.ones(2)})
    assert read_weights(path)["weight"].tolist() == [1.0, 1.0]
    taken = tmp_path / f"taken{suffix}"
    taken.mkdir()
    with pytest.raises(WeightsError, match=rf"taken{suffix}: cannot be written: .") as caught:
        write_weights(taken, {"weight": torch.ones(2)})
    assert "\n" not in str(caught.value)


def bert_folder(folder: Path, file: str) -> Weights:
    """A Hugging Face BERT folder of the tiny sizes; returns its weights by the reference's names."""
    own = {
        name: value
        for name, value in weights("mlm").items()
        if "img_embeddings" not in name and name != "cls.predictions.decoder.weight"
    }
    tensors = {tensorflow_names(villa(name)): value for name, value in own.items()}
    tensors["cls.seq_relationship.weight"] = torch.zeros(2, 16)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        safetensors.torch.save_file(tensors, folder / file)
    config = {
        "vocab_size": VOCABULARY.size,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "hidden_act": "gelu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"piece{number}\n" for number in range(VOCABULARY.size)))
    return own


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_bert_folder(tmp_path: Path, file: str) -> None:
    source, module = bert_folder(tmp_path, file), fresh("mlm", "itm")
    regions = to_reference(module.backbone.get_submodule("img_embeddings").state_dict())
    words = hashlib.sha256((tmp_path / "vocab.txt").read_bytes()).hexdigest()
    report = initialize_from(module, tmp_path, vocabulary=replace(VOCABULARY, sha256=words))
    assert report.unexpected == ("cls.seq_relationship.weight",)
    assert {name.split(".")[1] for name in report.missing if name.startswith("uniter.")} == {"img_embeddings"}
    assert {name for name in report.missing if not name.startswith("uniter.")} == {
        "itm_output.weight",
        "itm_output.bias",
    }
    assert_holds(module, source)
    assert_holds(module.backbone.get_submodule("img_embeddings"), regions)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 4), ("num_hidden_layers", 3), ("hidden_act", "relu"), ("vocab_size", 51)],
)
def test_bert_folder_of_another_model(tmp_path: Path, key: str, value: object) -> None:
    bert_folder(tmp_path, "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(WeightsError, match=rf"config\.json: {key} is {value!r}, the model's is"):
        initialize_from(fresh("mlm"), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "a BERT folder holds config.json and vocab.txt: maximum recursion"),
        ("[1]", "config.json: expected a JSON object, found list"),
        ('{"vocab_size": "' + "x" * 5000 + '"}', "config.json: vocab_size is 'xxx"),
    ],
)
def test_bert_folder_with_a_damaged_configuration(tmp_path: Path, content: str, message: str) -> None:
    bert_folder(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError) as caught:
        initialize_from(fresh("mlm"), tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_bert_folder_with_another_vocabulary(tmp_path: Path) -> None:
    module: TrainModule = fresh("mlm")
    bert_folder(tmp_path, "model.safetensors")
    with pytest.raises(WeightsError, match=r"vocab\.txt: not the vocabulary of the shards"):
        initialize_from(module, tmp_path, vocabulary=replace(VOCABULARY, sha256="another"))
    (tmp_path / "vocab.txt").write_text("piece\n" * 49)
    with pytest.raises(WeightsError, match=r"vocab\.txt: 49 word pieces, the model has 50"):
        initialize_from(module, tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(WeightsError, match=r"holds config\.json and vocab\.txt"):
        initialize_from(module, tmp_path)


def test_bert_folder_without_weights(tmp_path: Path) -> None:
    bert_folder(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds model\.safetensors or pytorch_model\.bin"):
        initialize_from(fresh("mlm"), tmp_path)
