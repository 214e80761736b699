"""The end of a rank, in which the threads of torch.distributed must not meet that of the interpreter.

They drop tensors that Python made, which takes the interpreter. One that comes for it after it has begun to end aborts
the process ("terminate called without an active exception", exit code -6), although all its work is done.
"""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn


def leave_ranks() -> None:
    """End the threads of torch.distributed that can be ended: not those of groups that DeepSpeed still holds."""
    if is_rank():
        sys.modules["torch.distributed"].destroy_process_group()


def is_rank() -> bool:
    """Whether this process has met others."""
    distributed = sys.modules.get("torch.distributed")  # not imported here, which takes a second
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def end(code: int) -> NoReturn:
    """`sys.exit(code)` in the main thread of a process that may be a rank.

    In a rank threads are waited for, exit functions run and output is flushed, but the interpreter does not end.
    """
    if not is_rank():
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # the interpreter's own first act: also ends idle executors
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader left, or it is closed
            stream.flush()
    os._exit(code)
