"""The subcommands of `villa-ds shards`: parsers, and handlers that import what they run."""

import argparse
import functools
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Actions = argparse._SubParsersAction[argparse.ArgumentParser]
    from villa_ds.data.convert.account import Account
    from villa_ds.data.convert.settings import Settings
    from villa_ds.data.convert.texts import TextsFile
    from villa_ds.data.manifest import Manifest
    from villa_ds.data.regroup import Layout


def add_shards(command: argparse.ArgumentParser) -> None:
    """The parsers of `villa-ds shards ...`; each sets `run`, which returns the exit code."""
    actions = command.add_subparsers(required=True, metavar="ACTION")
    _add_conversions(actions)
    _add_tools(actions)


def _add_conversions(actions: "Actions") -> None:
    action = actions.add_parser("demo", help="shards from the 5,000 real images of the PyPI package easy-vqa")
    action.add_argument("out", type=Path)
    action.add_argument("--images", type=positive, default=None, help="take this many training images only")
    action.add_argument("--processes", type=positive, default=None, help="worker processes")
    action.add_argument("--benchmark", action="store_true", help="also the scenes of docs/demo-benchmark.md")
    action.set_defaults(run=_demo)
    action = actions.add_parser("from-uniter-lmdb", help="shards from UNITER's image and text data bases")
    action.add_argument("--images", required=True, metavar="IMG_DB", help="an LMDB folder; for VCR two, joined by ';'")
    _add_texts(action, "uniter")
    _add_origin(action)
    _add_conversion(action)
    action.set_defaults(run=_from_uniter_lmdb)
    action = actions.add_parser("from-npz", help="shards from a folder of .npz region files and texts")
    action.add_argument("--features", required=True, type=Path, metavar="FOLDER")
    _add_texts(action, "jsonl")
    chosen = action.add_mutually_exclusive_group()
    chosen.add_argument("--boxes", type=positive, default=None, help="keep the first so many regions of an image")
    chosen.add_argument("--confidence", type=float, default=None, help="keep regions above it, as UNITER's 0.2")
    action.add_argument("--min-boxes", type=positive, default=10, help="with --confidence: at least so many")
    action.add_argument("--max-boxes", type=positive, default=100, help="with --confidence: at most so many")
    _add_origin(action)
    _add_conversion(action)
    action.set_defaults(run=_from_npz)
    action = actions.add_parser("from-tsv", help="shards from bottom-up-attention or LXMERT .tsv files and texts")
    action.add_argument("--features", required=True, action="append", type=Path, metavar="TSV", help="may be repeated")
    _add_texts(action, "jsonl")
    action.add_argument("--detector-classes", type=positive, default=1601, help="background included")
    _add_origin(action)
    _add_conversion(action)
    action.set_defaults(run=_from_tsv)
    _add_pictures(actions)
    action = actions.add_parser("to-npz", help="a shard set back as .npz region files and JSON lines")
    action.add_argument("location", metavar="SET", help="a folder, a URL prefix or a pipe: command")
    action.add_argument("out", type=Path)
    action.set_defaults(run=_to_npz)
    action = actions.add_parser("overlap", help="images that two sets share, by name and by the ids of COCO and others")
    action.add_argument("first", help="a shard set, or anything that --exclude takes: [NAME SPACE:]PATH[#SPLIT,...]")
    action.add_argument("second")
    _add_same_images(action)
    action.set_defaults(run=_overlap)


def _add_pictures(actions: "Actions") -> None:
    action = actions.add_parser("from-images", help="shards from a folder of pictures and texts")
    action.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="PNG and JPEG files, at any depth")
    _add_texts(action, "jsonl")
    add_extractor(action)
    _add_conversion(action)
    action.set_defaults(run=_from_images)
    action = actions.add_parser("fit-extractor", help="a pixel extractor for from-images, fitted to training pictures")
    action.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="PNG and JPEG files, at any depth")
    action.add_argument("--classes", type=_classes, default=64, help="of its labels, background included")
    action.add_argument("--limit", type=positive, default=4000, help="pictures to learn from, evenly spread")
    action.add_argument("--processes", type=positive, default=None, help="worker processes")
    _add_settings(action)
    action.add_argument("out", type=Path, metavar="OUT.npz")
    action.set_defaults(run=_fit_extractor)


def _add_texts(action: argparse.ArgumentParser, usual: str) -> None:
    """`usual`: the format of the texts unless one is named."""
    action.add_argument("--texts", required=True, type=Path, metavar="PATH")
    action.add_argument(
        "--texts-format",
        default=usual,
        metavar="FORMAT",
        help="jsonl, coco, karpathy, visual-genome, conceptual, sbu, parquet, arrow, uniter; default: %(default)s",
    )
    action.add_argument(
        "--image-name", metavar="TEMPLATE", help="how the features name an image, such as 'COCO_train2014_{id:012}'"
    )
    action.add_argument("--split", default="", metavar="NAME,...", help="of a Karpathy split, Parquet or Arrow")
    action.add_argument("--urls", type=Path, metavar="TXT", help="SBU: the file of URLs beside the file of captions")
    for column, what in (
        ("image", "image names"),
        ("text", "captions, or lists of them"),
        ("id", "text ids; default: the row's number"),
        ("split", "splits"),
    ):
        action.add_argument(f"--{column}-column", metavar="NAME", help=f"Parquet, Arrow: the column of {what}")


def _add_conversion(action: argparse.ArgumentParser) -> None:
    action.set_defaults(interrupted="interrupted; the same command goes on where it was")
    action.add_argument("--vocabulary", required=True, type=Path, metavar="vocab.txt")
    action.add_argument(
        "--extra-pieces", type=positive, default=0, metavar="N", help="ids beyond the vocabulary; VCR has 81"
    )
    action.add_argument("--answers", type=Path, metavar="JSON", help="the answer list of question answering")
    action.add_argument("--source", default="", help="the data in words; default: the names of the files")
    action.add_argument("--allow-rejected", action="store_true", help="leave out what cannot be converted")
    action.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="[NAME SPACE:]PATH[#SPLIT,...]",
        help="leave these images out: a list, a shard set, a Karpathy or annotation file; may be repeated",
    )
    action.add_argument(
        "--image-ids-of",
        choices=("coco", "flickr", "visual-genome", "name"),
        help="with --exclude: whose ids the image names are that are mere numbers",
    )
    _add_same_images(action)
    action.add_argument("--shard-mib", type=positive, default=1024, metavar="N", help="size at which a shard ends")
    action.add_argument("--processes", type=positive, default=None, help="that read and encode; default: one a CPU")
    action.add_argument("out", type=Path)


def _add_same_images(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--same-images",
        action="append",
        default=[],
        type=Path,
        metavar="JSON",
        help="how data sets call the same images: Visual Genome's image_data.json, COCO's files; may be repeated",
    )


def _add_origin(action: argparse.ArgumentParser) -> None:
    action.add_argument("--extractor", default="unknown", help="what computed the features, with its version")


def add_extractor(action: argparse.ArgumentParser) -> None:
    """The options that say what finds the regions of pictures."""
    action.add_argument(
        "--extractor",
        required=True,
        help="a stored one (extractor.npz), pixels, faster-rcnn, or module:function of another package",
    )
    _add_settings(action)


def _add_settings(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="a setting of the extractor"
    )


def _classes(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is not 2 or more: background and something")
    return value


def _add_tools(actions: "Actions") -> None:
    action = actions.add_parser("verify", help="check structure, checksums, shapes and values of a shard set")
    action.add_argument("location", metavar="SET", help="a folder, a URL prefix or a pipe: command")
    extent = action.add_mutually_exclusive_group()
    extent.add_argument("--sample", type=positive, default=None, metavar="N", help="a quick look: read N groups only")
    extent.add_argument("--processes", type=positive, default=None, help="that read; default: one a CPU")
    action.add_argument("--seed", type=int, default=0, help="which groups --sample draws")
    action.set_defaults(run=_verify)
    action = actions.add_parser("rebuild-manifest", help="index arrays and a manifest for tars that have none")
    action.add_argument("folder", type=Path)
    action.add_argument("--vocabulary", type=Path, metavar="vocab.txt", help="default: FOLDER/vocab.txt")
    action.add_argument("--extra-pieces", type=positive, default=0, metavar="N", help="ids beyond it; VCR has 81")
    action.add_argument("--answers", type=Path, metavar="JSON", help="the answer list of question answering")
    action.add_argument("--detector-classes", type=positive, default=0, help="for labels in top-k form")
    action.add_argument("--extractor", default="unknown", help="what computed the features, with its version")
    action.add_argument("--source", default="unknown", help="the data in words")
    action.add_argument("--processes", type=positive, default=None, help="that read; default: one a CPU")
    action.set_defaults(run=_rebuild_manifest)
    action = actions.add_parser("stat", help="counts, lengths, vocabulary and label statistics of a shard set")
    action.add_argument("location", metavar="SET", help="a folder, a URL prefix or a pipe: command")
    action.add_argument("--plots", type=Path, metavar="DIR", help="draw the distributions as PNG pictures")
    action.add_argument("--json", action="store_true", help="print all figures as JSON instead of a table")
    action.add_argument("--groups", type=positive, default=1000, help="read for word pieces and labels; evenly spaced")
    action.set_defaults(run=_stat)
    for name, text in (
        ("merge", "several sets of one kind as one"),
        ("split", "a set as several parts that share no image"),
        ("reshard", "a set in larger, smaller or shuffled shards"),
    ):
        action = actions.add_parser(name, help=text)
        if name == "merge":
            action.add_argument("locations", nargs="+", metavar="SET")
            action.add_argument(
                "--prefix",
                action="append",
                default=[],
                metavar="TEXT",
                help="before a set's keys and text ids, where several have the same; once for each set, '' for none",
            )
        else:
            action.add_argument("location", metavar="SET", help="a folder, a URL prefix or a pipe: command")
        action.add_argument("out", type=Path)
        extent = action.add_mutually_exclusive_group(required=name == "reshard")
        extent.add_argument("--shard-bytes", type=positive, metavar="N", help="a shard's bytes at most; default: 1 GiB")
        extent.add_argument("--groups-per-shard", type=positive, metavar="N")
        extent.add_argument("--shards", type=positive, metavar="N", help="so many, equal in groups")
        if name == "split":
            chosen = action.add_mutually_exclusive_group(required=True)
            chosen.add_argument("--parts", metavar="NAME=SHARE,...", help="such as train=0.9,validation=0.1")
            chosen.add_argument("--list", type=Path, metavar="FILE", help="lines of image name, tab, part")
            action.add_argument("--by", choices=("image",), default="image", help="what is in one part only")
            action.add_argument("--seed", type=int, default=0, help="with --parts: another one, another split")
        if name == "reshard":
            action.add_argument("--shuffle", type=int, metavar="SEED", help="mix the groups")
        action.set_defaults(run={"merge": _merge, "split": _split, "reshard": _reshard}[name])


def above_zero(text: str) -> float:
    """An argument that counts what there is some of."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


# Imports below are local because numpy and friends take time, which `--help` and a typing error should not cost.


def _demo(parsed: argparse.Namespace) -> int:
    if parsed.benchmark:
        from villa_ds.data.convert.benchmark import demo_with_benchmark as make  # noqa: PLC0415
    else:
        from villa_ds.data.convert.easy_vqa import demo as make  # noqa: PLC0415
    make(parsed.out, images=parsed.images, processes=parsed.processes)
    return 0


def _from_uniter_lmdb(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.uniter_lmdb import from_uniter_lmdb  # noqa: PLC0415

    return _convert(parsed, functools.partial(from_uniter_lmdb, parsed.out, parsed.images, _texts(parsed)))


def _from_npz(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.npz import from_npz  # noqa: PLC0415
    from villa_ds.data.convert.region_files import Selection  # noqa: PLC0415

    keep = parsed.boxes
    if parsed.confidence is not None:
        keep = Selection(parsed.confidence, parsed.min_boxes, parsed.max_boxes)
    return _convert(parsed, functools.partial(from_npz, parsed.out, parsed.features, _texts(parsed), keep=keep))


def _from_tsv(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.tsv import from_tsv  # noqa: PLC0415

    convert = functools.partial(from_tsv, parsed.out, parsed.features, _texts(parsed))
    return _convert(parsed, convert, detector_classes=parsed.detector_classes)


def _from_images(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.extractors import PIXELS, STORED_SUFFIX, load_extractor  # noqa: PLC0415
    from villa_ds.data.convert.images import from_images  # noqa: PLC0415

    extractor = load_extractor(parsed.extractor, parsed.settings)
    if parsed.processes is None and not parsed.extractor.endswith((PIXELS, STORED_SUFFIX)):
        parsed.processes = 1  # a detector has threads of its own, or a GPU
    return _convert(parsed, functools.partial(from_images, parsed.out, parsed.images, _texts(parsed), extractor))


def _fit_extractor(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.images import fit_extractor  # noqa: PLC0415

    limits = {"classes": parsed.classes, "limit": parsed.limit, "processes": parsed.processes}
    print(fit_extractor(parsed.out, parsed.images, parsed.settings, **limits))
    return 0


def _to_npz(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.to_npz import to_npz  # noqa: PLC0415

    print(f"{parsed.out}: {to_npz(parsed.location, parsed.out)} images")
    return 0


def _texts(parsed: argparse.Namespace) -> "TextsFile":
    from villa_ds.data.convert.texts import TextsFile  # noqa: PLC0415

    return TextsFile(
        parsed.texts,
        parsed.texts_format,
        parsed.image_name,
        tuple(split for split in parsed.split.split(",") if split),
        parsed.urls,
        parsed.image_column,
        parsed.text_column,
        parsed.id_column,
        parsed.split_column,
    )


def _convert(parsed: argparse.Namespace, convert: "Callable[[Settings], Account]", detector_classes: int = 0) -> int:
    """Call a converter with its settings and print its account, also where it refuses."""
    from villa_ds.data.convert.account import IncompleteError  # noqa: PLC0415
    from villa_ds.data.convert.exclusions import read_exclusions  # noqa: PLC0415
    from villa_ds.data.convert.settings import load_settings  # noqa: PLC0415

    settings = load_settings(
        parsed.vocabulary,
        parsed.answers,
        command=_recorded(parsed.command_line),
        extractor=parsed.extractor,
        source=parsed.source,
        extra_pieces=parsed.extra_pieces,
        detector_classes=detector_classes,
        allow_rejected=parsed.allow_rejected,
        exclusions=read_exclusions(parsed.exclude, parsed.same_images, parsed.image_ids_of),
        shard_bytes=parsed.shard_mib << 20,
        processes=parsed.processes,
    )
    try:
        print(convert(settings))
    except IncompleteError as error:
        print(error.account)
        raise
    return 0


def _recorded(command: str) -> str:
    """A command without `--processes`, on which nothing that is written depends; argparse knows it shortened too."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        option, given, _ = word.partition("=")
        if len(option) > len("--") and "--processes".startswith(option):
            if not given:
                next(words, None)
        else:
            kept.append(word)
    return shlex.join(kept)


def _overlap(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.exclusions import overlap  # noqa: PLC0415

    found = overlap(parsed.first, parsed.second, parsed.same_images)
    print(found)
    found.check()
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from villa_ds.data.verify import verify, verify_sample  # noqa: PLC0415

    if parsed.sample is None:
        report = verify(parsed.location, parsed.processes)
    else:
        report = verify_sample(parsed.location, parsed.sample, parsed.seed)
    print(report)
    report.check()
    return 0


def _rebuild_manifest(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.settings import read_answers, with_extra  # noqa: PLC0415
    from villa_ds.data.manifest import VOCABULARY_NAME  # noqa: PLC0415
    from villa_ds.data.rebuild import NoSetError, rebuild_manifest  # noqa: PLC0415
    from villa_ds.data.wordpiece import WordPieces  # noqa: PLC0415

    try:
        manifest = rebuild_manifest(
            parsed.folder,
            with_extra(
                WordPieces.load(parsed.vocabulary or parsed.folder / VOCABULARY_NAME).pieces, parsed.extra_pieces
            ),
            answers=() if parsed.answers is None else read_answers(parsed.answers),
            detector_classes=parsed.detector_classes,
            extractor=parsed.extractor,
            source=parsed.source,
            command=parsed.command_line,
            processes=parsed.processes,
        )
    except NoSetError as error:
        print(error.listing)
        raise
    print(f"{parsed.folder}: {_size(manifest)}")
    return 0


def _size(manifest: "Manifest") -> str:
    return f"{manifest.num_pairs} pairs, {manifest.num_groups} groups, {len(manifest.shards)} shards"


def _merge(parsed: argparse.Namespace) -> int:
    from villa_ds.data.regroup import merge  # noqa: PLC0415

    manifest = merge(parsed.locations, parsed.out, _layout(parsed), parsed.command_line, parsed.prefix)
    print(f"{parsed.out}: {_size(manifest)}")
    return 0


def _split(parsed: argparse.Namespace) -> int:
    from villa_ds.data.regroup import parse_shares, read_parts, split  # noqa: PLC0415

    parts = parse_shares(parsed.parts, parsed.seed) if parsed.parts is not None else read_parts(parsed.list)
    for name, manifest in split(parsed.location, parsed.out, parts, _layout(parsed), parsed.command_line).items():
        print(f"{parsed.out / name}: {_size(manifest)}")
    return 0


def _reshard(parsed: argparse.Namespace) -> int:
    from villa_ds.data.regroup import reshard  # noqa: PLC0415

    manifest = reshard(parsed.location, parsed.out, _layout(parsed), parsed.command_line, parsed.shuffle)
    print(f"{parsed.out}: {_size(manifest)}")
    return 0


def _layout(parsed: argparse.Namespace) -> "Layout":
    from villa_ds.data.regroup import Layout  # noqa: PLC0415

    return Layout(parsed.shard_bytes, parsed.groups_per_shard, parsed.shards)


def _stat(parsed: argparse.Namespace) -> int:
    from villa_ds.data.statistics import stat  # noqa: PLC0415

    found = stat(parsed.location, parsed.groups)
    print(json.dumps(found.as_json()) if parsed.json else found)
    if parsed.plots is not None:
        from villa_ds.data.charts import draw  # noqa: PLC0415

        for path in draw(found, parsed.plots):
            print(path, file=sys.stderr)
    return 0
