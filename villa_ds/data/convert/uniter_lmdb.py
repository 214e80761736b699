"""`villa-ds shards from-uniter-lmdb`: a shard set from UNITER's image and text data bases.

Section 9 of tests/golden/FACTS.md describes both. Targets, by what a record holds:

    VQA, visual entailment   {"labels": [place in the answer list], "scores": [soft score]}, nothing if not given
    NLVR2                    {"label": 0 or 1}, nothing if not given
    VCR                      {"answers": [4 x word pieces], "rationales": [4 x word pieces], "answer": 0-3,
                             "rationale": 0-3}, the last two absent where they are hidden (-1)
    referring expressions    {"region": place among the image's regions, "box": [x, y, w, h] in pixels,
                             "image_size": [width, height]}; no "region" with detected regions
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from villa_ds.data.contract import text_problems
from villa_ds.data.convert.account import Account, RejectionError, Tally
from villa_ds.data.convert.assemble import CONTRACT
from villa_ds.data.convert.join import convert
from villa_ds.data.convert.json_files import read_json
from villa_ds.data.convert.region_files import DAMAGE, UNREADABLE, bare
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.sources import Listed, Names, Place
from villa_ds.data.convert.texts import UNITER, TextsFile
from villa_ds.data.convert.uniter_images import LIST_KEY, LmdbImages, ReadOnlyLmdb
from villa_ds.data.writer import Text
from villa_ds.errors import DataError

try:
    import lz4.frame
    import msgpack
except ModuleNotFoundError as missing:
    raise DataError(f"data bases need the package {missing.name}: pip install 'villa_ds[convert]'") from None

NOT_A_MEMBER = "not listed, or listed in one place only"
DISAGREES = "of which the data base's files say different things"
_GROUND_TRUTH, _DETECTED = "visual_grounding_coco_gt_", "visual_grounding_det_coco_"
_LENGTHS = ("id2len.json", "id2len_qa.json", "id2len_qar.json")
_SENTENCES = ("sentence", "sent", "question", "caption", "text")  # where a record may hold its text


def from_uniter_lmdb(out: str | Path, images: str, texts: TextsFile, settings: Settings) -> Account:
    """Convert a pair of data bases. `images`: a folder, or two joined by ";" for VCR, in any order.

    `texts`: a text data base's folder (format `UNITER`), or any other file, whose images have the names of `images`.

    The widths of features and labels are those stored. DataError if the text data base was made with another
    vocabulary; otherwise as `join.convert`.
    """
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(contextlib.closing(LmdbImages(part))) for part in images.split(";")]
        if len(sources) > 1:  # a record names the file of ground-truth boxes first, as the reference's reader expects
            sources.sort(key=lambda source: "gt" not in source.label)
        detected = len(sources) == 1 and sources[0].holds(_DETECTED)
        own = UniterTexts(texts.path, settings, detected) if texts.format == UNITER else None
        rows = stack.enter_context(contextlib.closing(own or texts.open(settings)))
        names = ", ".join([*(source.label for source in sources), texts.path.name])
        inputs = [path for source in sources for path in source.inputs] + list(own.inputs if own else texts.inputs)
        return convert(out, sources, rows, settings, f"UNITER data bases {names}", inputs)


class UniterTexts:
    """Source of texts: a text data base. A place is an id and what the files beside the data base say of it."""

    def __init__(self, folder: Path, settings: Settings, detected: bool) -> None:
        """`detected`: the images of referring expressions are those with detected regions."""
        self._folder, self._detected = folder, detected
        self._pieces, self._answers = settings.pieces, settings.answers
        check_vocabulary(folder, settings.pieces[: len(settings.pieces) - settings.extra_pieces])
        self._lmdb = ReadOnlyLmdb(folder)
        self.inputs = [self._lmdb.file, *sorted(folder.glob("*.json"))]
        lengths = [_optional(folder / name, {}) for name in _LENGTHS if (folder / name).exists()]
        lists = [list(item) for item in lengths] + _referred(folder)
        if not lists:
            raise DataError(f"{folder}: no id2len.json, which lists the texts; copy the whole data base")
        self._lengths: dict[str, int] = _optional(folder / _LENGTHS[0], {})
        self._members, self._strays = _compare(lists)
        self._images: dict[str, Any] = _optional(folder / "txt2img.json", {})
        self._check_image_lists()
        self._pictures = _pictures(folder)

    def __getstate__(self) -> dict[str, Any]:
        # Lists of all texts are for `scan`; a place tells what reading one needs of them.
        return {**self.__dict__, "_lengths": {}, "_members": {}, "_strays": [], "_images": {}}

    def close(self) -> None:
        """Close the data base."""
        self._lmdb.close()

    def _check_image_lists(self) -> None:
        """DataError if img2txts.json, of retrieval, contradicts txt2img.json."""
        for image, identifiers in _optional(self._folder / "img2txts.json", {}).items():
            for identifier in identifiers:
                if self._images.get(identifier) not in (image, [image]):
                    raise DataError(
                        f"{self._folder}: img2txts.json gives the text {identifier!r} to {image!r}, txt2img.json to "
                        f"{self._images.get(identifier)!r}; the files are of different data bases"
                    )

    def scan(self, texts: Tally) -> Iterator[Listed]:
        """Ids and their images; rejects what only some of the data base's files know."""
        for identifier in self._strays:
            texts.read += 1
            texts.reject(RejectionError(identifier, NOT_A_MEMBER, "not in all of the lists of ids"))
        known = self._members.keys() | self._strays
        for key in self._lmdb:
            identifier = key.decode(errors="replace")
            if identifier not in known and key != LIST_KEY:
                texts.read += 1
                texts.reject(RejectionError(identifier, NOT_A_MEMBER, "has a record, but is in no list of ids"))
        for identifier in self._members:
            texts.read += 1
            try:
                said = self._images.get(identifier)
                names = self._names(identifier, self._record(identifier) if said is None else said)
                place = identifier, self._lengths.get(identifier), None if said is None else names
                yield Listed(place, identifier, names)
            except RejectionError as error:
                texts.reject(error)

    def _names(self, identifier: str, stored: Any) -> Names:
        """Image names of an entry of txt2img.json, or of a record."""
        files = stored.get("img_fname") if isinstance(stored, dict) else stored
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
            raise RejectionError(identifier, UNREADABLE, f"has no image names, but {files!r}")
        if self._detected:
            files = [file.replace(_GROUND_TRUTH, _DETECTED) for file in files]
        return tuple(bare(file) for file in files)

    def _record(self, identifier: str) -> dict[str, Any]:
        value = self._lmdb.get(identifier.encode(errors="surrogatepass"))
        if value is None:
            raise RejectionError(identifier, "without a record", "listed, but has no record")
        try:
            record = msgpack.unpackb(lz4.frame.decompress(value), raw=False, strict_map_key=False)
        except (*DAMAGE, msgpack.UnpackException) as error:
            raise RejectionError(identifier, UNREADABLE, f"cannot be unpacked: {error}") from None
        if not isinstance(record, dict):
            raise RejectionError(identifier, UNREADABLE, "is not a map")
        return record

    def read(self, place: Place) -> Text:
        """One text with its target."""
        identifier, length, said = place
        record = self._record(identifier)
        pieces = _pieces(identifier, record.get("input_ids"))
        if said is not None and "img_fname" in record:
            own = self._names(identifier, record)
            if said != own:
                raise RejectionError(identifier, DISAGREES, f"is of {own}, but txt2img.json says {said}")
        if length not in (None, len(pieces)):
            raise RejectionError(identifier, DISAGREES, f"has {len(pieces)} word pieces, id2len.json says {length}")
        return Text(identifier, self._sentence(record, pieces), pieces, self._target(identifier, record))

    def _sentence(self, record: Mapping[str, Any], pieces: Sequence[int]) -> str:
        """The text as written, or put together from its word pieces."""
        words = record.get("toked_question")
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return " ".join(words)
        found = next((record[name] for name in _SENTENCES if isinstance(record.get(name), str)), None)
        if found is not None:
            return str(found)
        known = (self._pieces[piece] for piece in pieces if piece < len(self._pieces))
        return " ".join(known).replace(" ##", "")

    def _target(self, identifier: str, record: Mapping[str, Any]) -> dict[str, object]:
        if "input_ids_as" in record:
            return self._choices(identifier, record)
        if "ann_id" in record:
            return self._reference(identifier, record)
        match record.get("target"):
            case None | {} as empty if not empty:
                return {}
            case int(label):
                return {"label": int(label)}
            case {"labels": list(labels), "scores": list(scores)} if _fit(labels, scores):
                if self._answers and max(labels, default=0) >= len(self._answers):
                    detail = f"has the answer {max(labels)}, but there are {len(self._answers)} answers"
                    raise RejectionError(identifier, DISAGREES, detail)
                return {"labels": labels, "scores": [float(score) for score in scores]}
            case other:
                raise RejectionError(identifier, UNREADABLE, f"has the target {other!r}, which is of no known task")

    def _choices(self, identifier: str, record: Mapping[str, Any]) -> dict[str, object]:
        target: dict[str, object] = {}
        for name, field in (("answers", "input_ids_as"), ("rationales", "input_ids_rs")):
            choices = [_pieces(identifier, choice) for choice in record.get(field, [])]
            for choice in choices:
                for problem in text_problems(identifier, choice, len(self._pieces)):
                    raise RejectionError(identifier, CONTRACT, f"{name}: {problem}")
            target[name] = choices
            label = record.get({"answers": "qa_target", "rationales": "qar_target"}[name], -1)
            if not isinstance(label, int) or not -1 <= label < len(choices):
                raise RejectionError(identifier, CONTRACT, f"the target of its {name} is {label!r}")
            if label >= 0:
                target[name.removesuffix("s")] = label
        return target

    def _reference(self, identifier: str, record: Mapping[str, Any]) -> dict[str, object]:
        annotations, size = self._pictures.get(record.get("image_id"), ([], []))
        box = record.get("bbox")
        if record["ann_id"] not in annotations:
            detail = f"annotation {record['ann_id']} of image {record.get('image_id')} is not in images.json"
            raise RejectionError(identifier, DISAGREES, detail)
        if not isinstance(box, list) or len(box) != 4:
            raise RejectionError(identifier, UNREADABLE, f"has the box {box!r}")
        target: dict[str, object] = {"box": box, "image_size": size}
        if not self._detected:
            target["region"] = annotations.index(record["ann_id"])
        return target


def check_vocabulary(folder: Path, pieces: Sequence[str]) -> None:
    """DataError unless the ids in meta.json are those of the vocabulary, so that the stored word pieces are too."""
    meta = read_json(folder / "meta.json")
    names = {"UNK": "[UNK]", "CLS": "[CLS]", "SEP": "[SEP]", "MASK": "[MASK]"}
    places = {piece: place for place, piece in enumerate(pieces)}
    expected: dict[str, object] = {name: places.get(piece) for name, piece in names.items()}
    if "v_range" in meta:
        expected["v_range"] = [places.get("!"), len(pieces)]
    for name, value in expected.items():
        if meta.get(name) != value:
            raise DataError(
                f"{folder / 'meta.json'}: {name} is {meta.get(name)}, but {value} in the vocabulary; "
                f"give the vocab.txt of the tokenizer {meta.get('bert') or meta.get('toker') or meta.get('tokenizer')}"
            )


def _fit(labels: Sequence[Any], scores: Sequence[Any]) -> bool:
    """Whether these are places in an answer list and their scores."""
    places = all(type(label) is int and label >= 0 for label in labels)
    return places and len(labels) == len(scores) and all(isinstance(score, float | int) for score in scores)


def _pieces(identifier: str, stored: Any) -> list[int]:
    if not isinstance(stored, list) or not all(type(piece) is int for piece in stored):
        raise RejectionError(identifier, UNREADABLE, "has no list of word-piece ids")
    return stored


def _referred(folder: Path) -> list[list[str]]:
    """Ids of the sentences in refs.json, the order of referring expressions; in a list of none or one."""
    try:
        refs = _optional(folder / "refs.json", [])
        return [[str(identifier) for ref in refs for identifier in ref["sent_ids"]]] if refs else []
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'refs.json'}: an entry lacks sent_ids: {error}") from None


def _pictures(folder: Path) -> dict[Any, tuple[list[int], list[int]]]:
    """By image id of images.json: its annotations in the order of its regions, and [width, height]."""
    try:
        pictures = _optional(folder / "images.json", [])
        return {item["id"]: (list(item["ann_ids"]), [item["width"], item["height"]]) for item in pictures}
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'images.json'}: an entry lacks {error}") from None


def _compare(lists: Sequence[Sequence[str]]) -> tuple[dict[str, None], list[str]]:
    """Ids that all lists have, in the order of the last one, and those that only some have."""
    common = set(lists[0]).intersection(*lists[1:])
    every = dict.fromkeys(identifier for part in lists for identifier in part)
    members = dict.fromkeys(identifier for identifier in lists[-1] if identifier in common)
    return members, [identifier for identifier in every if identifier not in common]


def _optional(path: Path, default: Any) -> Any:
    found = read_json(path) if path.exists() else default
    if type(found) is not type(default):
        raise DataError(f"{path}: expected a JSON {'object' if isinstance(default, dict) else 'list'}")
    return found
