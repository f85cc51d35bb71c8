"""A converted folder to a repository on the hub, through huggingface_hub: its token, its retries, its resumption.

In: a folder as a conversion writes it. Out: what it holds of the model in the repository. Judges the model by what
qwen_mlx.json says of it, and measures nothing.
"""

import json
import sys
import tempfile
from pathlib import Path

from qwen_mlx import __version__
from qwen_mlx.checkpoint import open_checkpoint, read_header
from qwen_mlx.config import read_json
from qwen_mlx.convert.card import OWN_ID
from qwen_mlx.convert.save import ACCOUNT, INDEX
from qwen_mlx.errors import UploadError

# What may belong to a model. Everything else in the folder stays at home: dot files, logs, half-written files.
MODEL_FILES = (
    *("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*", "NOTICE*", "model*.safetensors"),
    *("qwen_mlx/*.safetensors", "mtp/*.json", "mtp/*.safetensors"),
)
AGAIN = "run the same command again, what is uploaded stays"
TOKENS = "https://huggingface.co/settings/tokens"


def upload(
    folder: Path, repo: str, *, private: bool = False, allow_unverified: bool = False, dry_run: bool = False
) -> None:
    """Upload the model in `folder` to the hub's repository `repo`, which is made when it is not there.

    Prints where it lies, or with `dry_run` the files and their sizes, without contacting anybody. The token is that of
    `hf auth login` or HF_TOKEN. A call that was interrupted is continued by calling again. README.md goes up with the
    repository's id in its examples; the folder stays as it is.

    Raises `CheckpointError` for a folder without config.json or with missing or broken weights, and `UploadError` with
    what to do next: not verified, no repository's id, no token, a token that is wrong or may not write, a public
    repository where `private` is asked for, no network, a hub that fails.
    """
    files = model_files(folder)
    if not allow_unverified:
        _check_verified(folder, files)
    _check_id(repo)
    total = sum((folder / name).stat().st_size for name in files)
    size = f"{len(files)} files, {total:,} bytes"
    if dry_run:
        print("\n".join(f"{(folder / name).stat().st_size:18,}  {name}" for name in files))
        print(f"{size}, would go to {repo}.")
        if left_out := _left_out(folder, files):
            print(f"Left out, as no part of the model: {', '.join(left_out)}.")
        return
    print(f"{size} uploaded to {_send(folder, files, repo, private)}.")


def model_files(folder: Path) -> list[str]:
    """The files of the model in `folder`, relative to it; of the weights those that the index names.

    Raises `CheckpointError` when config.json or a shard is missing, or a shard is not whole.
    """
    read_json(folder / "config.json")
    open_checkpoint(folder)
    index = folder / INDEX
    shards = set(read_json(index)["weight_map"].values()) if index.exists() else None
    files = []
    for path in {path for pattern in MODEL_FILES for path in folder.glob(pattern)}:
        name = path.relative_to(folder).as_posix()
        stale = shards is not None and path.parent == folder and path.suffix == ".safetensors" and name not in shards
        if path.is_file() and not path.name.startswith(".") and not stale:
            files.append(name)
            if path.suffix == ".safetensors":
                read_header(path)
    return sorted(files)


def _left_out(folder: Path, files: list[str]) -> list[str]:
    taken = {name.split("/")[0] for name in files}
    return sorted(path.name for path in folder.iterdir() if path.name not in taken and not path.name.startswith("."))


def _check_verified(folder: Path, files: list[str]) -> None:
    anyway = "or upload it as it is with --allow-unverified"
    record = folder / ACCOUNT
    if not record.exists():
        raise UploadError(
            f"{folder} has no qwen_mlx.json, so nobody knows whether it was verified; make it by python -m "
            f"qwen_mlx.convert, {anyway}."
        )
    facts = read_json(record)
    if facts.get("verified") is not True:
        reason = str(facts.get("reason") or "it was not compared with its source").rstrip(".")
        raise UploadError(f"{folder} is not verified ({reason}); convert it again with the proof, {anyway}.")
    weights = [
        header for name in files if name.endswith(".safetensors") for header in read_header(folder / name).values()
    ]
    if (found := sum(header.nbytes for header in weights)) != facts.get("bytes"):
        raise UploadError(
            f"{folder} holds {found:,} bytes of weights, and {facts.get('bytes')!r} were verified: they are not those; "
            f"convert it again, {anyway}."
        )


def check_access(repo: str) -> str:
    """The token with which `repo` would be written; contacts nobody.

    Raises `UploadError` where `repo` is no id of a repository, and where there is no token.
    """
    from huggingface_hub import get_token

    _check_id(repo)
    token = get_token()
    if token is None:
        raise UploadError(f"There is no token for the hub; run `hf auth login`, or set HF_TOKEN ({TOKENS}).")
    return token


def _check_id(repo: str) -> None:
    # Late: 0.45 s that a refused folder need not pay.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        valid = repo.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UploadError(
            f"{repo} is no id of a repository; give ORG/NAME, where ORG is you or your organization, in letters, "
            "digits, '-', '_' and '.'."
        )


def _send(folder: Path, files: list[str], repo: str, private: bool) -> str:
    """The address of the repository, once everything is there."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi(token=check_access(repo))
    try:
        with tempfile.TemporaryDirectory() as stage:
            _stage(folder, files, repo, Path(stage))
            # None leaves an organization its own default.
            address = hub.create_repo(repo, private=private or None, exist_ok=True)
            if private and not hub.model_info(repo).private:
                raise UploadError(f"{repo} is public already; make it private at {address}/settings, or take another.")
            hub.upload_folder(repo_id=repo, folder_path=stage, commit_message=f"Upload by qwen_mlx {__version__}")
    # ValueError: a card that the hub refuses, an answer that is not JSON; RuntimeError wraps what befell one file.
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UploadError(_reason(repo, error)) from error
    return str(address)


def _stage(folder: Path, files: list[str], repo: str, stage: Path) -> None:
    """Links to exactly these files, and the card with the id it gets."""
    for name in files:
        (stage / name).parent.mkdir(exist_ok=True)
        if name == "README.md":
            text = (folder / name).read_text(encoding="utf-8")
            (stage / name).write_text(text.replace(OWN_ID, repo), encoding="utf-8")
        else:
            (stage / name).symlink_to((folder / name).resolve())


def _reason(repo: str, error: BaseException) -> str:
    """Why the upload did not succeed and what to do next, in one sentence; narrower errors come before wider ones."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _reason(repo, error.__cause__)
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated, and your token may not read it; ask for access at https://huggingface.co/{repo}."
    if isinstance(error, errors.HfHubHTTPError):
        return _answer(repo, error.response.status_code, error.server_message)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and an upload needs the hub; unset it."
    if isinstance(error, json.JSONDecodeError):
        return f"The hub gave an answer that is no JSON; {AGAIN}."
    if isinstance(error, UnicodeDecodeError):
        return f"README.md is not UTF-8 text ({error}); save it as that."
    if isinstance(error, ValueError):
        return f"{repo} cannot be uploaded: {' '.join(str(error).split()).rstrip('.')}."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read: {error.strerror}."
    return f"The upload to {repo} broke off ({' '.join(str(error).split()).rstrip('.')}); connect and {AGAIN}."


def _answer(repo: str, status: int, message: str | None) -> str:
    said = f" ({message.rstrip('.')})" if message else ""
    if status == 401:
        return f"The hub does not accept your token{said}; run `hf auth login`, or set HF_TOKEN ({TOKENS})."
    if status in (403, 404):
        return (
            f"Your token may not write to {repo}{said}; take a name of your own or your organization's, and a token "
            f"with the permission to write ({TOKENS})."
        )
    if status >= 500 or status in (408, 429):
        return f"The hub answered {status} for {repo}; {AGAIN}."
    return f"The hub refused {repo} with {status}{said}."
