"""`villa-ds shards ...` as typed."""

import pytest

from tests.shards import make_shards
from villa_ds.cli import main


def test_verify_whole_and_sampled(tmp_path, capsys):
    make_shards(tmp_path / "set", groups=6, shards=2)
    assert main(["shards", "verify", str(tmp_path / "set"), "--processes", "1"]) == 0
    assert capsys.readouterr().out.endswith("6 groups, 2 shards, all as they should be\n")
    assert main(["shards", "verify", str(tmp_path / "set"), "--sample", "2", "--seed", "3"]) == 0
    assert "2 of 6 groups; the rest not read" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["shards", "verify", str(tmp_path / "set"), "--sample", "2", "--processes", "2"])
    (tmp_path / "set" / "shard-000001.tar").unlink()
    assert main(["shards", "verify", str(tmp_path / "set"), "--sample", "2"]) == 3
    captured = capsys.readouterr()
    assert captured.out.startswith("shard-000001.tar: missing or unreadable\n")
    assert "copy the damaged files again" in captured.err
