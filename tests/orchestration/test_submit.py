"""`ray-dwm submit` without a cluster: what is refused before anything is sent, names, attempts, and what is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from orchestration.test_follow import details
from ray.job_submission import JobDetails
from typer.testing import CliRunner

from ray_dwm.cli import app
from ray_dwm.errors import ConfigError, UserError
from ray_dwm.orchestration import submit
from ray_dwm.orchestration.submit import Request, attempt, check_file, identify, split


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with two jobs and configurations, one of which is not uploaded."""
    for name in ("jobs/train.py", "jobs/experiment.py", "configs/a.yaml", "configs/b.yaml", "hidden/a.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("name: small\n" if name.endswith("yaml") else "")
    (tmp_path / ".rayignore").write_text("hidden/\n")
    return tmp_path


@contextmanager
def job_server(status: int = 200, version: str = ray.__version__, jobs: tuple[Any, ...] = ()) -> Iterator[Any]:
    """(address, what it was sent) of something that answers as Ray's job server."""
    sent: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        """Knows the requests that the client makes."""

        def answer(self, code: int, content: Any) -> None:
            """Send JSON."""
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            """Version, jobs, and a package that is there already."""
            known = {"/api/version": {"version": "4", "ray_version": version}, "/api/jobs/": list(jobs)}
            self.answer(status, known.get(self.path, {}) if status == 200 else "Unauthorized: Missing token")

        def do_POST(self) -> None:
            """A submitted job."""
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(200, {"job_id": "1", "submission_id": sent[-1]["submission_id"]})

        def log_message(self, *rest: Any) -> None:
            """Nothing: the tests look at the console."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is named; what a test names is forgotten after it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("trian", [], "there is no job 'trian': did you mean train? It must be one of experiment, train"),
        ("train", ["--config", "configs/c.yaml"], "configs/c.yaml does not exist in the working folder"),
        ("train", ["--config=../a.yaml"], "../a.yaml lies outside of the working folder"),
        ("train", ["--config", "hidden/a.yaml"], "hidden/a.yaml would not be uploaded"),
        ("experiment", ["missing.yaml", "--parallel", "2"], "missing.yaml does not exist"),
        ("train", ["--config", "configs/a.yaml", "train.stepz=3"], "did you mean train.steps?"),
        ("train", ["--config", "configs/a.yaml"], "no Ray cluster takes jobs at http://127.0.0.1:9 ("),
    ],
)
def test_bad_input_is_one_line(tree: Path, job: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        submit.submit(Request(job, arguments, tree))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_jobs_and_one_too_large(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no jobs/\*\.py: --working-dir names the source tree"):
        submit.submit(Request("train", [], tree / "configs"))
    monkeypatch.setattr(submit.check_size, "__defaults__", (10,))
    with pytest.raises(UserError, match="would upload"):
        submit.submit(Request("train", [], tree))


def test_an_absolute_path_has_the_remedy(tree: Path) -> None:
    with pytest.raises(UserError, match=r"another path where the job runs: name it as configs/a\.yaml"):
        check_file(tree, str(tree / "configs/a.yaml"), {})


@pytest.mark.parametrize(
    ("status", "version", "message"),
    [
        (401, ray.__version__, r"wants its token \(Authentication required: .*Missing.*\): set RAY_AUTH_MODE=token"),
        (403, ray.__version__, r"wants its token \(Authentication failed: "),
        (200, "2.59.0", f"runs Ray 2.59.0, here is {ray.__version__}"),
    ],
)
def test_a_cluster_that_does_not_take_the_job(tree: Path, status: int, version: str, message: str) -> None:
    with job_server(status, version) as (address, sent), pytest.raises(UserError, match=message):
        submit.submit(Request("train", [], tree, address=address))
    assert sent == []


@pytest.mark.parametrize(
    ("arguments", "files", "overrides"),
    [
        (["--config", "a.yaml", "train.steps=3", "--config=b.yml"], ["a.yaml", "b.yml"], ["train.steps=3"]),
        (["grid.yaml", "--parallel", "2", "storage=/x.yaml"], ["grid.yaml"], ["storage=/x.yaml"]),
        (["--output", "x.yaml", "--json=y.yaml", "run"], [], []),
        (["--json", "name=x", "storage=/s"], [], ["name=x", "storage=/s"]),
        (["--json", "data.held_out.my-set=/a=b.yaml", "-q", "x=1"], [], ["data.held_out.my-set=/a=b.yaml", "x=1"]),
        (["--output", "runs/lr=1/x", "--guard=no=1", "/x=1"], [], ["/x=1"]),
    ],
)
def test_files_and_overrides_are_told_apart(arguments: list[str], files: list[str], overrides: list[str]) -> None:
    assert split(arguments) == (files, overrides)


def test_the_same_work_has_the_same_name(tree: Path) -> None:
    def name(job: str, *arguments: str) -> tuple[str, str]:
        return identify(job, arguments, tree, *split(arguments))

    first = name("train", "--config", "configs/a.yaml", "train.steps=30")
    assert first[0] == "small"
    assert name("train", "--config=configs/b.yaml", "train.steps=3e1") == first
    assert name("train", "--config", "configs/a.yaml", "train.steps=31")[1] != first[1]
    grid = name("experiment", "configs/a.yaml")
    assert grid[0] == "a" and grid == name("experiment", "configs/a.yaml")
    (tree / "configs/a.yaml").write_text("name: other\n")
    assert name("experiment", "configs/a.yaml")[1] != grid[1]
    assert name("experiment", "--only-table")[0] == "job"
    with pytest.raises(ConfigError):
        name("train", "--config", "configs/a.yaml", "train.steps=no")


def job(number: int, status: str, base: str = "train-a-0") -> JobDetails:
    found = details(status)
    found.submission_id = f"{base}-{number}"
    return found


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([], ("train-a-0-1", False)),
        ([job(1, "RUNNING")], ("train-a-0-1", True)),
        ([job(1, "FAILED"), job(2, "PENDING")], ("train-a-0-2", True)),
        ([job(2, "SUCCEEDED"), job(1, "FAILED"), job(10, "STOPPED")], ("train-a-0-11", False)),
        ([job(7, "RUNNING", "train-a-0-1"), job(7, "RUNNING", "xtrain-a-0")], ("train-a-0-1", False)),
    ],
)
def test_a_running_job_is_followed_and_an_ended_one_gets_the_next_attempt(
    jobs: list[JobDetails], expected: tuple[str, bool]
) -> None:
    assert attempt("train-a-0", jobs) == expected


def test_what_a_job_is_sent_as(tree: Path) -> None:
    (tree / "runtime_env.yaml").write_text("env_vars: {A: '1'}\nexcludes: [hidden/]\n")
    options = ["--no-wait", f"--working-dir={tree}"]
    arguments = ["train", "--config", "configs/a.yaml", "train.steps=30"]
    with job_server() as (address, sent):
        result = CliRunner().invoke(app, ["submit", *options, "--address", address, *arguments])
    assert result.exit_code == 0, result.output
    [request] = sent
    assert request["entrypoint"] == "python jobs/train.py --config configs/a.yaml train.steps=30"
    assert request["runtime_env"]["env_vars"] == {"A": "1"}
    assert request["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")
    assert request["metadata"]["name"] == "small" and request["metadata"]["job"] == "train"
    name = f"train-small-{request['metadata']['digest'][:8]}-1"
    assert request["submission_id"] == name
    assert f"[{name}] {address}/#/jobs/{name}\n" in result.output


def test_a_job_that_runs_already_is_not_submitted_again(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = identify("experiment", [], tree, [], [])[1]
    running = {"type": "SUBMISSION", "submission_id": f"experiment-job-{digest[:8]}-3", "status": "RUNNING"}
    with job_server(jobs=({**running, "entrypoint": ""},)) as (address, sent):
        assert submit.submit(Request("experiment", [], tree, address=address, wait=False)) == 0
    assert sent == []
    assert "-3] is running already" in capsys.readouterr().out


class Gone:
    """A cluster that went away between two requests."""

    def submit_job(self, **_: Any) -> str:
        """See JobSubmissionClient."""
        raise ConnectionError("reset by peer")

    def list_jobs(self) -> list[JobDetails]:
        """See JobSubmissionClient."""
        raise ConnectionError("refused")


def test_a_cluster_that_goes_while_the_job_is_sent_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^the cluster refuses the job \(reset by peer\): "):
        submit._start(Gone(), Request("train", []), "train-a-0-1", {}, {})
