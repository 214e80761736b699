"""Fetches and keeps open the shards of a remote set, prints one line; for tests to kill: URL CACHE GIB [SHARD]."""

import sys

from villa_ds.config import DataConfig
from villa_ds.data.manifest import load_manifest

url, cache, gib, *names = sys.argv[1:]
manifest = load_manifest(url, DataConfig(cache=cache, cache_gib=float(gib), timeout_s=20))
chosen = [shard for shard in manifest.shards if not names or shard.name in names]
files = [manifest.store.open(shard.name, shard.sha256, shard.bytes) for shard in chosen]
print(sum(len(file.read()) for file in files), sum(len(array) for array in manifest.index.values()))
