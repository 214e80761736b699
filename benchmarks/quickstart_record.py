"""Keep the curves and results of a finished quickstart as the reference that new runs are held against.

python benchmarks/quickstart_record.py quickstart
"""

import json
import shutil
import sys
from pathlib import Path

import record

from villa_ds.analysis.table import compare

RUNS = ("pretrain", "vqa-standard", "vqa-villa")


def main() -> None:
    """Copy metrics.jsonl and config.yaml of each run, and write the table and the circumstances."""
    folder = Path(sys.argv[1])
    target = record.RESULTS / "quickstart"
    seconds = {}
    for run in RUNS:
        (target / run).mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "config.yaml"):
            shutil.copyfile(folder / run / name, target / run / name)
        rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        seconds[run] = sum(row["seconds"] for row in rows)
    table = compare([folder / run for run in RUNS])
    (target / "table.txt").write_text(table + "\n")
    record.write("quickstart/record", {**record.environment(), "training_seconds": seconds})
    print(table)


if __name__ == "__main__":
    main()
