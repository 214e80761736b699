"""`python -m villa_ds`, which is also what `deepspeed --module villa_ds` and `srun` start."""

from villa_ds.cli import program

program()
