"""Join a source of images with a source of texts and write a shard set: what all converters of features share.

The plan (which texts with which images, in which order) is made first, from names alone. Its groups are read, checked
and encoded by worker processes (`assemble`), and written in order by this one. Memory holds names and places, and the
features of a bounded number of groups. Whatever the number of processes, and however often the conversion was killed
and started again (`journal`), the same bytes come out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from villa_ds import __version__
from villa_ds.data.convert.account import Account, IncompleteError, RejectionError, Tally
from villa_ds.data.convert.assemble import CONTRACT, Assembler, Outcome, Task, group_key, image_problems
from villa_ds.data.convert.exclusions import Exclusions
from villa_ds.data.convert.journal import Journal
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.sources import TWICE, ImageSource, Names, Place, TextSource
from villa_ds.data.processes import in_order
from villa_ds.data.progress import with_progress
from villa_ds.data.writer import Image, SetInfo, ShardRecord, ShardWriter
from villa_ds.errors import DataError

IMAGE_MISSING = "of an image that is missing"
_CHUNK = 8  # groups that a process takes at a time: a few megabytes of features
_WORTH_PROCESSES = 256  # groups; fewer are written before processes have started


def convert(
    out: str | Path,
    images: Sequence[ImageSource],
    texts: TextSource,
    settings: Settings,
    default_source: str,
    inputs: Sequence[Path] = (),
) -> Account:
    """Write the texts with their images as a shard set; returns the account.

    `default_source`: what the manifest says if the settings name no source. `inputs`: files and folders that are read;
    a conversion goes on only while their sizes and times are those it was begun with.

    One source holds the images of all texts. Of several sources each holds one image of every text, in their order.
    Groups follow the order of the first source. IncompleteError, and no set, if anything is rejected that may not be;
    DataError if nothing at all can be written or `out` is in use. A conversion that was killed leaves no manifest, and
    goes on where it was when it is started again.
    """
    out = Path(out)
    told = _begun_with(settings, inputs)
    with Journal(out) as journal:
        journal.check(**told)
        with Account(out, settings.exclusions.labels) as account:
            plan = _Plan(images, texts, account, settings.exclusions)
            info = plan.describe(settings, default_source)
            journal.begin(**told, order_of_its_groups=plan.digest())
            try:
                _write(out, plan, info, settings, journal)
            except IncompleteError:
                for shard in out.glob("shard-*.tar"):
                    shard.unlink()
                journal.remove()
                raise
        journal.remove()
    return account


def _begun_with(settings: Settings, inputs: Iterable[Path]) -> dict[str, Any]:
    """All that decides the bytes of the set, as far as it can be told beforehand."""
    return {
        "version_of_villa_ds": __version__,
        "command": settings.command,
        "settings": [
            *(settings.extractor, settings.source, settings.extra_pieces, settings.detector_classes),
            *(settings.allow_rejected, settings.shard_bytes),
        ],
        "vocabulary": _digest(settings.pieces),
        "answer_list": _digest(settings.answers),
        "list_of_exclusions": _digest([settings.exclusions.numbers_of, *sorted(settings.exclusions.members.items())]),
        "source": [_identity(path) for path in inputs],
    }


def _identity(path: Path) -> list[Any]:
    """What changes when a file, or a file in a folder, does: sizes and times of writing."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return [path.name, len(rows), sum(size for _, size, _ in rows), _digest(rows)]


def _digest(items: Iterable[Any]) -> str:
    digest = sha256()
    for item in items:
        digest.update(f"{item!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _write(out: Path, plan: "_Plan", info: SetInfo, settings: Settings, journal: Journal) -> None:
    """Write the groups from where the journal ends, and the manifest unless something is rejected that may not be."""
    pending: list[Any] = []  # notes on the groups since the last finished shard

    def note_shard(record: ShardRecord) -> None:
        journal.append(record, pending)
        pending.clear()

    done = 0
    for entry in journal.entries:
        for note in entry.notes:
            plan.settle(done, note)
            done += 1
    finished = [entry.record for entry in journal.entries]
    todo = _Todo(plan, done)
    processes = settings.processes or (None if len(todo) >= _WORTH_PROCESSES else 1)
    work = in_order(Assembler(plan.images, plan.texts, info), todo, processes, _CHUNK)
    account = plan.account
    with ShardWriter(out, info, settings.shard_bytes, finished=finished, on_shard=note_shard) as writer:
        for place, outcome in enumerate(with_progress(work, len(plan), "writing groups", before=done), start=done):
            note = _take(writer, outcome)
            plan.settle(place, note)
            pending.append(note)  # after the writer: a shard that it finished ended before this group
        plan.settle_images()
        account.check()
        if account.rejected and not (settings.allow_rejected and account.texts.written):
            raise IncompleteError(out, account)  # before the writer writes its manifest


def _take(writer: ShardWriter, outcome: Outcome) -> list[Any]:
    """Append a group; returns the note on it: [texts written, rejected texts, rejected images]."""
    written = 0
    if outcome.group is not None:
        try:
            writer.append(outcome.group)
            written = len(outcome.group.texts)
        except DataError as refusal:  # a source that gave an id twice
            outcome.texts += [(identifier, CONTRACT, str(refusal)) for identifier, _ in outcome.group.texts]
    return [written, outcome.texts, outcome.images]


class _Plan:
    """Which texts with which images, in order; and what became of them."""

    def __init__(
        self, images: Sequence[ImageSource], texts: TextSource, account: Account, exclusions: Exclusions
    ) -> None:
        self.images, self.texts, self.account = images, texts, account
        self._places = [_scanned(source, account.images) for source in images]
        self._used: set[tuple[int, str]] = set()  # (number of the source, name) that some text names
        self._written: set[tuple[int, str]] = set()
        self._excluded: dict[tuple[int, str], str] = {}  # image -> label of the list that keeps its texts out
        self._bad: dict[tuple[int, str], RejectionError] = {}
        found = self._join(exclusions)
        names = sorted(found, key=lambda names: self._places[0][names[0]][0])
        self._groups = [(group, found[group]) for group in names]

    def __len__(self) -> int:
        return len(self._groups)

    def _join(self, exclusions: Exclusions) -> dict[Names, list[Place]]:
        """Places of the texts that are not excluded by their images; rejects texts without them."""
        found: dict[Names, list[Place]] = {}
        tally = self.account.texts
        for place, identifier, names, also in with_progress(self.texts.scan(tally), None, "listing texts"):
            images = self._located(names)
            label = exclusions.match(names, also)
            if label is not None:
                tally.exclude(label, identifier)
                self._excluded.update(dict.fromkeys(images, label))
                continue
            missing = [name for number, name in images if name not in self._places[number]]
            self._used.update(where for where in images if where[1] in self._places[where[0]])
            if len(self.images) > 1 and len(names) != len(self.images):
                detail = f"names {len(names)} images, but there are {len(self.images)} image sources"
                tally.reject(RejectionError(identifier, IMAGE_MISSING, detail))
            elif missing or not names:
                detail = f"no image {missing[0]!r} in the image source" if missing else "names no image"
                tally.reject(RejectionError(identifier, IMAGE_MISSING, detail))
            else:
                found.setdefault(names, []).append(place)
        return found

    def _located(self, names: Names) -> list[tuple[int, str]]:
        """(number of the source, name) of a text's images."""
        if len(self.images) == 1:
            return [(0, name) for name in names]
        return list(zip(range(len(self.images)), names, strict=False))

    def digest(self) -> str:
        """Of all names and places, in order."""
        return _digest((task.images, task.texts) for task in map(self.task, range(len(self))))

    def task(self, position: int) -> Task:
        """The group at a position of the plan."""
        names, texts = self._groups[position]
        images = [
            (number, self._shown(number, name), self._places[number][name][1]) for number, name in self._located(names)
        ]
        return Task(group_key(names), images, texts)

    def _shown(self, number: int, name: str) -> str:
        """An image's name in the set, where two sources may hold different images of one name."""
        before = any(name in places for places in self._places[:number])
        return f"{self.images[number].label}/{name}" if before else name

    def describe(self, settings: Settings, default_source: str) -> SetInfo:
        """The set's description, its widths those of the first image that is as it should be."""
        trouble = "the texts name none of the images"
        for position in range(len(self)):
            number, name, place = self.task(position).images[0]
            try:
                image = self.images[number].read(name, place)
            except RejectionError as error:
                trouble = str(error)
                continue
            info = _describe(image, settings, default_source)
            problem = next(image_problems(image, info), None)
            if problem is None:
                return info
            trouble = problem
        raise DataError(
            f"nothing can be written: {trouble}\n{self.account.texts}\nare these the images that belong to the texts?"
        )

    def settle(self, position: int, note: Sequence[Any]) -> None:
        """Count what became of a group, as `_take` notes it."""
        written, texts, images = note
        located = self._located(self._groups[position][0])
        for name, reason, detail in texts:
            self.account.texts.reject(RejectionError(name, reason, detail))
        for slot, (name, reason, detail) in images:
            self._bad.setdefault(located[slot], RejectionError(name, reason, detail))
        self.account.texts.written += written
        if written:
            self._written.update(located)

    def settle_images(self) -> None:
        """Count every image as written, rejected, excluded or without texts."""
        tally = self.account.images
        for number, places in enumerate(self._places):
            for name in places:
                where = number, name
                if where in self._written:
                    tally.written += 1
                elif where in self._bad:
                    tally.reject(self._bad[where])
                elif where in self._used:
                    tally.reject(RejectionError(name, "of which no text is left", "all its texts are rejected"))
                elif where in self._excluded:
                    tally.exclude(self._excluded[where], name)
                else:
                    tally.unused += 1


@dataclass(frozen=True, slots=True)
class _Todo(Sequence[Task]):
    """The tasks of a plan from a position on, made when they are asked for."""

    plan: _Plan
    start: int

    def __len__(self) -> int:
        return len(self.plan) - self.start

    def __getitem__(self, place: int) -> Task:  # type: ignore[override]  # no slices
        if place >= len(self):
            raise IndexError(place)
        return self.plan.task(self.start + place)


def _scanned(source: ImageSource, images: Tally) -> dict[str, tuple[int, Place]]:
    """(position, place) of a source's images by name, in order; a name that comes again is rejected."""
    found: dict[str, tuple[int, Place]] = {}
    for name, place in with_progress(source.scan(images), None, "listing images"):
        if name in found:
            images.reject(RejectionError(name, TWICE, "the name occurs twice; the first one is taken"))
        else:
            found[name] = len(found), place
    return found


def _describe(image: Image, settings: Settings, default_source: str) -> SetInfo:
    labels = image.labels
    dense = labels is not None and labels.ndim == 2
    return SetInfo(
        pieces=settings.pieces,
        feature_width=image.features.shape[-1],
        extractor=settings.extractor,
        source=settings.source or default_source,
        command=settings.command,
        detector_classes=0 if labels is None else labels.shape[1] if dense else settings.detector_classes,
        label_format="none" if labels is None else "dense" if dense else "topk",
        answers=settings.answers,
    )
