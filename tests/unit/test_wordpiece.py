import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from villa_ds.data.manifest import SPECIAL_PIECES, Vocabulary
from villa_ds.data.wordpiece import WordPieces
from villa_ds.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "lmdb"
SPECIALS = tuple(SPECIAL_PIECES.values())
TEXTS = ["what color is the circle?", "the circle is red", "is there a red circle?", "no blue circle", "what is blue?"]


@pytest.fixture(scope="module")
def uncased() -> WordPieces:
    return WordPieces([*SPECIALS, "!", "red", "cir", "##cle", "cafe", "?"])


def test_encoding_equals_the_released_preparation():
    word_pieces = WordPieces.load(GOLDEN / "tiny-cased" / "vocab.txt", lowercase=False)
    expected = json.loads((GOLDEN / "expected.json").read_text())["txt_db"]["nlvr2"]
    sentences = {
        record["identifier"]: record["sentence"]
        for record in map(json.loads, (GOLDEN / "annotations" / "nlvr2_dev.json").read_text().splitlines())
    }
    for record in expected["records"].values():
        assert word_pieces.encode(record["sentence"]) == record["input_ids"]
    for identifier, length in expected["id2len_sample"].items():
        assert len(word_pieces.encode(sentences[identifier])) == length
    vocabulary, meta = word_pieces.vocabulary, expected["meta"]
    assert (vocabulary.unk, vocabulary.cls, vocabulary.sep, vocabulary.mask) == tuple(
        meta[name] for name in ("UNK", "CLS", "SEP", "MASK")
    )
    assert [vocabulary.random_low, vocabulary.size] == meta["v_range"]


def test_each_word_is_encoded_by_itself_and_empty_words_are_dropped(uncased):
    assert uncased.encode("  Red\tCIRCLE? café \x00 green ") == [6, 7, 8, 10, 9, 1]
    assert uncased.encode("\x00 ") == []


def test_specials_written_in_a_text_are_ordinary_characters(uncased):
    assert uncased.encode("[MASK]") == [1, 1, 1]


def test_capital_letters_in_the_vocabulary_keep_the_case():
    cased = WordPieces([*SPECIALS, "Red", "red"])
    assert cased.encode("Red red RED") == [5, 6, 1]


def test_vocabulary_record(uncased):
    text = "".join(f"{piece}\n" for piece in uncased.pieces)
    assert uncased.vocabulary == Vocabulary(
        size=11, sha256=hashlib.sha256(text.encode()).hexdigest(), pad=0, unk=1, cls=2, sep=3, mask=4, random_low=5
    )
    assert WordPieces([*SPECIALS, "a"]).vocabulary.random_low == 5
    assert WordPieces(["[PAD]", "x", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]).vocabulary.random_low == 1


def test_save_and_load_keep_every_byte(uncased, tmp_path):
    odd = WordPieces([*uncased.pieces, "\x85", " "])  # line ends to Python, pieces to BERT's multilingual file
    path = odd.save(tmp_path)
    assert WordPieces.load(path).pieces == odd.pieces
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert WordPieces.load(path).vocabulary == odd.vocabulary


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"], r"\[MASK\] missing"),
        (["a", *SPECIALS], r"\[PAD\] is id 1"),
        ([*SPECIALS, "a", "b", "a"], "'a' occurs twice"),
        ([*SPECIALS, "", "b"], "'' is not a word piece"),
    ],
)
def test_wrong_vocabularies_are_refused(pieces, message, tmp_path):
    with pytest.raises(DataError, match=message):
        WordPieces(pieces)
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces))
    with pytest.raises(DataError, match=f"vocab.txt: .*{message}"):
        WordPieces.load(path)


def test_missing_vocabulary_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"vocab\.txt: cannot read the vocabulary"):
        WordPieces.load(tmp_path / "vocab.txt")


def test_training_learns_frequent_words_after_the_specials_and_characters():
    word_pieces = WordPieces.train(TEXTS, 200)
    assert word_pieces.pieces[:6] == (*SPECIALS, "?")
    assert "##?" not in word_pieces.pieces  # punctuation stands alone
    assert {"circle", "red", "blue", "what", "##e"} <= set(word_pieces.pieces)
    assert [word_pieces.pieces[piece] for piece in word_pieces.encode("Blue circle?")] == ["blue", "circle", "?"]
    assert len(WordPieces.train(TEXTS, 45).pieces) == 45


def test_training_refuses_a_size_below_the_alphabet():
    with pytest.raises(DataError, match="vocabulary size 10 is below"):
        WordPieces.train(TEXTS, 10)


def test_training_does_not_depend_on_the_process():
    """The trainer's own hash tables are seeded anew in each process."""
    program = (
        f"from villa_ds.data.wordpiece import WordPieces; print(WordPieces.train({TEXTS!r}, 45).vocabulary.sha256)"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert {run.stdout.strip() for run in runs} == {WordPieces.train(TEXTS, 45).vocabulary.sha256}
