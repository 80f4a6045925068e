"""Storage that all nodes share: what a restart mends and what it does not, and what a rank sees late."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ray_dwm.engine.identity import IDENTITY
from ray_dwm.engine.messages import say
from ray_dwm.engine.plain import damage
from ray_dwm.engine.saved import CONTENTS
from ray_dwm.errors import first_line

SIGHT_LIMIT_S = 90.0
"""For which a rank waits to see what rank 0 sees; network file systems remember what was not there for up to 60 s."""
_SAID_AFTER_S = 10.0
_POLL_S = 0.5
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FINAL = (*_FORBIDDEN, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def remedy(error: BaseException) -> str | None:
    """What the user must do about an error of writing, where a restart would meet it again.

    None of other errors, as EIO or ESTALE: a network file system gets over them.
    """
    if not isinstance(error, OSError) or error.errno not in _FINAL:
        return None
    todo = "allow writing there" if error.errno in _FORBIDDEN else "free space there"
    return f"{todo} and start the same command again; the last checkpoint is intact"


class Writer(FileSystemWriter):
    """DCP's own, but it raises what the system said, which torch's writer of zips hides behind an error of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See StorageWriter."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            hidden = error.__context__
            while hidden is not None and not isinstance(hidden, OSError):
                hidden = hidden.__context__
            raise hidden or error from None


def digest(checkpoint: Path) -> str:
    """Of what says which checkpoint it is: a folder of the same name may have been written twice."""
    try:
        parts = [(checkpoint / name).read_bytes() for name in (CONTENTS, IDENTITY)]
    except OSError:
        return ""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def await_sight(checkpoint: Path, expected: str) -> str | None:
    """Wait, on this rank, until it sees a checkpoint that is good on rank 0, where its `digest` is `expected`.

    Returns:
        Which rank on which node sees what instead after SIGHT_LIMIT_S seconds; None where it sees the checkpoint.
    """
    start, said = time.monotonic(), os.environ.get("LOCAL_RANK", "0") != "0"  # one word from a node is enough
    while (reason := _blurred(checkpoint, expected)) is not None:
        waited, who = time.monotonic() - start, f"rank {dist.get_rank()} on node {socket.gethostname()}"
        if waited >= SIGHT_LIMIT_S:
            return f"{who}: {reason}"
        if waited >= _SAID_AFTER_S and not said:
            said = True
            told = f"waiting for up to {SIGHT_LIMIT_S:g} s until {who} sees {checkpoint.name} as rank 0 does ({reason})"
            say(checkpoint.parents[1], told)
        time.sleep(_POLL_S)
    return None


def _blurred(checkpoint: Path, expected: str) -> str | None:
    try:
        reason = damage(checkpoint)
    except OSError as error:
        reason = first_line(error)
    return reason or (None if digest(checkpoint) == expected else "it is another one there")
