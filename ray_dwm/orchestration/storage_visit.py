"""What a node does when it is asked whether it sees the storage.

Apart from who asks (doctor_probes.py), because every run on several nodes waits for this task's processes: they import
this and nothing of torch.
"""

from __future__ import annotations

import time
from pathlib import Path

from ray_dwm.data.manifest import file_sha256

SEE_TIMEOUT_S = 10.0
"""A network file system may show a new file late."""


def visit(folder: str, node: str, token: str, digests: dict[str, str]) -> list[str]:
    """On a node: what is wrong there with the driver's file, with this node's own and with the data."""
    problems = []
    if not appears(Path(folder) / "driver", token):
        return [f"does not see {Path(folder).parent}"]
    try:
        (Path(folder) / node).write_text(token)
    except OSError as error:
        problems.append(f"cannot write {Path(folder).parent} ({error.strerror})")
    for path, digest in digests.items():
        if not Path(path).is_file():
            problems.append(f"does not see {path}")
        elif file_sha256(Path(path)) != digest:
            problems.append(f"has another {path}")
    return problems


def appears(path: Path, content: str) -> bool:
    """Whether a file comes to have this content."""
    deadline = time.monotonic() + SEE_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False
