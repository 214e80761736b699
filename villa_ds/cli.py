"""The command line: `villa-ds` or `python -m villa_ds`. Exit codes: docs/reliability.md."""

import argparse
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from villa_ds import __version__
from villa_ds.cli_shards import above_zero, add_extractor, add_shards, positive
from villa_ds.config import load_recipe
from villa_ds.errors import EXIT_INTERRUPTED, ConfigError, DataError, VillaError
from villa_ds.files import replace_file
from villa_ds.resources import find_recipe
from villa_ds.train.ending import end

DISK_ERRORS = (  # not of our making: the disk's, and of paths that cannot be what they were given as
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
MEMORY_MEND = (
    "lower data.tokens, data.lanes, data.prefetch or the model's sizes; `villa-ds estimate` says what a model takes"
)
CLEAR_LINE = "\r\x1b[K"


def program() -> NoReturn:
    """`villa-ds`: `main`, and the end of the process."""
    end(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an error that the user can mend into one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this: a file opened later must not get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
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
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one, while Python puts its things away, ends that
        _complain(parsed.interrupted)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        return 0
    except (MemoryError, OSError, RuntimeError) as error:
        refused = _refused(error)
        if refused is None:
            raise
        _complain(refused)
        return VillaError.exit_code
    return result


def _complain(message: str) -> None:
    """One line on stderr, in place of the progress that a terminal may still show."""
    print(f"{CLEAR_LINE if sys.stderr.isatty() else ''}villa-ds: {message}", file=sys.stderr)


def _refused(error: Exception) -> str | None:
    """What the machine refused, with the mend; None of an error that is a bug."""
    if _no_memory(error):
        said = next(iter(str(error).splitlines()), type(error).__name__)
        return f"not enough memory: {said}; {MEMORY_MEND}"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise `ulimit -n`, or lower data.workers"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.filename or 'a file or the standard output'}: {error.strerror}; mend that, start again"
    return None


def _no_memory(error: Exception) -> bool:
    """Whether the machine or a device had none left; torch says so in a RuntimeError, numpy in a MemoryError."""
    words = ("can't allocate memory", "out of memory") if isinstance(error, RuntimeError) else ()
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(word in str(error) for word in words)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="villa-ds", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(interrupted="interrupted")  # what is said of a Ctrl-C
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher gives it; LOCAL_RANK says the same
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_shards(commands.add_parser("shards", help="make, check and describe shard sets"))

    command = commands.add_parser("train", help="pre-train or fine-tune; resumes by itself from its run directory")
    _add_recipe(command)
    command.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="a recipe key that may differ on a resume"
    )
    command.set_defaults(run=_train, interrupted="interrupted; the same command goes on from the last checkpoint")

    command = commands.add_parser(
        "evaluate", help="metrics and predictions on held-out sets, also of several checkpoint=... together"
    )
    _add_recipe(command)
    command.add_argument("--limit", type=positive, default=0, help="micro-batches a task")
    command.add_argument(
        "--initial", action="store_true", help="the model before its first step, as initialize= makes it (zero-shot)"
    )
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("predict", help="what a trained run says about new pictures and texts")
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directories or checkpoints; several vote"
    )
    add_extractor(command)
    asked = command.add_mutually_exclusive_group(required=True)
    asked.add_argument("--image", type=Path, metavar="FILE", help="one picture, asked about with --text")
    asked.add_argument("--images", type=Path, metavar="FOLDER", help="PNG and JPEG files, asked about with --texts")
    command.add_argument("--text", action="append", default=[], help="a question or statement; may be repeated")
    command.add_argument("--texts", type=Path, metavar="JSONL", help='lines of {"id": ..., "image": ..., "text": ...}')
    command.add_argument("--objective", help="which of the run's tasks; needed if there are several")
    command.add_argument("--top", type=positive, default=5, metavar="K", help="alternatives to list")
    command.add_argument("--processes", type=positive, default=None, help="that extract regions")
    command.add_argument("--device", help="of the model; default: CUDA if there is one")
    command.add_argument("--out", type=Path, metavar="JSONL", help="default: the terminal")
    command.set_defaults(run=_predict)

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

    _add_report(
        commands.add_parser("report", help="runs side by side, looked inside: one HTML file, its numbers as JSON")
    )

    _add_estimate(commands.add_parser("estimate", help="memory, communication and time of a recipe, per ZeRO stage"))

    commands.add_parser("doctor", help="what is installed, which kernels will run").set_defaults(run=_doctor)

    command = commands.add_parser("trace", help="what the loaders deliver: one JSON line per global micro-batch")
    _add_recipe(command)
    command.add_argument("--steps", type=positive, required=True, help="optimizer steps")
    command.add_argument("--world-size", type=positive, default=1, help="ranks whose loaders are run")
    command.add_argument("--workers", type=int, default=0, help="loader processes a rank")
    command.set_defaults(run=_trace)
    return parser


def _add_estimate(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument("--gpus", type=positive, default=1, help="devices, one rank each")
    command.add_argument("--gpu-memory-gib", type=above_zero, default=80.0, metavar="G")
    command.add_argument(
        "--tflops", type=above_zero, default=312.0, help="of a device at its best (an A100's in bfloat16)"
    )
    command.add_argument(
        "--utilisation", type=above_zero, default=0.35, help="share of it that training reaches; assumed"
    )
    command.set_defaults(run=_estimate)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a recipe file, or the name of one that ships, such as demo-pretrain")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted recipe keys, such as data.root=DIR")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directories or checkpoints, as PATH or LABEL=PATH")
    command.add_argument("--out", type=Path, required=True, metavar="HTML", help="the file to write; .json goes beside")
    command.add_argument(
        "--set", metavar="FOLDER", help="a shard set to look into; default: the first run's held-out one"
    )
    command.add_argument("--images", type=Path, metavar="FOLDER", help="pictures to draw attention on, by image name")
    command.add_argument(
        "--text", action="append", default=[], metavar="ID", help="a text of the set to draw; may be repeated"
    )
    command.add_argument("--maps", type=positive, default=4, metavar="N", help="texts to draw, without --text")
    command.add_argument("--limit", type=positive, default=600, metavar="N", help="images to probe and ask about")
    command.add_argument("--curves", type=Path, metavar="PNG", help="also draw the training curves as one picture")
    command.add_argument("--device", help="of the models; default: CUDA if there is one")
    command.set_defaults(run=_report)


# Imports below are local because torch and friends take seconds, which `--help` and a typing error should not cost.


def _train(parsed: argparse.Namespace) -> int:
    from villa_ds.train.signals import StopRequest  # noqa: PLC0415

    stop = StopRequest().watch()  # before the seconds that the next import takes
    from villa_ds.train.loop import train  # noqa: PLC0415

    train(load_recipe(find_recipe(parsed.recipe), parsed.overrides), parsed.allow_change, stop)
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from villa_ds.train.predict import evaluate_checkpoint, evaluate_ensemble  # noqa: PLC0415

    named = [override for override in parsed.overrides if override.startswith("checkpoint=")]
    recipe = load_recipe(find_recipe(parsed.recipe), [item for item in parsed.overrides if item not in named])
    checkpoints = [Path(item.removeprefix("checkpoint=")) for item in named]
    if checkpoints and parsed.initial:
        raise ConfigError(f"{named[0]}: --initial asks for the model before its first step: leave out one of the two")
    if len(checkpoints) > 1:
        evaluate_ensemble(recipe, checkpoints, parsed.limit)
    else:
        evaluate_checkpoint(recipe, checkpoints[0] if checkpoints else None, parsed.limit, initial=parsed.initial)
    return 0


def _predict(parsed: argparse.Namespace) -> int:
    if bool(parsed.text) != bool(parsed.image) or bool(parsed.texts) != bool(parsed.images):
        raise ConfigError("--image goes with --text, --images with --texts")
    from villa_ds.data.convert.extractors import load_extractor  # noqa: PLC0415
    from villa_ds.predict import Predictor, single_picture  # noqa: PLC0415

    predictor = Predictor(
        parsed.runs, load_extractor(parsed.extractor, parsed.settings), parsed.objective, parsed.device
    )
    asked = failed = 0
    written: list[str] = []
    with contextlib.ExitStack() as stack:
        images, texts = parsed.images, parsed.texts
        if parsed.image is not None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="villa-ds-")))
            images, texts = single_picture(scratch, parsed.image, parsed.text)
        if parsed.out is not None:
            parsed.out.parent.mkdir(parents=True, exist_ok=True)
        write = sys.stdout.write if parsed.out is None else written.append
        for row in predictor.ask(images, texts, parsed.top, parsed.processes):
            write(json.dumps(row, ensure_ascii=False) + "\n")
            asked, failed = asked + 1, failed + ("error" in row)
    if parsed.out is not None:
        replace_file(parsed.out, "".join(written).encode())
    if failed:
        raise DataError(f'{failed} of {asked} texts have no answer: see "error" in their lines')
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from villa_ds.models.weights import to_reference  # noqa: PLC0415
    from villa_ds.tensor_files import write_weights  # noqa: PLC0415
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


def _report(parsed: argparse.Namespace) -> int:
    from villa_ds.analysis.looking import Inside  # noqa: PLC0415
    from villa_ds.analysis.report import report  # noqa: PLC0415

    inside = Inside(parsed.set, parsed.text, parsed.maps, parsed.limit, parsed.images, parsed.curves)
    print(report(parsed.runs, parsed.out, inside, parsed.command_line, parsed.device))
    return 0


def _estimate(parsed: argparse.Namespace) -> int:
    from villa_ds.estimate import GIB, Hardware, estimate  # noqa: PLC0415

    hardware = Hardware(parsed.gpus, parsed.gpu_memory_gib * GIB, parsed.tflops * 1e12, parsed.utilisation)
    print("\n".join(estimate(load_recipe(find_recipe(parsed.recipe), parsed.overrides), hardware)))
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
