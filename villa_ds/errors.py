"""Errors that a user can mend: one line that names the offending value and the mend.

`villa_ds.cli` turns each into a line on stderr and its `exit_code`; anything else is a bug and keeps its traceback.
"""

EXIT_INTERRUPTED = 130  # by Ctrl-C (SIGINT), the number that shells give it
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, requeue me
EXIT_RANK_LOST = 76  # a rank died or hung: start the job again from its last checkpoint


class VillaError(Exception):
    """Base class. Raise a subclass with a message that a user can act on."""

    exit_code = 2


class ConfigError(VillaError):
    """A recipe, an override or a DeepSpeed configuration is wrong; names the dotted key."""


class DataError(VillaError):
    """A shard set is not what it should be (missing manifest, wrong width, unknown schema); names the file."""


class DamageError(VillaError):
    """Bytes on disk are damaged (torn tar, checksum mismatch) beyond what the quarantine allows; names the shard."""

    exit_code = 3


class RemoteError(VillaError):
    """A remote shard set cannot be reached, or does not answer as it should; nothing is known to be damaged."""


class WeightsError(VillaError):
    """Weights do not fit the model; names the tensors and both shapes."""


class CheckpointError(VillaError):
    """A checkpoint or run directory does not fit the run; names the difference."""


class PreemptedError(VillaError):
    """The run was asked to stop and has saved: start it again to go on."""

    exit_code = EXIT_PREEMPTED


class RankLostError(VillaError):
    """A rank died, hung or never came: start the job again."""

    exit_code = EXIT_RANK_LOST


class NonFiniteError(VillaError):
    """A loss or gradient is not finite; raised before the update, names step and objective."""

    exit_code = 3


class RolledBackError(Exception):
    """The loop starts again from the newest checkpoint; never leaves `train`, and no user's matter."""
