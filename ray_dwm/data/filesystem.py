"""What a file system must be able to do for a run."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path


def lacking(folder: Path) -> str | None:
    """What the file system of a folder cannot do that a run needs; tried there, and nothing stays.

    A view of an object store may take files and still have none of this.
    """
    file, made, renamed = folder / "tried", folder / "tried.tmp", folder / "tried.whole"
    what = "write a file"
    try:
        file.write_text("a")
        what = "append to a file"
        with file.open("a") as stream:
            stream.write("b")
        if file.read_text() != "ab":
            return what
        what = "lock a file"
        with file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        what = "rename a folder"
        made.mkdir()
        file.rename(made / file.name)
        made.rename(renamed)
        return None
    except OSError as error:
        return f"{what} ({error.strerror})"
    finally:
        file.unlink(missing_ok=True)
        for left in (made, renamed):
            shutil.rmtree(left, ignore_errors=True)
