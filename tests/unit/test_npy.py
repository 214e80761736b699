import mmap

import numpy as np
import pytest

from villa_ds.data import npy


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "S5"])
def test_view_gives_back_what_encode_took(dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    data = npy.encode(array)
    found = npy.view(data)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype
    assert not found.flags.writeable
    np.testing.assert_array_equal(npy.view(b"before" + data + b"after", 6, len(data)), array)


def test_encode_is_c_order_and_the_same_bytes_for_equal_arrays():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert npy.encode(np.asfortranarray(array)) == npy.encode(array)


def test_view_of_a_mapped_file_copies_nothing(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(npy.encode(np.arange(1000.0)))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found = npy.view(mapped)
    assert not found.flags.owndata
    assert found[999] == 999


def test_objects_are_neither_written_nor_read(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        npy.encode(np.array([{}]))
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"object|OBJECT"):
        npy.view((tmp_path / "a.npy").read_bytes())


def test_whatever_becomes_of_a_header_it_is_a_value_error_or_as_many_bytes():
    """Never another kind of error, a huge allocation or a short array."""
    good = npy.encode(np.arange(35, dtype=np.float32).reshape(5, 7))
    refused = 0
    for place in range(128):
        for value in (0, 9, 39, 40, 41, 45, 57, 79, 255):
            data = bytearray(good)
            data[place] = value
            try:
                array = npy.view(bytes(data))
            except ValueError:
                refused += 1
            else:
                assert array.nbytes == 35 * 4
    assert refused > 900


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: data[:40]]
)
def test_torn_or_padded_files_are_refused(change):
    with pytest.raises(ValueError, match=r"fill|magic|EOF"):
        npy.view(change(npy.encode(np.arange(5))))


def test_fortran_order_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(np.zeros((3, 4))))
    with pytest.raises(ValueError, match="Fortran order"):
        npy.view((tmp_path / "a.npy").read_bytes())
