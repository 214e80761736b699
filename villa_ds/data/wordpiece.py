"""Word pieces: any BERT `vocab.txt`, or a vocabulary trained on texts, and UNITER's way to encode."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from villa_ds.data.manifest import SPECIAL_PIECES, VOCABULARY_NAME, Vocabulary, vocabulary_bytes
from villa_ds.errors import DataError
from villa_ds.files import replace_file

_UNKNOWN = SPECIAL_PIECES["unk"]
_PREFIX = "##"  # marks a piece that continues a word
_BEFORE_MARK = re.compile(r" ([?!.,;:])")
_MAX_WORD = 100  # characters; BERT's own limit, beyond which a word is [UNK]


class WordPieces:
    """A word-piece vocabulary and its encoder."""

    def __init__(self, pieces: Sequence[str], lowercase: bool | None = None) -> None:
        """`pieces` in the order of their ids. DataError if they are no BERT vocabulary.

        `lowercase` texts are also stripped of accents, as BERT's uncased models want it; None: if no piece has a
        capital letter.
        """
        self.pieces = tuple(pieces)
        self.vocabulary = Vocabulary.of(self.pieces)
        ids = {piece: position for position, piece in enumerate(self.pieces)}
        if lowercase is None:
            lowercase = all(piece == piece.lower() for piece in self.pieces if piece not in SPECIAL_PIECES.values())
        self._tokenizer = Tokenizer(
            WordPiece(ids, unk_token=_UNKNOWN, max_input_chars_per_word=_MAX_WORD, continuing_subword_prefix=_PREFIX)
        )
        self._tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    @staticmethod
    def load(path: str | Path, lowercase: bool | None = None) -> "WordPieces":
        """Read a BERT `vocab.txt`, cased or uncased: one piece a line, the line number its id."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot read the vocabulary: {error}") from None
        # Not splitlines(): multilingual vocabularies hold pieces that Python takes for line ends.
        lines = text.replace("\r\n", "\n").split("\n")
        try:
            return WordPieces(lines[:-1] if lines[-1] == "" else lines, lowercase)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    @staticmethod
    def train(texts: Iterable[str], size: int) -> "WordPieces":
        """Learn an uncased vocabulary of at most `size` pieces: the specials, all characters, then merges.

        The same texts give the same pieces and ids in every process.
        """
        kept = list(texts)
        normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
        words = {word for text in kept for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
        alphabet = sorted({character for word in words for character in word})
        continuing = sorted({character for word in words for character in word[1:]})
        # The trainer numbers continuing characters in the order of a randomly seeded hash table and breaks ties between
        # merges by these numbers (huggingface/tokenizers #1794). Named beforehand, none is left to number by chance.
        named = [*SPECIAL_PIECES.values(), *alphabet, *(f"{_PREFIX}{character}" for character in continuing)]
        if len(named) > size:
            raise DataError(f"vocabulary size {size} is below the {len(named)} specials and characters of the texts")
        tokenizer = Tokenizer(WordPiece(unk_token=_UNKNOWN))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        trainer = WordPieceTrainer(
            vocab_size=size,
            min_frequency=2,
            show_progress=False,
            special_tokens=named,
            continuing_subword_prefix=_PREFIX,
        )
        tokenizer.train_from_iterator(kept, trainer)
        ids = tokenizer.get_vocab()
        return WordPieces(sorted(ids, key=ids.__getitem__))

    def encode(self, text: str) -> list[int]:
        """Ids of a text as UNITER's preparation makes them: split on white space, word-piece each word.

        Words that give nothing (control characters) are dropped. No specials are added; "[MASK]" or "[SEP]" written
        in a text are ordinary characters here.
        """
        ids: list[int] = self._tokenizer.encode(text.split(), is_pretokenized=True, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The words of a text, as far as its pieces tell: no space before a closing mark, capitals as the pieces."""
        joined = " ".join(self.pieces[piece] for piece in ids).replace(f" {_PREFIX}", "")
        return _BEFORE_MARK.sub(r"\1", joined)

    def save(self, folder: str | Path) -> Path:
        """Write `vocab.txt` into `folder`; returns its path."""
        path = Path(folder) / VOCABULARY_NAME
        replace_file(path, vocabulary_bytes(self.pieces))
        return path
