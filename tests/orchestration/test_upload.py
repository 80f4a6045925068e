"""What a job takes along: the same files as Ray packs, their size, and the runtime environment."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import pytest
from orchestration.conftest import ROOT
from ray._private.runtime_env.packaging import create_package

from ray_dwm.errors import UserError
from ray_dwm.orchestration.upload import RUNTIME_ENV, check_size, listing, offenders, read_runtime_env

FILES = {
    "jobs/train.py": 10,
    "data/a.bin": 4000,
    "data/deep/b.bin": 500,
    "kept/c.bin": 300,
    "kept/d.tmp": 7,
    ".venv/x.py": 9,
    "big.bin": 100,
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of FILES, with ignore files of both kinds, one of them inside."""
    for name, size in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("/data/deep/\n")
    (tmp_path / "kept/.rayignore").write_text("*.tmp\n")
    return tmp_path


@pytest.mark.parametrize("excludes", [[], ["kept/"]])
def test_the_listing_is_what_ray_packs(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, excludes: list[str]
) -> None:
    package = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(str(tree), package, include_gitignore=True, excludes=[".venv", *excludes])
    with ZipFile(package) as archive:
        packed = {Path(entry.filename): entry.file_size for entry in archive.infolist() if not entry.is_dir()}
        assert all(entry.compress_size == entry.file_size for entry in archive.infolist())
    assert listing(tree, excludes) == packed
    assert Path("data/a.bin") in packed and Path("data/deep/b.bin") not in packed


def test_the_largest_are_named(tree: Path) -> None:
    sizes = listing(tree)
    assert offenders(sizes)[:3] == [("data/a.bin", 4000), ("kept/c.bin", 300), ("big.bin", 100)]
    assert offenders({Path("a/b/1"): 50, Path("a/b/2"): 50, Path("a/c"): 20}) == [("a/b/", 100)]
    assert check_size(tree, sizes) == sum(sizes.values())
    with pytest.raises(
        UserError, match=r"would upload 0\.0 MiB, at most 0\.0 MiB .* largest are data/a\.bin 0\.0 MiB, "
    ):
        check_size(tree, sizes, 4000)


def test_the_source_tree_is_small_and_has_what_a_job_needs() -> None:
    sizes = listing(ROOT)
    assert check_size(ROOT, sizes) > 0
    needed = ("jobs/train.py", "configs/quickstart.yaml", "ray_dwm/cli/__init__.py", RUNTIME_ENV)
    assert {Path(name) for name in needed} <= sizes.keys()
    assert {path.parts[0] for path in sizes}.isdisjoint({"tests", "docs", "runs", "data", ".git", ".venv", "wandb"})


def test_secrets_stay_here(tree: Path) -> None:
    for name in (".env", "deep/.env.local", "deep/id.pem", "tls.key", ".netrc"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("secret")
    before = listing(tree).keys()
    (tree / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    kept_here = {str(path) for path in before - listing(tree).keys()}
    assert kept_here >= {".env", "deep/.env.local", "deep/id.pem", "tls.key"}
    assert Path(".netrc") not in listing(tree) and Path("jobs/train.py") in listing(tree)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: --working-dir names"):
        listing(tmp_path / "no")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "must be a mapping"),
        ("a: [", "cannot be read"),
        ("working_dir: .\n", "has a working_dir"),
        (None, "cannot be read .*No such file"),
    ],
)
def test_a_wrong_runtime_environment(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / RUNTIME_ENV
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_runtime_env(file)


def test_the_runtime_environment_of_the_source_tree() -> None:
    variables = read_runtime_env(ROOT / RUNTIME_ENV)["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert all(isinstance(value, str) for value in variables.values())  # Ray takes no others
