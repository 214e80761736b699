"""`villa-ds shards demo`: shard sets from the 5,000 images and 48,248 questions of the PyPI package `easy-vqa`.

    OUT/pretrain/{train,validation}       statements derived from questions and answers
    OUT/vqa/{train,validation,test}       questions with their answers
    OUT/extractor.npz                     what found the regions, for new images

The package's test images are in vqa/test and nowhere else. Every tenth of its training images is held out, the same
ones from pretrain/train and vqa/train. Word pieces and detector classes come from the training images alone.
"""

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from villa_ds.data.convert.extractor import ExtractedRegions, RegionExtractor, read_picture
from villa_ds.data.convert.regions import FILE_NAME, PixelRegionExtractor
from villa_ds.data.convert.statements import facts_of, statements_of
from villa_ds.data.manifest import Manifest
from villa_ds.data.processes import in_order
from villa_ds.data.progress import with_progress
from villa_ds.data.wordpiece import WordPieces
from villa_ds.data.writer import Group, Image, SetInfo, ShardWriter, Text
from villa_ds.errors import DataError
from villa_ds.rng import Stream

try:
    import easy_vqa
except ModuleNotFoundError as error:
    raise DataError(f"the demo needs the package {error.name}: pip install 'villa_ds[demo]'") from None

SEED = 0  # of statement templates and clusters; part of what "the demo data" is, so not a setting
VOCABULARY_SIZE = 1024  # an upper bound: the texts have far fewer words
DETECTOR_CLASSES = 64
SHARD_GROUPS = 64  # small shards, so that each of four lanes has more than ten of a training set
HELD_OUT_EVERY = 10
SETS = ("pretrain/train", "pretrain/validation", "vqa/train", "vqa/validation", "vqa/test")


@dataclass(frozen=True, slots=True)
class Photo:
    """One image of the package with its questions."""

    split: str  # the package's: "train" or "test"
    number: int
    path: str
    questions: tuple[tuple[int, str, str], ...]  # position in the package's list, question, answer

    @property
    def key(self) -> str:
        """Group key."""
        return f"{self.split}-{self.number:05d}"

    @property
    def part(self) -> str:
        """The data set's part that the photo belongs to: "train", "validation" or "test"."""
        held_out = self.number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return "validation" if self.split == "train" and held_out else self.split


TextRow = tuple[str, str, dict[str, object]]  # id, text, target
TextsOf = Callable[[Photo], list[TextRow]]


@dataclass(frozen=True)
class Material:
    """What all sets of one command are made of."""

    photos: Sequence[Photo]
    regions: Mapping[str, ExtractedRegions]  # by the photo's key
    extractor: PixelRegionExtractor  # with the detector classes of the training photos
    images: int | None  # the limit that was given
    command: str


def demo(out: str | Path, images: int | None = None, processes: int | None = None) -> dict[str, Manifest]:
    """Write the demo's shard sets under `out`; returns their manifests by name (SETS).

    `images` takes only the first so many training images and a quarter as many test images. The bytes written do not
    depend on `processes` (default: one a CPU). DataError if `out` holds anything.
    """
    out = empty_folder(out)
    return write_demo(out, extract_material("villa-ds shards demo", images, processes))


def empty_folder(out: str | Path) -> Path:
    """`out`; DataError if it holds anything."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; give another one, or delete it first")
    return out


def extract_material(command: str, images: int | None, processes: int | None) -> Material:
    """Photos with their regions, and the extractor; parameters as for `demo`."""
    photos = read_package(images)
    extractor = PixelRegionExtractor()
    regions = extract_all(extractor, photos, processes)
    training = [regions[photo.key] for photo in photos if photo.part == "train"]
    extractor = extractor.fitted(training, DETECTOR_CLASSES, SEED)
    return Material(photos, regions, extractor, images, command + ("" if images is None else f" --images {images}"))


def write_demo(out: Path, material: Material) -> dict[str, Manifest]:
    """Write SETS and the extractor."""
    texts_of: dict[str, TextsOf] = {
        "pretrain": statement_rows,
        "vqa": functools.partial(question_rows, answers=easy_vqa.get_answers()),
    }
    training = [photo for photo in material.photos if photo.part == "train"]
    word_pieces = WordPieces.train(
        [text for rows_of in texts_of.values() for photo in training for _, text, _ in rows_of(photo)], VOCABULARY_SIZE
    )
    manifests = {}
    for name in SETS:
        task, _, part = name.partition("/")
        chosen = [photo for photo in material.photos if photo.part == part]
        groups = _groups(chosen, texts_of[task], material, word_pieces)
        info = set_info(name, material, word_pieces.pieces, easy_vqa.get_answers() if task == "vqa" else ())
        with ShardWriter(out / task / part, info, shard_groups=SHARD_GROUPS) as writer:
            for group in with_progress(groups, len(chosen), f"writing {name}"):
                writer.add(group)
        manifests[name] = writer.manifest
    material.extractor.save(out / FILE_NAME)
    return manifests


def read_package(images: int | None = None) -> list[Photo]:
    """The package's training, then test photos, by number; `images` and a quarter as many if a limit is given."""
    available = len(easy_vqa.get_train_image_paths())
    if images is not None and not HELD_OUT_EVERY <= images <= available:
        raise DataError(f"--images {images}: give {HELD_OUT_EVERY} to {available}, the training images of easy-vqa")
    train = _read_split("train", easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions())
    test = _read_split("test", easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions())
    return train + test if images is None else train[:images] + test[: images // 4]


def _read_split(
    split: str, paths: Mapping[int, str], questions: tuple[Sequence[str], Sequence[str], Sequence[int]]
) -> list[Photo]:
    asked: dict[int, list[tuple[int, str, str]]] = {number: [] for number in sorted(paths)}
    for position, (question, answer, number) in enumerate(zip(*questions, strict=True)):
        asked[number].append((position, question, answer))
    return [Photo(split, number, paths[number], tuple(rows)) for number, rows in asked.items()]


def extract_all(
    extractor: RegionExtractor, photos: Sequence[Photo], processes: int | None = None
) -> dict[str, ExtractedRegions]:
    """Regions of every photo by its key, extracted by so many processes (default: one a CPU)."""
    extract = functools.partial(_extract, extractor)
    paths = [photo.path for photo in photos]
    found = with_progress(in_order(extract, paths, processes, chunk=32), len(paths), "extracting regions")
    return dict(zip((photo.key for photo in photos), found, strict=True))


def _extract(extractor: RegionExtractor, path: str) -> ExtractedRegions:
    return extractor.extract(read_picture(path, Path(path)))


def statement_rows(photo: Photo) -> list[TextRow]:
    """Statements of a photo; those on the same image are the same in every run."""
    facts = facts_of((question, answer) for _, question, answer in photo.questions)
    statements = statements_of(facts, Stream(SEED, "easy_vqa statements", photo.key))
    return [(f"{photo.key}-s{place}", statement, {}) for place, statement in enumerate(statements)]


def question_rows(photo: Photo, answers: Sequence[str]) -> list[TextRow]:
    """Questions of a photo, each with its answer's place in `answers` as a target of score 1."""
    return [
        (f"{photo.split}-q{position:05d}", question, {"labels": [answers.index(answer)], "scores": [1.0]})
        for position, question, answer in photo.questions
    ]


def _groups(photos: Sequence[Photo], rows_of: TextsOf, material: Material, word_pieces: WordPieces) -> Iterator[Group]:
    for photo in photos:
        found = material.extractor.labelled(material.regions[photo.key])
        image = Image(f"easy_vqa/{photo.split}/{photo.number}.png", found.features, found.boxes, found.labels)
        texts = [
            Text(identifier, text, word_pieces.encode(text), target) for identifier, text, target in rows_of(photo)
        ]
        yield Group(photo.key, [image], texts)


def set_info(name: str, material: Material, pieces: Sequence[str], answers: Sequence[str]) -> SetInfo:
    """The record of the set `name`."""
    return SetInfo(
        pieces=pieces,
        feature_width=material.extractor.feature_width,
        extractor=material.extractor.fingerprint,
        source=f"easy-vqa {importlib.metadata.version('easy-vqa')}, {name}",
        command=material.command,
        detector_classes=material.extractor.detector_classes,
        label_format="dense",
        answers=tuple(answers),
    )
