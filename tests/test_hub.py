"""Names to folders, with the real huggingface_hub client against a stand-in for the hub."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qwen_mlx.errors import ModelNotFoundError
from qwen_mlx.hub import resolve
from tests.hub_stand_in import Hub, Repository

NEEDED = {
    "config.json": b'{"model_type": "qwen3_5"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": 1}',
    "tokenizer_config.json": b'{"eos_token": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors-00001-of-00002.safetensors": b"1" * 50_000,
    "model.safetensors-00002-of-00002.safetensors": b"2" * 50_000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "qwen_mlx/gains.safetensors": b"3" * 500,
}
NOT_NEEDED = {
    "README.md": b"# A model",
    "LICENSE": b"terms",
    "modeling_qwen.py": b"raise SystemExit",
    "preprocessor_config.json": b'{"vision": 1}',
    "video_preprocessor_config.json": b'{"vision": 2}',
    "merges.txt": b"a b",
    "model-mtp.safetensors": b"a draft head",
    "original/consolidated.safetensors": b"4" * 500,
    "pytorch_model.bin": b"5" * 500,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The client reads its environment when it is imported; what it read is set anew for one test."""
    repositories = {
        "tales/complete": Repository(NEEDED | NOT_NEEDED, revisions=("main", "v1")),
        "tales/gated": Repository(error=(403, "GatedRepo")),
        "tales/private": Repository(error=(401, "")),
        "tales/failing": Repository(error=(500, "")),
        "tales/gguf": Repository({"README.md": b"", "model-q4.gguf": b"GGUF"}),
    }
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub(repositories) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port on which nothing listens any more."""
    with Hub({}) as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.endpoint)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between attempts; here the hub needs no time to recover."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_only_the_needed_files_are_fetched(hub: Hub) -> None:
    resolve("tales/complete")
    assert hub.fetched() == set(NEEDED)


def test_the_folder_holds_what_the_hub_has(hub: Hub) -> None:
    assert contents(resolve("tales/complete")) == NEEDED


def test_a_second_call_fetches_nothing(hub: Hub) -> None:
    resolve("tales/complete")
    hub.requests.clear()
    resolve("tales/complete")
    assert hub.fetched() == set()


def test_offline_a_cached_model_is_found_without_a_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("tales/complete")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (resolve("tales/complete"), hub.requests) == (folder, [])


def test_without_a_network_a_cached_model_is_found(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("tales/complete")
    with Hub({}) as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.endpoint)
    assert resolve("tales/complete") == folder


def test_the_revision_is_asked_for(hub: Hub) -> None:
    resolve("tales/complete", revision="v1")
    assert ("GET", "/api/models/tales/complete/revision/v1") in hub.requests


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("tales/gated", None, "tales/gated is gated: accept its terms at https://huggingface.co/tales/gated"),
        ("tales/private", None, "does not let you read tales/private: run `hf auth login` or set HF_TOKEN"),
        ("tales/none", None, "no model tales/none, or it is private and you must log in with `hf auth login`."),
        ("Qwen/Qwen3.5-0.8", None, "no model Qwen/Qwen3.5-0.8, .*did you mean Qwen/Qwen3.5-0.8B?"),
        ("qwen/qwen3.5-35b-a3b", None, "no model qwen/qwen3.5-35b-a3b, .*did you mean Qwen/Qwen3.5-35B-A3B?"),
        ("tales/complete", "v9", "tales/complete has no revision v9; look for the ones it has"),
        ("tales/failing", None, "answered 500 for tales/failing, .* try again later"),
        ("tales/gguf", None, "tales/gguf has no config.json, .* take one such as Qwen/Qwen3.5-0.8B"),
        ("tales/a/b", None, "tales/a/b is no folder here, and no hub id"),
        ("bad name!", None, "bad name! is no folder here, and no hub id"),
        ("bad name!/model", None, "bad name!/model is no folder here, and no hub id"),
        ("tales", None, "tales is no folder here, and no hub id"),
        ("", None, "An empty name is no folder here, and no hub id"),
        ("./tales", None, "./tales is no folder here, and no hub id"),
        ("~/tales", None, "~/tales is no folder here, and no hub id"),
        ("~nobody-of-that-name/tales", None, "~nobody-of-that-name/tales is no folder here, and no hub id"),
    ],
)
def test_an_error_names_the_model_and_the_next_step(hub: Hub, name: str, revision: str | None, said: str) -> None:
    with pytest.raises(ModelNotFoundError, match=said):
        resolve(name, revision=revision)


@pytest.mark.parametrize("name", ["tales/a/b", "bad name!/model", "tales", "", "./tales", "/nowhere/tales"])
def test_the_hub_is_not_asked_for_what_is_no_hub_id(hub: Hub, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(name)
    assert hub.requests == []


@pytest.mark.usefixtures("unreachable")
def test_no_network_and_not_cached() -> None:
    with pytest.raises(ModelNotFoundError, match=r"Cannot reach the hub .* tales/complete .* model, demo,"):
        resolve("tales/complete")


def test_offline_and_not_cached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"HF_HUB_OFFLINE is set\), and tales/complete .* model, demo,"):
        resolve("tales/complete")


@pytest.mark.usefixtures("patience")
def test_a_download_that_breaks_goes_on(hub: Hub) -> None:
    hub.repositories["tales/complete"].cuts = 2
    assert contents(resolve("tales/complete")) == NEEDED


@pytest.mark.usefixtures("patience")
def test_a_download_that_keeps_breaking(hub: Hub) -> None:
    hub.repositories["tales/complete"].cuts = 1000
    with pytest.raises(ModelNotFoundError, match=r"download of tales/complete broke off .* run this again"):
        resolve("tales/complete")


@pytest.mark.usefixtures("patience")
def test_a_half_written_folder_is_not_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["tales/complete"].cuts = 1000
    with pytest.raises(ModelNotFoundError):
        resolve("tales/complete")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="tales/complete is not completely cached here"):
        resolve("tales/complete")


@pytest.mark.usefixtures("patience")
def test_a_half_written_folder_is_completed_by_the_next_call(hub: Hub) -> None:
    hub.repositories["tales/complete"].cuts = 1000
    with pytest.raises(ModelNotFoundError):
        resolve("tales/complete")
    hub.repositories["tales/complete"].cuts = 0
    assert contents(resolve("tales/complete")) == NEEDED


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(ModelNotFoundError, match=r"tales/complete could not be stored: .*No space left on device"):
        resolve("tales/complete")


@pytest.mark.parametrize("form", [str, Path], ids=["text", "path"])
def test_a_local_folder_comes_before_the_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: Callable[[str], str | Path]
) -> None:
    (tmp_path / "tales" / "complete").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert (resolve(form("tales/complete")), hub.requests) == (Path("tales/complete"), [])


def test_a_folder_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tales").mkdir()
    assert resolve("~/tales") == tmp_path / "tales"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ModelNotFoundError, match=r"model.safetensors is a file; give the folder that holds config.json"
    ):
        resolve(tmp_path / "model.safetensors")


def test_demo_is_the_embedded_model() -> None:
    assert resolve("demo").joinpath("model.safetensors").exists()


def test_the_environment_of_the_client_is_ours(hub: Hub, tmp_path: Path) -> None:
    """The one test without patches: HF_ENDPOINT and HF_HOME, as a user sets them."""
    program = "import sys; from qwen_mlx.hub import resolve; print(resolve(sys.argv[1]))"
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", program, "tales/complete"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert (folder.is_relative_to(tmp_path / "home"), contents(folder), done.stderr) == (True, NEEDED, "")


@pytest.mark.parametrize("model", ["demo", "."])
def test_a_revision_of_something_local_is_refused(model: str) -> None:
    with pytest.raises(ModelNotFoundError, match="has no revision v1; leave the revision out"):
        resolve(model, revision="v1")
