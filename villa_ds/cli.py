"""The command line: `villa-ds` or `python -m villa_ds`. Exit codes: 0 done, 2 input, 3 data damage, 75 preempted."""

import argparse
import errno
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from villa_ds import __version__
from villa_ds.config import load_recipe
from villa_ds.errors import VillaError
from villa_ds.resources import find_recipe

if TYPE_CHECKING:
    from villa_ds.data.convert.account import Account
    from villa_ds.data.convert.settings import Settings

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)  # not of our making


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an error that the user can mend into one line on stderr."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments once; overrides may also follow an option.
    misplaced = [argument for argument in rest if "=" not in argument or argument.startswith("-")]
    if misplaced or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(misplaced or rest)}")
    if rest:
        parsed.overrides += rest
    parsed.command_line = shlex.join(["villa-ds", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        result: int = parsed.run(parsed)
    except VillaError as error:
        print(f"villa-ds: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"villa-ds: {error.filename or 'a file'}: {error.strerror}; mend that, start again", file=sys.stderr)
        return VillaError.exit_code
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="villa-ds", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher gives it; LOCAL_RANK says the same
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_shards(commands.add_parser("shards", help="make, check and describe shard sets"))

    command = commands.add_parser("train", help="pre-train or fine-tune; resumes by itself from its run directory")
    _add_recipe(command)
    command.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="a recipe key that may differ on a resume"
    )
    command.set_defaults(run=_train)

    command = commands.add_parser("evaluate", help="metrics and predictions of a checkpoint on held-out sets")
    _add_recipe(command)
    command.add_argument("--limit", type=_positive, default=0, help="micro-batches a task")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("export", help="the weights of a checkpoint as one file")
    command.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory for its newest one")
    command.add_argument("out", type=Path, help="OUT.safetensors or OUT.pt")
    command.add_argument(
        "--layout", choices=("villa_ds", "uniter"), default="uniter", help="tensor names: ours, or the reference's"
    )
    command.set_defaults(run=_export)

    command = commands.add_parser("compare", help="the held-out results of several runs in one table")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    command.set_defaults(run=_compare)

    commands.add_parser("doctor", help="what is installed, which kernels will run").set_defaults(run=_doctor)

    command = commands.add_parser("trace", help="what the loaders deliver: one JSON line per global micro-batch")
    _add_recipe(command)
    command.add_argument("--steps", type=_positive, required=True, help="optimizer steps")
    command.add_argument("--world-size", type=_positive, default=1, help="ranks whose loaders are run")
    command.add_argument("--workers", type=int, default=0, help="loader processes a rank")
    command.set_defaults(run=_trace)
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a recipe file, or the name of one that ships, such as demo-pretrain")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted recipe keys, such as data.root=DIR")


def _add_shards(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("demo", help="shards from the 5,000 real images of the PyPI package easy-vqa")
    action.add_argument("out", type=Path)
    action.add_argument("--images", type=_positive, default=None, help="take this many training images only")
    action.add_argument("--processes", type=_positive, default=None, help="worker processes")
    action.set_defaults(run=_shards_demo)
    action = actions.add_parser("from-uniter-lmdb", help="shards from UNITER's image and text data bases")
    action.add_argument("--images", required=True, metavar="IMG_DB", help="an LMDB folder; for VCR two, joined by ';'")
    action.add_argument("--texts", required=True, type=Path, metavar="TXT_DB")
    _add_conversion(action)
    action.set_defaults(run=_shards_from_uniter_lmdb)
    action = actions.add_parser("from-npz", help="shards from a folder of .npz region files and texts as JSON lines")
    action.add_argument("--features", required=True, type=Path, metavar="FOLDER")
    action.add_argument("--texts", required=True, type=Path, metavar="JSONL")
    chosen = action.add_mutually_exclusive_group()
    chosen.add_argument("--boxes", type=_positive, default=None, help="keep the first so many regions of an image")
    chosen.add_argument("--confidence", type=float, default=None, help="keep regions above it, as UNITER's 0.2")
    action.add_argument("--min-boxes", type=_positive, default=10, help="with --confidence: at least so many")
    action.add_argument("--max-boxes", type=_positive, default=100, help="with --confidence: at most so many")
    _add_conversion(action)
    action.set_defaults(run=_shards_from_npz)
    action = actions.add_parser("from-tsv", help="shards from bottom-up-attention or LXMERT .tsv files and JSON lines")
    action.add_argument("--features", required=True, action="append", type=Path, metavar="TSV", help="may be repeated")
    action.add_argument("--texts", required=True, type=Path, metavar="JSONL")
    action.add_argument("--detector-classes", type=_positive, default=1601, help="background included")
    _add_conversion(action)
    action.set_defaults(run=_shards_from_tsv)
    action = actions.add_parser("to-npz", help="a shard set back as .npz region files and JSON lines")
    action.add_argument("folder", type=Path)
    action.add_argument("out", type=Path)
    action.set_defaults(run=_shards_to_npz)
    action = actions.add_parser("verify", help="check structure, checksums, shapes and values of a shard set")
    action.add_argument("folder", type=Path)
    action.set_defaults(run=_shards_verify)
    action = actions.add_parser("stat", help="counts, lengths, vocabulary and label statistics of a shard set")
    action.add_argument("folder", type=Path)
    action.set_defaults(run=_shards_stat)


def _add_conversion(action: argparse.ArgumentParser) -> None:
    action.add_argument("--vocabulary", required=True, type=Path, metavar="vocab.txt")
    action.add_argument(
        "--extra-pieces", type=_positive, default=0, metavar="N", help="ids beyond the vocabulary; VCR has 81"
    )
    action.add_argument("--answers", type=Path, metavar="JSON", help="the answer list of question answering")
    action.add_argument("--extractor", default="unknown", help="what computed the features, with its version")
    action.add_argument("--source", default="", help="the data in words; default: the names of the files")
    action.add_argument("--allow-rejected", action="store_true", help="leave out what cannot be converted")
    action.add_argument("out", type=Path)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


# Imports below are local because torch and friends take seconds, which `--help` and a typing error should not cost.


def _train(parsed: argparse.Namespace) -> int:
    from villa_ds.train.signals import StopRequest  # noqa: PLC0415

    stop = StopRequest().watch()  # before the seconds that the next import takes
    from villa_ds.train.loop import train  # noqa: PLC0415

    train(load_recipe(find_recipe(parsed.recipe), parsed.overrides), parsed.allow_change, stop)
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from villa_ds.train.predict import evaluate_checkpoint  # noqa: PLC0415

    named = [override for override in parsed.overrides if override.startswith("checkpoint=")]
    recipe = load_recipe(find_recipe(parsed.recipe), [item for item in parsed.overrides if item not in named])
    checkpoint = Path(named[-1].removeprefix("checkpoint=")) if named else None
    evaluate_checkpoint(recipe, checkpoint, parsed.limit)
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from villa_ds.models.weights import to_reference, write_weights  # noqa: PLC0415
    from villa_ds.train.checkpoint import resolve_checkpoint  # noqa: PLC0415
    from villa_ds.train.parameters import ParameterFiles  # noqa: PLC0415

    tensors = ParameterFiles(resolve_checkpoint(parsed.checkpoint)).state_dict()
    if parsed.layout == "uniter":
        tensors = to_reference(tensors)
    write_weights(parsed.out, {name: tensor.clone() for name, tensor in tensors.items()})
    print(f"{parsed.out}: {len(tensors)} tensors")
    return 0


def _compare(parsed: argparse.Namespace) -> int:
    from villa_ds.analysis.table import compare  # noqa: PLC0415

    print(compare(parsed.runs))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from villa_ds.doctor import doctor  # noqa: PLC0415

    print("\n".join(doctor()))
    return 0


def _trace(parsed: argparse.Namespace) -> int:
    from villa_ds.trace import trace  # noqa: PLC0415

    recipe = load_recipe(find_recipe(parsed.recipe), parsed.overrides)
    for row in trace(recipe, parsed.steps, parsed.world_size, parsed.workers):
        print(json.dumps(row))
    return 0


def _shards_demo(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.easy_vqa import demo  # noqa: PLC0415

    demo(parsed.out, images=parsed.images, processes=parsed.processes)
    return 0


def _shards_from_uniter_lmdb(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.uniter_lmdb import from_uniter_lmdb  # noqa: PLC0415

    return _convert(parsed, functools.partial(from_uniter_lmdb, parsed.out, parsed.images, parsed.texts))


def _shards_from_npz(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.npz import from_npz  # noqa: PLC0415
    from villa_ds.data.convert.region_files import Selection  # noqa: PLC0415

    keep = parsed.boxes
    if parsed.confidence is not None:
        keep = Selection(parsed.confidence, parsed.min_boxes, parsed.max_boxes)
    return _convert(parsed, functools.partial(from_npz, parsed.out, parsed.features, parsed.texts, keep=keep))


def _shards_from_tsv(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.tsv import from_tsv  # noqa: PLC0415

    convert = functools.partial(from_tsv, parsed.out, parsed.features, parsed.texts)
    return _convert(parsed, convert, detector_classes=parsed.detector_classes)


def _shards_to_npz(parsed: argparse.Namespace) -> int:
    from villa_ds.data.convert.to_npz import to_npz  # noqa: PLC0415

    print(f"{parsed.out}: {to_npz(parsed.folder, parsed.out)} images")
    return 0


def _convert(parsed: argparse.Namespace, convert: "Callable[[Settings], Account]", detector_classes: int = 0) -> int:
    """Call a converter with its settings and print its account, also where it refuses."""
    from villa_ds.data.convert.account import IncompleteError  # noqa: PLC0415
    from villa_ds.data.convert.settings import load_settings  # noqa: PLC0415

    settings = load_settings(
        parsed.vocabulary,
        parsed.answers,
        command=parsed.command_line,
        extractor=parsed.extractor,
        source=parsed.source,
        extra_pieces=parsed.extra_pieces,
        detector_classes=detector_classes,
        allow_rejected=parsed.allow_rejected,
    )
    try:
        print(convert(settings))
    except IncompleteError as error:
        print(error.account)
        raise
    return 0


def _shards_verify(parsed: argparse.Namespace) -> int:
    from villa_ds.data.verify import verify  # noqa: PLC0415

    report = verify(parsed.folder)
    print(report)
    report.check()
    return 0


def _shards_stat(parsed: argparse.Namespace) -> int:
    from villa_ds.data.statistics import stat  # noqa: PLC0415

    print(stat(parsed.folder))
    return 0
