"""What is built is what stands in the tree, with real files where the tree has links."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_mlx

ROOT = Path(__file__).parents[1]
SKIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.py[cod]", "*.egg-info", "build", "dist")
DEMO = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE.md",
}


def files_below(folder: Path) -> Iterator[str]:
    """Every file below `folder`, through links, relative to the root of the project."""
    for where, folders, names in os.walk(folder, followlinks=True):
        dropped = SKIPPED(where, [*folders, *names])
        folders[:] = [name for name in folders if name not in dropped]
        yield from (Path(where, name).relative_to(ROOT).as_posix() for name in names if name not in dropped)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project to build in: setuptools leaves folders behind."""
    copy = tmp_path_factory.mktemp("project") / "tree"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=SKIPPED)
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    return copy


def build(project: Path, what: str, into: Path) -> Path:
    """Build a "wheel" or an "sdist" without the network."""
    command = [sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", str(into), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=into.parent, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="session")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (project,) = folder.iterdir()
    return project


@pytest.fixture(scope="session", params=["tree", "unpacked_sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the tree, as `pip install .` does, and from the source distribution."""
    return zipfile.ZipFile(build(request.getfixturevalue(request.param), "wheel", tmp_path_factory.mktemp("wheel")))


def test_the_wheel_holds_the_package_as_it_stands_in_the_tree(wheel: zipfile.ZipFile) -> None:
    metadata = f"qwen_mlx-{qwen_mlx.__version__}.dist-info/"
    assert {name for name in wheel.namelist() if not name.startswith(metadata)} == {*files_below(ROOT / "qwen_mlx")}


def test_the_wheel_holds_the_demo_model_and_the_mark_of_types(wheel: zipfile.ZipFile) -> None:
    assert {f"qwen_mlx/demo/{name}" for name in DEMO} | {"qwen_mlx/py.typed"} <= {*wheel.namelist()}


def test_the_wheel_holds_contents_not_links(wheel: zipfile.ZipFile) -> None:
    for name in ("qwen_mlx/convert/__init__.py", "qwen_mlx/metal/__init__.py", "qwen_mlx/demo/model.safetensors"):
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_has_the_script_and_both_licences(wheel: zipfile.ZipFile) -> None:
    metadata = f"qwen_mlx-{qwen_mlx.__version__}.dist-info"
    assert "qwen-mlx = qwen_mlx.__main__:main" in wheel.read(f"{metadata}/entry_points.txt").decode()
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/qwen_mlx/demo/LICENSE.md"} <= {*wheel.namelist()}


def test_the_wheel_generates_away_from_the_tree(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    line = "qwen-mlx generate --model demo --raw --prompt One --max-tokens 8"
    program = (
        "import qwen_mlx, sys; from qwen_mlx.__main__ import main\n"
        f"print(qwen_mlx.__file__); sys.argv = '{line}'.split(); sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    where, text = done.stdout.split("\n", 1)
    assert Path(where).is_relative_to(tmp_path)
    assert re.search(r"\w+ \w+", text)


@pytest.fixture
def members(sdist: Path) -> dict[str, tarfile.TarInfo]:
    """What the source distribution holds, by path below its one folder."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2]: member for member in archive}


def test_the_sdist_holds_all_that_the_tests_need(members: dict[str, tarfile.TarInfo]) -> None:
    folders = ("qwen_mlx", "metal", "convert", "tests", "examples", "benchmarks")
    needed = {name for folder in folders for name in files_below(ROOT / folder)}
    needed |= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", ".ci/run"}
    assert needed - members.keys() == set()


def test_the_sdist_holds_contents_not_links(members: dict[str, tarfile.TarInfo]) -> None:
    assert [name for name, member in members.items() if not (member.isfile() or member.isdir())] == []


def test_the_sdist_holds_nothing_that_grows_by_itself(members: dict[str, tarfile.TarInfo]) -> None:
    grown = re.compile(r"(^|/)(__pycache__|build|dist)(/|$)|(^|/)\.(?!ci(/|$))|\.py[cod]$")
    assert [name for name in members if grown.search(name)] == []
