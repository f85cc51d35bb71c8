"""A folder to the hub and back, with the real huggingface_hub client against a stand-in for the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from huggingface_hub import ModelCard, constants

from qwen_mlx import load
from qwen_mlx.checkpoint import read_header
from qwen_mlx.cli import run
from qwen_mlx.convert.card import OWN_ID, card
from qwen_mlx.convert.upload import model_files, upload
from qwen_mlx.errors import CheckpointError, UploadError
from qwen_mlx.hub import resolve
from qwen_mlx.upload import main
from tests.convert.test_card import FACTS
from tests.hub_stand_in import Hub, Repository

# The client hands files to its HTTP library in a way that is going out of use there.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "tales/Qwen3.5-demo-4bit"
DEMO = Path(__file__).parents[2] / "qwen_mlx/demo"
CONTENT = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "mtp/model.safetensors",
    "mtp/config.json",
    "qwen_mlx.json",
    "README.md",
    "LICENSE.md",
}
OTHERS = ("__init__.py", "nohup.out", "model.safetensors.unfinished", ".DS_Store", ".cache/x.json", "mtp/._config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo model as a conversion would leave it, and what does not belong to it."""
    folder = tmp_path / "mlx_model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("__*"))
    head = {"fc.weight": mx.zeros((8, 4))}
    size = (
        sum(header.nbytes for header in read_header(folder / "model.safetensors").values()) + head["fc.weight"].nbytes
    )
    source = {"id": "tales/demo", "hub": True, "revision": None, "kind": "released"}
    (folder / "qwen_mlx.json").write_text(json.dumps(FACTS | {"source": source, "bytes": size}))
    (folder / "README.md").write_text(card(folder, (DEMO / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "mtp").mkdir()
    mx.save_safetensors(str(folder / "mtp/model.safetensors"), head)
    (folder / "mtp/config.json").write_text("{}")
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def put(hub: Hub) -> list[str]:
    """The addresses to which content was sent."""
    return [path for method, path in hub.requests if method == "PUT"]


def test_the_repository_holds_exactly_the_model(hub: Hub, folder: Path) -> None:
    upload(folder, REPO)
    assert set(hub.repositories[REPO].files) == CONTENT
    sent = {name: data for name, data in hub.repositories[REPO].files.items() if name != "README.md"}
    assert sent == {name: (folder / name).read_bytes() for name in CONTENT - {"README.md"}}


def test_what_came_back_computes_the_same(hub: Hub, folder: Path) -> None:
    upload(folder, REPO)
    tokens = mx.array([[5, 17, 300, 2, 41]])
    (sent, _), (received, _) = load(folder), load(resolve(REPO))
    assert mx.array_equal(received(tokens), sent(tokens)).item()
    assert resolve(REPO).is_relative_to(constants.HF_HUB_CACHE)


def test_it_says_where_it_lies(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upload(folder, REPO)
    size = sum((folder / name).stat().st_size for name in CONTENT)
    assert capsys.readouterr().out == f"11 files, {size:,} bytes uploaded to {hub.endpoint}/{REPO}.\n"


def test_the_card_gets_the_id_and_the_folder_keeps_its_own(hub: Hub, folder: Path) -> None:
    before = (folder / "README.md").read_text(encoding="utf-8")
    upload(folder, REPO)
    sent = hub.repositories[REPO].files["README.md"].decode()
    assert OWN_ID in before
    assert (folder / "README.md").read_text(encoding="utf-8") == before
    assert sent == before.replace(OWN_ID, REPO)


def test_the_hub_is_asked_about_the_card_before_anything_is_sent(hub: Hub, folder: Path) -> None:
    upload(folder, REPO)
    assert hub.cards
    assert {ModelCard(text).data["license"] for text in hub.cards} == {"apache-2.0"}
    asked, sent = ("POST", "/api/validate-yaml"), next(request for request in hub.requests if request[0] == "PUT")
    assert hub.requests.index(asked) < hub.requests.index(sent)


def test_a_card_that_the_hub_refuses(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: No Such Licence\n---\n")
    with pytest.raises(
        UploadError, match=r"cannot be uploaded: Invalid metadata in README.md. - license: .* not valid"
    ):
        upload(folder, REPO)
    assert put(hub) == []


def test_a_card_in_another_encoding(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: en\n---\nModèle", encoding="latin-1")
    with pytest.raises(UploadError, match=r"README.md is not UTF-8 text \(.*\); save it as that"):
        upload(folder, REPO)
    assert hub.requests == []


def test_a_large_file_goes_up_in_parts(hub: Hub, folder: Path) -> None:
    upload(folder, REPO)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 5 * hub.part_size
    assert len([path for path in put(hub) if path.count("/") == 3]) == -(-size // hub.part_size)
    assert len([path for path in put(hub) if path.count("/") == 2]) == 2  # the head and the tokenizer, whole


@pytest.mark.parametrize("request_", ["PUT /lfs/", "batch", "preupload"])
def test_a_failure_is_tried_again(hub: Hub, folder: Path, request_: str) -> None:
    hub.fail(request_, 503, times=3)
    upload(folder, REPO)
    assert set(hub.repositories[REPO].files) == CONTENT


@pytest.mark.parametrize(
    "request_", ["POST /api/repos/create", "validate-yaml", "preupload", "batch", "PUT /lfs/", "verify", "commit"]
)
def test_a_hub_that_fails_and_a_second_call_that_finishes(hub: Hub, folder: Path, request_: str) -> None:
    hub.fail(request_, 500, times=100)
    with pytest.raises(
        UploadError, match=r"^The hub answered 500 for .*; run the same command again, what is uploaded"
    ):
        upload(folder, REPO)
    hub.recover()
    upload(folder, REPO)
    assert set(hub.repositories[REPO].files) == CONTENT


def test_a_second_call_sends_only_what_is_missing(hub: Hub, folder: Path) -> None:
    hub.fail("commit", 500)
    with pytest.raises(UploadError, match="what is uploaded stays"):
        upload(folder, REPO)
    assert put(hub)
    hub.requests.clear()
    upload(folder, REPO)
    assert put(hub) == []
    assert set(hub.repositories[REPO].files) == CONTENT


def test_a_model_that_is_there_already_makes_no_commit(hub: Hub, folder: Path) -> None:
    upload(folder, REPO)
    hub.requests.clear()
    upload(folder, REPO)
    assert len(hub.summaries) == 1
    assert put(hub) == []


def test_an_answer_that_is_no_json(hub: Hub, folder: Path) -> None:
    hub.fail("validate-yaml", 502, body=b"<html>Bad gateway</html>")
    with pytest.raises(UploadError, match=r"answer that is no JSON; run the same command again"):
        upload(folder, REPO)


def test_other_weights_than_those_that_were_verified_stay_here(hub: Hub, folder: Path) -> None:
    mx.save_safetensors(str(folder / "mtp/model.safetensors"), {"fc.weight": mx.zeros((8, 5))})
    with pytest.raises(UploadError, match="they are not those"):
        upload(folder, REPO)
    assert not hub.requests
    upload(folder, REPO, allow_unverified=True)


def test_a_private_repository(hub: Hub, folder: Path) -> None:
    upload(folder, REPO, private=True)
    assert hub.repositories[REPO].private
    assert set(hub.repositories[REPO].files) == CONTENT
    assert (resolve(REPO) / "config.json").exists()


def test_without_private_the_namespace_decides(hub: Hub, folder: Path) -> None:
    upload(folder, REPO)
    assert "visibility" not in hub.created[0]
    assert "private" not in hub.created[0]


def test_a_public_repository_does_not_get_what_is_private(hub: Hub, folder: Path) -> None:
    hub.repositories[REPO] = Repository({"README.md": b"# Old"})
    with pytest.raises(UploadError, match=rf"{REPO} is public already; make it private at .*/settings, or take"):
        upload(folder, REPO, private=True)
    assert hub.repositories[REPO].files == {"README.md": b"# Old"}


def test_a_repository_that_exists_is_added_to(hub: Hub, folder: Path) -> None:
    hub.repositories[REPO] = Repository({"README.md": b"# Old", "NOTES": b"mine"})
    upload(folder, REPO)
    files = hub.repositories[REPO].files
    assert (set(files), files["NOTES"]) == (CONTENT | {"NOTES"}, b"mine")


def test_a_gated_repository(hub: Hub, folder: Path) -> None:
    hub.repositories[REPO] = Repository(error=(403, "GatedRepo"))
    with pytest.raises(UploadError, match=f"{REPO} is gated, and your token may not read it; ask for access"):
        upload(folder, REPO)


def test_no_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UploadError, match=r"There is no token for the hub; run `hf auth login`, or set HF_TOKEN"):
        upload(folder, REPO)
    assert hub.requests == []


def test_a_wrong_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    with pytest.raises(
        UploadError, match=r"does not accept your token \(Invalid credentials .*\); run `hf auth login`"
    ):
        upload(folder, REPO)


@pytest.mark.parametrize("exists", [False, True])
def test_a_token_that_may_not_write_there(hub: Hub, folder: Path, exists: bool) -> None:
    if exists:
        hub.repositories["novels/model"] = Repository()
    with pytest.raises(
        UploadError, match=r"^Your token may not write to novels/model \(You .*\); take a name of your own"
    ):
        upload(folder, "novels/model")


def test_too_many_requests(hub: Hub, folder: Path) -> None:
    hub.fail("POST /api/repos/create", 429)
    with pytest.raises(UploadError, match=rf"The hub answered 429 for {REPO}; run the same command again"):
        upload(folder, REPO)


def test_a_refusal_of_another_kind(hub: Hub, folder: Path) -> None:
    hub.fail("POST /api/repos/create", 402, body=b'{"error": "Payment required."}')
    with pytest.raises(UploadError, match=rf"The hub refused {REPO} with 402 \(Payment required\)\."):
        upload(folder, REPO)


def test_no_network(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub({}) as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.endpoint)
    with pytest.raises(UploadError, match=r"broke off \(.*refused\); connect and run the same command again"):
        upload(folder, REPO)


def test_offline(hub: Hub, folder: Path) -> None:
    """The client reads this when it is imported, and puts it into its connection."""
    done = command(hub, folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stderr == "error: HF_HUB_OFFLINE is set, and an upload needs the hub; unset it.\n"


@pytest.mark.parametrize("repo", ["model", "tales/a/b", "bad name!/model", "tales/a--b", "tales/model.git", ""])
def test_an_id_that_is_none(hub: Hub, folder: Path, repo: str) -> None:
    with pytest.raises(UploadError, match=r"is no id of a repository; give ORG/NAME"):
        upload(folder, repo)
    assert hub.requests == []


def test_not_verified(hub: Hub, folder: Path) -> None:
    facts = FACTS | {"verified": False, "reason": "--no-verify was given."}
    (folder / "qwen_mlx.json").write_text(json.dumps(facts))
    with pytest.raises(UploadError, match=r"is not verified \(--no-verify was given\); convert .* --allow-unverified"):
        upload(folder, REPO)
    assert hub.requests == []
    upload(folder, REPO, allow_unverified=True)
    assert set(hub.repositories[REPO].files) == CONTENT


def test_a_model_of_unknown_making(hub: Hub, folder: Path) -> None:
    (folder / "qwen_mlx.json").unlink()
    with pytest.raises(
        UploadError, match=r"has no qwen_mlx.json, .*python -m qwen_mlx.convert, or .* --allow-unverified"
    ):
        upload(folder, REPO)
    assert hub.requests == []
    upload(folder, REPO, allow_unverified=True)
    assert set(hub.repositories[REPO].files) == CONTENT - {"qwen_mlx.json"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", None, "is not a model folder: it has no config.json"),
        ("config.json", b"[]", "must hold a JSON object"),
        ("model.safetensors", None, r"holds no model\*.safetensors file"),
        ("model.safetensors", b"\0" * 9, "is no safetensors file"),
        ("mtp/model.safetensors", b"\x20" + b"\0" * 9, "is truncated"),
        ("qwen_mlx.json", b"{", "cannot be read as JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}', "lacks model-2.safetensors"),
    ],
)
def test_a_folder_that_is_no_whole_model(hub: Hub, folder: Path, name: str, content: bytes | None, said: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        upload(folder, REPO)
    assert hub.requests == []


def test_no_folder(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a model folder"):
        upload(tmp_path / "nowhere", REPO)


def test_shards_that_the_index_does_not_name_stay(folder: Path) -> None:
    names = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    shutil.copy(folder / "mtp/model.safetensors", folder / "model-00002-of-00002.safetensors")
    assert set(model_files(folder)) == CONTENT | {"model.safetensors.index.json"}


def test_a_file_that_cannot_be_read(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", denied)
    with pytest.raises(UploadError, match=r"^model.safetensors cannot be read: Permission denied\."):
        upload(folder, REPO)


def test_a_dry_run_lists_and_contacts_nobody(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    upload(folder, REPO, dry_run=True)
    *listed, total, left_out = capsys.readouterr().out.splitlines()
    sizes = {name: int(size.replace(",", "")) for size, name in (line.split() for line in listed)}
    assert sizes == {name: (folder / name).stat().st_size for name in CONTENT}
    assert total == f"11 files, {sum(sizes.values()):,} bytes, would go to {REPO}."
    assert left_out == "Left out, as no part of the model: __init__.py, model.safetensors.unfinished, nohup.out."
    assert hub.requests == []


def test_nothing_left_out_is_not_spoken_of(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in OTHERS[:3]:
        (folder / name).unlink()
    upload(folder, REPO, dry_run=True)
    assert "Left out" not in capsys.readouterr().out


def test_a_dry_run_refuses_as_the_real_one_would(hub: Hub, folder: Path) -> None:
    (folder / "qwen_mlx.json").unlink()
    with pytest.raises(UploadError):
        upload(folder, REPO, dry_run=True)


def command(hub: Hub, folder: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with its environment as a user sets it."""
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_writer",
        **settings,
    }
    line = [sys.executable, "-m", "qwen_mlx.upload", "--path", str(folder), "--upload-repo", REPO, *flags]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_the_command(hub: Hub, folder: Path) -> None:
    done = command(hub, folder, "--private")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"uploaded to {hub.endpoint}/{REPO}.\n")
    assert hub.repositories[REPO].private
    assert set(hub.repositories[REPO].files) == CONTENT


def test_a_failure_of_xet_is_a_sentence_too(hub: Hub, folder: Path) -> None:
    """Where hf_xet is installed the client sends large files by it, and it raises errors of its own."""
    pytest.importorskip("hf_xet")
    done = command(hub, folder, HF_HUB_DISABLE_XET="0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: The upload to {REPO} broke off (")
    assert done.stderr.endswith("; connect and run the same command again, what is uploaded stays.\n")
    assert "Traceback" not in done.stderr


def test_the_flags_of_the_command_act(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "qwen_mlx.json").unlink()
    arguments = ["--path", str(folder), "--upload-repo", REPO]
    assert run(lambda: main(arguments)) == 2
    assert "--allow-unverified" in capsys.readouterr().err
    assert run(lambda: main([*arguments, "--allow-unverified", "--dry-run"])) == 0
    assert "would go to" in capsys.readouterr().out
    assert hub.requests == []


def test_a_folder_in_the_home_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    main(["--path", "~/mlx_model", "--upload-repo", REPO, "--dry-run"])
    assert "would go to" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--path", "--upload-repo"])
def test_both_ends_must_be_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([flag, "x"])
    assert (end.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_no_flag_takes_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    """It would stand in the shell's history and in the list of processes."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "token" not in capsys.readouterr().out
