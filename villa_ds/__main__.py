"""`python -m villa_ds`, which is also what `deepspeed --module villa_ds` and `srun` start."""

import sys

from villa_ds.cli import main

sys.exit(main())
