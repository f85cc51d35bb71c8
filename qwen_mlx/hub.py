"""A folder, a hub id or "demo" to a local folder. Downloads through huggingface_hub: its cache, token, offline mode."""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_mlx.errors import ModelNotFoundError

DEFAULT_MODEL = "Qwen/Qwen3.5-0.8B"
RELEASED_MODELS = tuple(
    f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B", "27B", "35B-A3B", "122B-A10B", "397B-A17B")
)
HEADS = ["model-mtp*.safetensors"]  # heads that stand beside a converted model; text does not need them
# The same patterns every time: offline, the client compares what is cached with what they ask for.
NEEDED_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    "qwen_mlx/gains.safetensors",
]


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    files: Sequence[str] = NEEDED_FILES,
    ignored: Sequence[str] = HEADS,
) -> Path:
    """The folder of `model`: the embedded demo for "demo", a local folder, or a downloaded (and cached) hub repository.

    Of a repository `files` are fetched, but for what is `ignored` (patterns); by default what running it takes.

    Raises `ModelNotFoundError` with what to do next: no such folder or repository, gated, not logged in, no such
    revision, no network and not cached, disk full.
    """
    if not str(model):  # as a path it would be the current folder
        raise ModelNotFoundError(_no_name_of_a_model("An empty name"))
    path = Path(os.path.expanduser(model))
    if revision is not None and (model == "demo" or path.exists()):
        raise ModelNotFoundError(f"{model} is not on the hub and has no revision {revision}; leave the revision out.")
    if model == "demo":
        return Path(__file__).parent / "demo"
    if path.is_dir():
        return path
    if path.exists():
        raise ModelNotFoundError(f"{model} is a file; give the folder that holds config.json and the weights.")
    if str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        raise ModelNotFoundError(_no_name_of_a_model(str(model)))
    return _download(str(model), revision, files, ignored)


def _download(repo: str, revision: str | None, files: Sequence[str], ignored: Sequence[str]) -> Path:
    # Late: 0.45 s that a local folder need not pay.
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(files), ignore_patterns=list(ignored))
        )
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise ModelNotFoundError(_reason(repo, revision, error)) from error
    if not (folder / "config.json").exists():
        raise ModelNotFoundError(
            f"{repo} has no config.json, so it is no model in safetensors form; take one such as {DEFAULT_MODEL}."
        )
    return folder


def _no_name_of_a_model(name: str) -> str:
    return f"{name} is no folder here, and no hub id like {DEFAULT_MODEL}; the embedded model is called demo."


def _reason(repo: str, revision: str | None, error: Exception) -> str:
    """Why `repo` cannot be had and what to do next, in one sentence; narrower errors come before wider ones."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return _no_name_of_a_model(repo)
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        near = difflib.get_close_matches(repo, RELEASED_MODELS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"The hub has no model {repo}, or it is private and you must log in with `hf auth login`{hint}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}; look for the ones it has at https://huggingface.co/{repo}."
    # A cache miss says in its cause whether the hub answered.
    answer = getattr(error if isinstance(error, errors.HfHubHTTPError) else error.__cause__, "response", None)
    if answer is not None and answer.status_code == 401:
        return f"The hub does not let you read {repo}: run `hf auth login` or set HF_TOKEN."
    if answer is not None:
        return (
            f"The hub answered {answer.status_code} for {repo}, which is not completely cached here; try again later."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"Cannot reach the hub (no network, or HF_HUB_OFFLINE is set), and {repo} is not completely cached here; "
            "connect and run this again, or take the embedded model, demo, which needs no network."
        )
    if isinstance(error, errors.HTTPError):
        return f"The download of {repo} broke off ({str(error).rstrip('.')}); run this again to finish it."
    return f"{repo} could not be stored: {error}; free some space, or set HF_HOME to a folder on another disk."
