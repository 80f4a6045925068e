"""`ray-dwm submit`: a file of jobs/ as a Ray job under a name that stays the same, watched to its end."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import shlex
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from ray_dwm import __version__
from ray_dwm.config import load, to_yaml
from ray_dwm.errors import ResourceError, UserError, first_line
from ray_dwm.orchestration.cluster import no_entry, probe
from ray_dwm.orchestration.follow import Watch
from ray_dwm.orchestration.upload import RUNTIME_ENV, Sizes, check_size, listing, read_runtime_env

_ADDRESS = "RAY_API_SERVER_ADDRESS"
_CONFIGURED = ("train", "prepare_data", "doctor")
"""Jobs that take a run's configuration and nothing else: it is checked here, and names them."""
_TIMEOUT_S = 10.0
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=")


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks for."""

    job: str
    """A file of jobs/, without its ending."""
    arguments: Sequence[str]
    """What the job gets; files are named from the working folder, which is where it runs."""
    working_dir: Path = Path()
    runtime_env: Path | None = None
    """None: runtime_env.yaml of the working folder, where there is one."""
    address: str = ""
    """Empty: the cluster that RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, or the one of this machine."""
    wait: bool = True


def submit(request: Request) -> int:
    """Submit a job, or follow the one that runs already; returns its exit code, 0 where it is not waited for.

    Raises:
        UserError: before anything was submitted.
        TrainingError: the cluster went away, or the job never ran.
    """
    environment = _environment(request)
    folder = request.working_dir
    sizes = listing(folder, environment.get("excludes") or ())
    _check_job(request, sizes)
    files, overrides = split(request.arguments)
    for file in files:
        check_file(folder, file, sizes)
    size = check_size(folder.absolute(), sizes)
    name, digest = identify(request.job, request.arguments, folder, files, overrides)
    client, jobs = connect(request.address)
    submission_id, running = attempt(f"{request.job}-{name}-{digest[:8]}", jobs)
    if running:
        print(f"[{submission_id}] is running already", flush=True)
    else:
        print(f"[{submission_id}] uploading {len(sizes)} files, {size / 2**20:.1f} MiB", flush=True)
        metadata = {"job": request.job, "name": name, "digest": digest, "ray_dwm": __version__}
        _start(client, request, submission_id, {**environment, "working_dir": str(folder.absolute())}, metadata)
    print(f"[{submission_id}] {client.get_address()}/#/jobs/{submission_id}", flush=True)
    return Watch(client, submission_id).attend() if request.wait else 0


def _environment(request: Request) -> dict[str, Any]:
    file = request.runtime_env or request.working_dir / RUNTIME_ENV
    return read_runtime_env(file) if request.runtime_env or file.is_file() else {}


def _check_job(request: Request, sizes: Sizes) -> None:
    jobs = sorted(path.stem for path in sizes if path.parent == Path("jobs") and path.suffix == ".py")
    if not jobs:
        raise UserError(
            f"working folder {request.working_dir.absolute()} has no jobs/*.py: --working-dir names the source tree"
        )
    if request.job not in jobs:
        near = difflib.get_close_matches(request.job, jobs, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no job {request.job!r}: {hint}It must be one of {', '.join(jobs)}")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(configuration files, overrides) among a job's arguments: --config FILE, a bare FILE.yaml, and KEY=VALUE."""
    files, overrides, before = [], [], ""
    for argument in arguments:
        if before == "--config":
            files.append(argument)
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        elif not argument.startswith("-"):
            a_value = before.startswith("--") and "=" not in before  # it may be one; an option may also take none
            if _OVERRIDE.match(argument) or ("=" in argument and not a_value):
                overrides.append(argument)
            elif argument.endswith((".yaml", ".yml")) and not a_value:
                files.append(argument)
        before = argument
    return files, overrides


def check_file(folder: Path, file: str, sizes: Sizes) -> None:
    """Make sure that the job will find a configuration file.

    Raises:
        UserError: it is outside of the working folder, not there, or not uploaded.
    """
    folder = folder.absolute()
    path = Path(os.path.normpath(folder / file))
    if not path.is_relative_to(folder):
        raise UserError(
            f"configuration file {file} lies outside of the working folder {folder}, which is all that the job gets: "
            f"copy it there, and name it as configs/{path.name}"
        )
    inside = path.relative_to(folder)
    if Path(file).is_absolute():
        raise UserError(f"configuration file {file} has another path where the job runs: name it as {inside}")
    if not path.is_file():
        raise UserError(f"configuration file {file} does not exist in the working folder {folder}")
    if inside not in sizes:
        raise UserError(f"configuration file {file} would not be uploaded: .gitignore or .rayignore leaves it out")


def identify(
    job: str, arguments: Sequence[str], folder: Path, files: Sequence[str], overrides: Sequence[str]
) -> tuple[str, str]:
    """(name, digest) of a job: the same for the same work, whatever the code is.

    Raises:
        ConfigError: the configuration is wrong.
    """
    if job in _CONFIGURED:
        config = load([folder / file for file in files], overrides)
        return config.name, hashlib.sha256(to_yaml(config).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps(list(arguments)).encode())
    for file in files:
        digest.update((folder / file).read_bytes())
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(files[0]).stem) if files else "job"
    return name, digest.hexdigest()


def attempt(base: str, jobs: Iterable[JobDetails]) -> tuple[str, bool]:
    """(submission ID, whether that job is running): the newest attempt where it has not ended, or else the next one."""
    attempts = {}
    for job in jobs:
        match = re.fullmatch(re.escape(base) + r"-(\d+)", job.submission_id or "")
        if match:
            attempts[int(match[1])] = job
    newest = max(attempts, default=0)
    if newest and not attempts[newest].status.is_terminal():
        return f"{base}-{newest}", True
    return f"{base}-{newest + 1}", False


def connect(address: str) -> tuple[JobSubmissionClient, list[JobDetails]]:
    """A client of the cluster's job server, and the jobs that it knows.

    Raises:
        ResourceError: nobody answers, the token is missing or wrong, or Ray's version is another one.
    """
    if address:
        os.environ[_ADDRESS] = address  # Ray's client lets the environment overrule its argument
    given = os.environ.get(_ADDRESS) or os.environ.get("RAY_ADDRESS") or "auto"
    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)
    try:
        _knock(given)
        client = JobSubmissionClient()
        jobs = client.list_jobs()
    except AuthenticationError as error:
        raise no_entry(given, error) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster takes jobs at {'this machine' if given == 'auto' else given} ({first_line(error)}): start "
            "one with `ray start --head`, or name its job server by --address http://HEAD:8265"
        ) from None
    there = client._server_ray_version
    if there != ray.__version__:
        raise ResourceError(
            f"the cluster at {client.get_address()} runs Ray {there}, here is {ray.__version__}: install the same here "
            "and there"
        )
    return client, jobs


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray would try for minutes."""
    if not address.startswith(("http://", "https://")):
        probe(address)
        return
    url = urlsplit(address)
    port = url.port or (443 if url.scheme == "https" else 80)
    socket.create_connection((url.hostname or "", port), timeout=_TIMEOUT_S).close()


def _start(
    client: JobSubmissionClient,
    request: Request,
    submission_id: str,
    environment: dict[str, Any],
    metadata: dict[str, str],
) -> None:
    entrypoint = shlex.join(["python", f"jobs/{request.job}.py", *request.arguments])
    try:
        client.submit_job(
            entrypoint=entrypoint, submission_id=submission_id, runtime_env=environment, metadata=metadata
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        with suppress(OSError, RuntimeError):  # as where the cluster has just gone
            if any(job.submission_id == submission_id for job in client.list_jobs()):
                return  # somebody else was faster with the same: theirs is followed
        raise ResourceError(
            f"the cluster refuses the job ({first_line(error)}): look at --runtime-env and the cluster"
        ) from None
