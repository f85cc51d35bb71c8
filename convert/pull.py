"""Where the source of a conversion comes from: a folder, a GGUF file, or a repository of the hub."""

from dataclasses import dataclass
from pathlib import Path

from qwen_mlx.convert.source import COMPANIONS
from qwen_mlx.errors import ModelNotFoundError
from qwen_mlx.hub import NEEDED_FILES, resolve

# All that a conversion keeps, and the card with the licence.
FILES = [*NEEDED_FILES, *COMPANIONS, "mtp*.safetensors", "mtp/*", "README.md"]


@dataclass(frozen=True)
class Origin:
    """`id` as people know it: the repository, or the folder's name. `revision` is the commit that was fetched."""

    path: Path
    id: str
    hub: bool
    revision: str | None = None


def pull(name: str, revision: str | None = None) -> Origin:
    """The source that `name` means; downloads what is not cached, and goes on where an earlier download broke off.

    Raises `ModelNotFoundError`, as `resolve` does, with what to do next.
    """
    file = Path(name).expanduser()
    if file.suffix == ".gguf":
        if not file.is_file():
            raise ModelNotFoundError(f"There is no file {name}; give the path of a .gguf file that is here.")
        return Origin(file, file.name, hub=False)
    folder = resolve(name, revision=revision, files=FILES, ignored=())
    if name == "demo" or file.is_dir():
        return Origin(folder, folder.resolve().name, hub=False)
    return Origin(folder, name, hub=True, revision=folder.name)
