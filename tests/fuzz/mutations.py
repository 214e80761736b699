"""Ways to spoil shard sets, recipes, checkpoints, weights and journals: random, but the same for the same generator."""

import contextlib
import copy
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from villa_ds.data.manifest import FURTHER_DTYPES, INDEX_DTYPES, fingerprint_of

Files = dict[str, bytes]  # name -> content of a folder
BLOCK = 512
MARKER = "FUZZ_PICKLE_MARKER"  # an environment variable that names the file which a loaded pickle would write

NASTY_TEXTS = (
    "",
    "x" * 3000,
    "../../evil",
    "/etc/passwd",
    "a/b",
    "..",
    "\0",
    "\ud800",
    "ü" * 50,
    "NaN",
    "1e999",
    "%s{0}",
)
NASTY_NUMBERS = (0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**64, -(2**70), 10**30, 0.5, -0.0, 1e308)
NASTY_VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], {"": None}, [1, "a", None], float("nan"), float("inf"),
    *NASTY_NUMBERS, *NASTY_TEXTS,
)  # fmt: skip


# Bytes


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, BLOCK - 1, len(data) // 2, max(0, len(data) - 1), rng.randrange(len(data) + 1)))]


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    junk = rng.choice((b"\0", b"\n", b"\xff\xfe", rng.randbytes(rng.choice((1, 7, BLOCK))), b"\0" * BLOCK, b"{" * 2000))
    return data[:place] + junk + data[place:]


def remove(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[place + rng.choice((1, 2, 7, BLOCK, 2 * BLOCK)) :]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    junk = rng.choice((b"\0", b"\xff", b"9")) * rng.choice((1, 4, 16, BLOCK))
    return data[:place] + junk[: len(data) - place] + data[place + len(junk) :]


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    """Two 512-byte blocks change places: still a multiple of the tar's block, often still sound headers."""
    blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
    if len(blocks) > 1:
        left, right = rng.sample(range(len(blocks)), 2)
        blocks[left], blocks[right] = blocks[right], blocks[left]
    return b"".join(blocks)


BYTES: Sequence[Callable[[bytes, random.Random], bytes]] = (flip_bits, cut, insert, remove, overwrite, swap_blocks)


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(BYTES)(data, rng)


# JSON


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything within a JSON value but itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*path, key), *places(item, (*path, key)))]


def edit(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places replaced, removed, added or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        chosen = places(value)
        if not chosen:
            return rng.choice(NASTY_VALUES)
        *parents, last = rng.choice(chosen)
        node = value
        for key in parents:
            node = node[key]
        kind = rng.randrange(6)
        if kind == 0:
            del node[last]
        elif kind == 1 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[last]))
        elif kind == 1:
            node[rng.choice(("more", "", "schema", "shards"))] = rng.choice(NASTY_VALUES)
        elif kind == 2 and isinstance(node[last], (int, float)) and not isinstance(node[last], bool):
            node[last] += rng.choice((-1, 1, 512, -512, 0.5))
        else:
            node[last] = copy.deepcopy(rng.choice(NASTY_VALUES))
    return value


def as_json(value: Any, rng: random.Random) -> bytes:
    """Its text, now and then in an unusual coding or form."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    kind = rng.randrange(12)
    if kind == 0:
        return text.encode("utf-16", "replace")
    if kind == 1:
        return b"\xef\xbb\xbf" + text.encode(errors="replace")
    if kind == 2:
        return text.encode(errors="replace").replace(b":", b":" + b"[" * 100_000, 1)
    if kind == 3:
        return text.encode(errors="replace").replace(b"1", b"1" * 5000, 1)
    return text.encode(errors="surrogatepass")


# .npy


class Payload:
    """Unpickling it writes the marker."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        code = f"open(__import__('os').environ['{MARKER}'], 'w').write('loaded')"
        return exec, (code,)


def npy_header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    body = text.encode("latin1", "replace") + b"\n"
    size = len(body).to_bytes(2 if version[0] == 1 else 4, "little", signed=False) if len(body) < 65536 else b"\xff\xff"
    return b"\x93NUMPY" + bytes(version) + size + body


def spoil_npy(data: bytes, rng: random.Random) -> bytes:
    """The `.npy` file with its array or its header changed."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    stream = io.BytesIO()
    kind = rng.randrange(12)
    if kind == 0:
        objects = np.empty(2, object)
        objects[:] = [Payload(), Payload()]
        np.save(stream, objects, allow_pickle=True)
    elif kind == 1:
        np.lib.format.write_array(stream, array, version=rng.choice(((2, 0), (3, 0))))
    elif kind == 2:
        np.save(stream, np.asfortranarray(array))
    elif kind == 3:
        np.save(
            stream, array.astype(rng.choice(("float64", "float32", ">f2", "int8", "S3", "?", "complex64", "m8[s]")))
        )
    elif kind == 4:
        np.save(stream, array[: rng.randrange(len(array) + 1)] if rng.random() < 0.5 else array[..., :1])
    elif kind == 5:
        np.save(stream, rng.choice((array[None], array.ravel(), np.zeros((0, 2**40), array.dtype), np.array(3))))
    elif kind == 6 and array.dtype.kind in "fiu":
        changed = array.copy()
        limits = np.finfo(array.dtype) if array.dtype.kind == "f" else np.iinfo(array.dtype)
        nasty = [0, 1, 2, limits.min, limits.max, *((-1, np.nan, np.inf) if array.dtype.kind == "f" else ())]
        changed.reshape(-1)[rng.randrange(max(1, array.size))] = rng.choice(nasty)
        np.save(stream, changed)
    else:
        shape = rng.choice(
            (array.shape, (2**62, 4), (-1, 5), (-2, -3), (0, 2**70), (True, 2), (10**30,), (), ((1, 2), 3), "x", (1.5,))
        )
        descr = rng.choice(
            (
                array.dtype.str,
                "|O",
                "<f2",
                "|V0",
                "|S0",
                "<U9",
                "M8[ns]",
                [("a", "<f2"), ("b", "|O")],
                "f2,O",
                "junk",
                7,
            )
        )
        text = rng.choice((
            f"{{'descr': {descr!r}, 'fortran_order': {rng.choice((False, True, 0))}, 'shape': {shape!r}, }}",
            "(" * 5000, "{'descr': " * 900, "[]", "{}", "__import__('os')", "{'shape': 1", " " * 60000, "\0\0",
        ))  # fmt: skip
        return npy_header(text, rng.choice(((1, 0), (1, 0), (2, 0), (9, 9)))) + array.tobytes()
    return stream.getvalue()


# Tars


def members_of(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    """ValueError if tarfile cannot cope with what it is given, which was spoilt before then."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = [(member, archive.extractfile(member)) for member in archive]
            return [(member, file.read() if file else b"") for member, file in files]
    except Exception as error:  # noqa: BLE001
        raise ValueError(str(error)) from None


def written(members: Sequence[tuple[tarfile.TarInfo, bytes]], rng: random.Random) -> bytes:
    """A tar of these; now and then in another format than the writer's."""
    stream = io.BytesIO()
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for member, content in members:
            member.size = len(content)
            try:
                archive.addfile(member, io.BytesIO(content))
            except (ValueError, UnicodeEncodeError, OverflowError):
                continue  # the format cannot hold such a name or number
    return stream.getvalue()


TYPES = (
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE,
    tarfile.AREGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, b"Z",
)  # fmt: skip
NAMES = (
    "../../evil.json",
    "/etc/passwd",
    "x" * 300 + ".json",
    "noext",
    ".json",
    "",
    "g00000/..//json",
    "g\0.json",
    "ü.json",
)


def spoil_members(data: bytes, rng: random.Random) -> bytes:
    """Members repeated, left out, exchanged, renamed, of other types, or with other content."""
    members = members_of(data)
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(members))
        member, content = members[place]
        kind = rng.randrange(9)
        if kind == 0 and len(members) > 1:
            del members[place]
        elif kind == 1:
            members.insert(rng.randrange(len(members) + 1), (copy.copy(member), content))
        elif kind == 2:
            rng.shuffle(members)
        elif kind == 3:
            member.name = rng.choice((*NAMES, member.name + "x", members[rng.randrange(len(members))][0].name))
        elif kind == 4:
            member.type, member.linkname = rng.choice(TYPES), rng.choice(("", "/etc/passwd", "../../evil", member.name))
        elif kind == 5:
            member.pax_headers = rng.choice((
                {"size": "999999999999"}, {"size": "-5"}, {"path": "../../evil"}, {"GNU.sparse.map": "0,1,x"},
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"GNU.sparse.size": "1e3"}, {"mtime": "x" * 9000},
                {"hdrcharset": "BINARY"}, {"linkpath": "/etc/passwd"},
            ))  # fmt: skip
        elif member.name.endswith(".npy"):
            members[place] = (member, spoil_npy(content, rng))
        else:
            members[place] = (member, as_json(edit(json.loads(content), rng), rng))
    return written(members, rng)


def spoil_header(data: bytes, rng: random.Random) -> bytes:
    """A field of a header overwritten, with a good checksum."""
    changed = bytearray(data)
    offset = rng.choice([member.offset for member, _ in members_of(data)])
    start, stop, values = rng.choice((
        (0, 100, (b"../../evil.json", b"/abs.json", b"\xff" * 100, b"")),
        (124, 136, (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"junk", b"-0000000001\0", b"0" * 11, b"")),
        (156, 157, TYPES),
        (157, 257, (b"/etc/passwd", b"../x")),
        (257, 265, (b"ustar  \0", b"ustar\00000", b"\0" * 8, b"junkjunk")),
        (345, 500, (b"../../..", b"/etc", b"y" * 155)),
        (386, 512, (rng.randbytes(126), b"\x80" * 126)),
    ))  # fmt: skip
    value = rng.choice(values)
    changed[offset + start : offset + stop] = value[: stop - start].ljust(stop - start, b"\0")
    changed[offset + 148 : offset + 156] = b" " * 8
    total = sum(changed[offset : offset + BLOCK])
    changed[offset + 148 : offset + 156] = f"{total:06o}\0 ".encode()
    return bytes(changed)


# Whole folders


def spoil_tar(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(name for name in files if name.endswith(".tar")))
    spoil = rng.choice((any_bytes, spoil_members, spoil_members, spoil_members, spoil_header))
    try:
        files[name] = spoil(files[name], rng)
    except (ValueError, RecursionError):  # spoilt once already
        files[name] = any_bytes(files[name], rng)


def spoil_index(files: Files, rng: random.Random) -> None:
    known = [name for name in (*INDEX_DTYPES, *FURTHER_DTYPES) if f"{name}.npy" in files]
    further = [name for name in known if name in FURTHER_DTYPES]
    name = f"{rng.choice(further if further and rng.random() < 0.5 else known)}.npy"
    spoil = rng.choice((any_bytes, spoil_npy, spoil_values, spoil_values))
    try:
        files[name] = spoil(files[name], rng)
    except (
        ValueError,
        EOFError,
        IndexError,
        OverflowError,
        MemoryError,
        SyntaxError,
        TypeError,
    ):  # spoilt once already
        files[name] = any_bytes(files[name], rng)


def spoil_values(data: bytes, rng: random.Random) -> bytes:
    """Some entries of an index array replaced, or all of them in another order."""
    array = np.load(io.BytesIO(data)).copy()
    if rng.random() < 0.2:
        np.random.default_rng(rng.randrange(1000)).shuffle(array)
    elif array.dtype.kind == "S":
        array[rng.randrange(len(array))] = rng.choice((b"", b"\xff\xfe", "ü".encode(), b"a\nb", array[0]))
    else:
        limits = np.iinfo(array.dtype)
        values = (0, 1, -1, limits.max, limits.min, 512, 100, len(array), int(array[0]), int(array[-1]))
        array[rng.randrange(len(array)) :: rng.choice((1, 2, len(array)))] = rng.choice(values)
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def spoil_manifest(files: Files, rng: random.Random) -> None:
    if rng.random() < 0.2:
        files["manifest.json"] = any_bytes(files["manifest.json"], rng)
        return
    content = json.loads(files["manifest.json"])
    if isinstance(content, dict) and rng.random() < 0.3:  # not the whole tree alike: it is mostly shards
        key = rng.choice(sorted(content))
        content[key] = rng.choice((rng.choice(NASTY_VALUES), edit(content[key], rng)))
    else:
        content = edit(content, rng)
    if isinstance(content, dict) and rng.random() < 0.8:
        reprinted(content)
    files["manifest.json"] = as_json(content, rng)


def reprinted(content: dict[str, Any]) -> None:
    """The fingerprint that belongs to it, if it can have one."""
    try:
        content["fingerprint"] = fingerprint_of(content)
    except (ValueError, TypeError):
        return


def reseal(files: Files, rng: random.Random) -> None:
    """Sizes, checksums and offsets are made to fit, so that what is wrong is met deeper."""
    try:
        content = json.loads(files["manifest.json"])
        if rng.random() < 0.7:
            files["group_offset.npy"] = offsets_of(files, content["shards"])
        for shard in content["shards"]:
            data = files[shard["name"]]
            shard["bytes"], shard["sha256"] = len(data), hashlib.sha256(data).hexdigest()
        content["index_files"] = {
            name: hashlib.sha256(files[f"{name}.npy"]).hexdigest() for name in content["index_files"]
        }
        reprinted(content)
    except Exception:  # noqa: BLE001 (spoilt beyond mending)
        return
    files["manifest.json"] = json.dumps(content).encode(errors="surrogatepass")


def offsets_of(files: Files, shards: Sequence[Mapping[str, Any]]) -> bytes:
    """Where the groups of the tars begin now, as far as they can be read; the old places beyond."""
    old = np.load(io.BytesIO(files["group_offset.npy"]))
    found: list[int] = []
    for shard in shards:
        keys: dict[str, int] = {}
        try:
            for member, _ in members_of(files[shard["name"]]):
                keys.setdefault(member.name.partition(".")[0], member.offset)
        except ValueError:
            return files["group_offset.npy"]
        found += [*keys.values()][: int(shard["groups"])]
    array = old.copy()
    count = min(len(found), len(array))
    array[:count] = found[:count]
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def spoil_set(files: Files, rng: random.Random) -> None:
    """One to three things wrong with a shard set."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(Exception):  # spoilt once already
            rng.choice((spoil_tar, spoil_tar, spoil_tar, spoil_index, spoil_manifest))(files, rng)
    if rng.random() < 0.6:
        reseal(files, rng)


# Recipes and journals

BAD_YAML = (
    "!!python/object/apply:os.system ['touch evil']", "!!binary x", "&a [*a]", "*unknown", "{? [1]: 2}", "2001-99-99",
    "\t- x", "!!set {a}", "!!timestamp 2001-01-01", "&a {b: &c [x, x], d: *c}", "0x" + "f" * 400,
    "1:2:3:4", "<<: 5", "!!omap [1]",
)  # fmt: skip
BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


def spoil_recipe(text: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        return any_bytes(text, rng)
    if kind == 1:
        return text + BOMB.encode()
    if kind == 2:
        lines = text.splitlines()
        place = rng.randrange(len(lines))
        lines[place] = lines[place].split(b":")[0] + b": " + rng.choice(BAD_YAML).encode()
        return b"\n".join(lines)
    return yaml.safe_dump(edit(yaml.safe_load(text), rng)).encode(errors="surrogatepass")


def spoil_lines(data: bytes, rng: random.Random) -> bytes:
    """A journal of JSON lines with one line changed, or its bytes."""
    lines = data.splitlines(keepends=True)
    if rng.random() < 0.5 or not lines:
        return any_bytes(data, rng)
    place = rng.randrange(len(lines))
    lines[place] = as_json(edit(json.loads(lines[place]), rng), rng) + b"\n"
    return b"".join(lines)


# Tensors


def spoil_tensors(data: bytes, rng: random.Random) -> bytes:
    """A .safetensors file with its header or its bytes changed."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(8)
    if kind < 3 or size > len(data):
        return any_bytes(data, rng)
    if kind == 3:  # of another length than it says
        said = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, 100_000_001))
        return said.to_bytes(8, "little") + header + body
    if kind == 4:
        content = json.loads(header)
        name = rng.choice(sorted(content))
        described = content[name]
        if name == "__metadata__":
            content[name] = edit(described, rng)
        else:
            field, values = rng.choice((
                ("dtype", ("F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", None)),
                ("shape", ([], [0], [-1], [2**62, 4], [1, *described["shape"]], described["shape"][::-1], [1.5], "x")),
                ("data_offsets", ([0, 0], [0, 2**63], [8, 4], [0, len(body)], [-4, 0], [1], None)),
            ))  # fmt: skip
            described[field] = rng.choice(values)
        text = json.dumps(content).encode()
    elif kind == 5:  # names that are given twice, or are none of the model's
        content = json.loads(header)
        name = rng.choice(sorted(content))
        content[rng.choice((*(text for text in NASTY_TEXTS if text.isprintable()), *content))] = content.pop(name)
        text = json.dumps(content).encode()
    else:
        text = as_json(edit(json.loads(header), rng), rng)
    return len(text).to_bytes(8, "little") + text + body


# Checkpoints

ELSEWHERE = (
    "../../evil",
    "/etc/passwd",
    "rank-00000/../run.json",
    "..",
    "",
    "rank-00000",
    "manifest.json",
    "/dev/zero",
)


def spoil_checkpoint(files: Files, others: Sequence[Files], rng: random.Random) -> None:
    """Something wrong with the checkpoints of a run: `files` by their path in its folder, `others` of other runs."""
    folder = rng.choice(sorted({name.partition("/")[0] for name in files if "/" in name}))
    inside = sorted(name for name in files if name.startswith(f"{folder}/"))
    name, kind = rng.choice(inside), rng.randrange(9)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = any_bytes(files[name], rng)
    elif kind <= 3 and name.endswith(".json"):
        files[name] = as_json(edit(json.loads(files[name]), rng), rng)
    elif kind <= 3:
        files[name] = spoil_tensors(files[name], rng)
    elif kind == 4:  # a file of another checkpoint, here or of another run
        tail = name.partition("/")[2]
        files[name] = rng.choice([
            content for each in (files, *others) for path, content in each.items() if path.partition("/")[2] == tail
        ])  # fmt: skip
    elif kind == 5:  # a file more
        tensors = rng.choice(
            [content for each in (files, *others) for path, content in each.items() if "state-" in path]
        )
        more = rng.choice(
            ("rank-00000/state-00001-of-00002", "rank-00001/state-00001-of-00002", "state-00000-of-00001")
        )
        files[f"{folder}/{more}.safetensors"] = tensors
    elif kind == 6:  # a whole checkpoint under another name, or of another run
        source = rng.choice((files, *others))
        step = rng.choice(sorted({path.partition("/")[0] for path in source if "/" in path}))
        name = rng.choice((folder, step, "step-00000007", "step-000000000008", "step-x", "step-3"))
        for path in [path for path in files if path.startswith(f"{name}/")]:
            del files[path]
        copied = {path: content for path, content in source.items() if path.startswith(f"{step}/")}
        files.update({f"{name}/{path.partition('/')[2]}": content for path, content in copied.items()})
    else:
        _spoil_listing(files, f"{folder}/manifest.json", rng)


def _spoil_listing(files: Files, name: str, rng: random.Random) -> None:
    """A file that the manifest names elsewhere, or not at all."""
    content = json.loads(files[name])
    listed = content["files"]
    path = rng.choice(sorted(listed))
    entry = listed.pop(path)
    if rng.random() < 0.7:
        listed[rng.choice(ELSEWHERE)] = entry
    files[name] = json.dumps(content).encode()


def reseal_checkpoints(files: Files, rng: random.Random) -> None:
    """Sizes and checksums are made to fit, now and then with what is there and not listed."""
    for name in [name for name in files if name.endswith("/manifest.json")]:
        folder = name.removesuffix("manifest.json")
        with contextlib.suppress(Exception):  # spoilt beyond mending
            content = json.loads(files[name])
            there = {path.removeprefix(folder) for path in files if path.startswith(folder)} - {"manifest.json"}
            known = there if rng.random() < 0.5 else there & content["files"].keys()
            content["files"] = {
                path: {"bytes": len(files[folder + path]), "sha256": hashlib.sha256(files[folder + path]).hexdigest()}
                for path in sorted(known)
            }
            files[name] = json.dumps(content).encode()


# Conversions


def spoil_conversion(files: Files, journal: str, other: Files, rng: random.Random) -> None:
    """Something wrong with what a killed conversion left; `other`: what one of another source left."""
    lines = files[journal].splitlines(keepends=True)
    kind, place = rng.randrange(8), rng.randrange(len(lines))
    if kind == 0:
        files[journal] = any_bytes(files[journal], rng)
    elif kind == 1:
        rng.shuffle(lines)
    elif kind == 2:
        del lines[place]
    elif kind == 3:
        lines.insert(rng.randrange(len(lines) + 1), lines[place])
    elif kind == 4:
        lines[place] = rng.choice(other[journal].splitlines(keepends=True))
    elif kind == 5:
        digest, _, text = lines[place].partition(b" ")
        lines[place] = digest + b" " + as_json(edit(json.loads(text), rng), rng) + b"\n"
    elif kind == 6:
        shard = rng.choice(sorted(name for name in files if name.endswith(".tar")))
        if rng.random() < 0.5:
            del files[shard]
        else:
            files[shard] = files[shard][: rng.randrange(len(files[shard]))]
    else:
        files[journal] = other[journal]
    if kind in (1, 2, 3, 4, 5):
        files[journal] = b"".join(lines)
    if rng.random() < 0.2:
        files[journal] = any_bytes(files[journal], rng)


def write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read(folder: Path) -> Files:
    """All files of a folder and below, by their path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
