"""The draft head of a checkpoint, wherever its makers put it, as an `MTPHead` for the model that is loaded already.

It is met in the main shards (`mtp.*`), in a file or a folder beside them, or alone, under names with `mtp.` or bare
(`fc.weight`, `layers.0.*`), quantized or not, with gains stored as w or as 1 + w. What the files show decides, first
how they are made, then the values of the gains: see `absolute_gains`.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from qwen_mlx.checkpoint import CONV, Header, load_file, load_with_metadata, read_header, reform, some, weight_files
from qwen_mlx.config import read_json
from qwen_mlx.errors import CheckpointError
from qwen_mlx.load import check_tensors, quantize_like, set_weights, too_large_for_float16
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen

FOLDER = "mtp"  # what qwen_mlx writes: the head as a small model folder of its own
FILES = ("mtp/weights.safetensors", "mtp.safetensors", "model-mtp.safetensors", "model-mtp-head.safetensors")
PREFIX = re.compile(r"^(model\.)?(language_model\.)?(model\.)?mtp\.")
EXPERT = re.compile(r"^(.*mlp\.)experts\.(\d+)\.(\w+_proj\.\w+)$")
GAIN = re.compile(r"norm(_embedding|_hidden)?\.weight$")


@dataclass(frozen=True)
class Family:
    """Norms judged together: a mean below `only_w` can only be that of w, from `only_gain` on only that of 1 + w."""

    name: str
    members: re.Pattern[str]
    only_w: float
    only_gain: float


FAMILIES = (
    # w: 0.13 and 0.35 in the 27B and 4B heads, 0.18 in the demo's, 0 in untrained ones.
    Family("layer", re.compile(r"layernorm\.weight$"), 0.5, 0.75),
    # w: 0.73 to 0.79 in released heads; 1 + w: 1 in untrained ones. No one cut lies well inside both gaps.
    Family("q and k", re.compile(r"[qk]_norm\.weight$"), 0.9, 1.25),
    # They damp what they get. w: -0.31 in the 27B head; 1 + w: 0.38 in the 35B head.
    Family("pre_fc", re.compile(r"pre_fc_norm_\w+\.weight$"), 0.0, 0.6),
)
SHIFTED_TWICE = 1.8  # mean of the layer norms: 1.35 at most as it should be, 2.0 at least with another one added


@dataclass(frozen=True)
class StoredMTP:
    """A draft head as files hold it."""

    place: Path  # its file, or the folder of its files
    stored: dict[str, tuple[str, Header]]  # by bare name: the name in the file, and the header there
    zero_centred: bool  # whether files made like these hold w, for a gain of 1 + w

    def tensors(self) -> dict[str, mx.array]:
        """Every tensor, lazy, by the name in `MTPHead`; gains 1 + w in float32.

        Raises `CheckpointError` where experts are missing or differ in shape, and where gains were shifted twice.
        """
        loaded = {file: load_file(file) for file in {header.file for _, header in self.stored.values()}}
        tensors = {name: loaded[header.file][stored] for name, (stored, header) in self.stored.items()}
        reformed: dict[str, mx.array] = {}
        for name, array in self._stacked(tensors).items():
            parts = reform(name, array)
            if again := parts.keys() & reformed.keys():
                raise CheckpointError(f"{self.place} stores {some(again)} twice, under different names.")
            reformed |= parts
        gains = {n: a for n, a in reformed.items() if GAIN.search(n) and mx.issubdtype(a.dtype, mx.floating)}
        return reformed | absolute_gains(self.place, gains, zero_centred=self.zero_centred)

    def _stacked(self, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        """Experts that are stored one by one as one tensor of each kind, [E, out, in]."""
        experts: dict[str, dict[int, mx.array]] = {}
        for name in [name for name in tensors if EXPERT.match(name)]:
            before, number, kind = EXPERT.match(name).groups()  # type: ignore[union-attr]
            experts.setdefault(f"{before}switch_mlp.{kind}", {})[int(number)] = tensors.pop(name)
        for name, found in experts.items():
            single = name.replace("switch_mlp", "experts.{}")
            if missing := [single.format(i) for i in range(len(found)) if i not in found]:
                raise CheckpointError(f"{self.place} lacks {some(missing)}; download or convert the model again.")
            if len({array.shape for array in found.values()}) > 1:
                raise CheckpointError(f"{self.place}: the experts of {single.format('*')} differ in shape.")
        stacked = {name: mx.stack([found[i] for i in range(len(found))]) for name, found in experts.items()}
        if again := stacked.keys() & tensors.keys():
            raise CheckpointError(f"{self.place} stores {some(again)} twice, under different names.")
        return tensors | stacked


def load_mtp(path: str | Path, model: Qwen) -> MTPHead | None:
    """The draft head for `model` in a file, a folder of its own, or a checkpoint folder; None where that has none.

    In a checkpoint folder a head that stands beside the main shards goes before one inside them. It gets the dtype of
    `model`, gains float32, and shares the embeddings and the output matrix of `model`. Lazy but for the gains, as in
    `load`.

    Raises `CheckpointError` for missing, extra or misshapen tensors, a file that cannot be read, and a head of another
    kind: with embeddings of its own, or of several layers.
    """
    found = find_mtp(Path(path))
    if found is None:
        return None
    head, place = MTPHead(model.config.text), f"The MTP head in {found.place}"
    tensors = found.tensors()
    quantize_like(place, head, tensors)
    check_tensors(place, head, tensors)
    if model.dtype == mx.float16 and (large := too_large_for_float16(tensors)):
        raise CheckpointError(f"{place} does not fit float16: {some(large)} exceed 65504; load the model in bfloat16.")
    set_weights(head, tensors, model.dtype)
    return head


def find_mtp(path: Path) -> StoredMTP | None:
    """Where in `path`, a file or a folder, the draft head is, from the headers of the files alone."""
    if not path.exists():
        raise CheckpointError(f"There is no file or folder {path} to read an MTP head from.")
    headers = {file: read_header(file) for file in _candidates(path)}
    every = [name for header in headers.values() for name in header]
    prefixed = any(PREFIX.match(name) for name in every)
    if not prefixed and any(name.startswith(("model.", "language_model.")) for name in every):
        return None
    stored: dict[str, tuple[str, Header]] = {}
    for header in headers.values():
        for name, entry in header.items():
            bare = PREFIX.sub("", name)
            if prefixed and bare == name:
                continue
            if bare in stored:
                first, other = stored[bare][1].file.name, entry.file.name
                raise CheckpointError(f"{path} stores {bare} of the MTP head twice, in {first} and {other}.")
            stored[bare] = (name, entry)
    files = sorted({entry.file for _, entry in stored.values()})
    for folder in sorted({path if path.is_dir() else path.parent, *(file.parent for file in files)}):
        _check_config(folder / "config.json")
    convolutions = [entry.shape for header in headers.values() for name, entry in header.items() if name.endswith(CONV)]
    if convolutions:  # inside a checkpoint, which is [Cn, 1, K] as released and [Cn, K, 1] converted
        zero_centred = convolutions[0][1:2] == (1,)
    else:
        zero_centred = prefixed and not any(_written_by_mlx(file) for file in files)
    return StoredMTP(files[0] if len(files) == 1 else path, stored, zero_centred)


def absolute_gains(place: Path, stored: dict[str, mx.array], *, zero_centred: bool) -> dict[str, mx.array]:
    """All gains of a head, by bare names, as they are stored -> 1 + w in float32.

    Both conventions are met in every kind of file, so that a head is judged by its values: the mean over each of three
    families of norms, no norm alone, and `norm.weight` never (w of one model is larger than 1 + w of another). A mean
    that could be either leaves it to the layer norms, and theirs to the kind of file (`zero_centred`). Families that
    disagree are each taken as they are, with a warning. Raises `CheckpointError` for gains that were shifted twice.
    """
    gains = {name: array.astype(mx.float32) for name, array in stored.items()}
    usual = 1.0 if zero_centred else 0.0
    shifts: dict[str, float] = {}
    readings: list[str] = []
    for family in FAMILIES:
        members = [name for name in gains if family.members.search(name)]
        if not members:
            continue
        mean = float(mx.mean(mx.stack([mx.mean(gains[name]) for name in members])).item())  # type: ignore[arg-type]
        shift = 1.0 if mean < family.only_w else 0.0 if mean >= family.only_gain else usual
        if family is FAMILIES[0]:
            usual = shift
            if mean >= SHIFTED_TWICE:
                raise CheckpointError(
                    f"{place}: the norms of the MTP head were shifted twice, the mean of its layer norms being "
                    f"{mean:.2f}; convert the original release again."
                )
        readings.append(f"{family.name} norms as {'w' if shift else '1 + w'} (mean {mean:.2f})")
        shifts |= dict.fromkeys(members, shift)
    if len(set(shifts.values())) > 1:
        told = ", ".join(readings)
        warnings.warn(f"{place}: the norms of the MTP head are of two conventions, read {told}.", stacklevel=4)
    return {name: array + shifts.get(name, usual) for name, array in gains.items()}


def _candidates(path: Path) -> list[Path]:
    """The files to look into: the first place beside the main shards that exists, else these."""
    if path.is_file():
        return [path]
    if any((path / FOLDER).glob("model*.safetensors")):
        return weight_files(path / FOLDER)
    beside = [path / name for name in FILES if (path / name).is_file()]
    return beside[:1] or weight_files(path)


def _check_config(file: Path) -> None:
    """Refuse what released heads are not, where a config.json speaks of it."""
    raw = read_json(file) if file.exists() else {}
    for source in (raw, raw.get("text_config")):
        if not isinstance(source, dict):
            continue
        if source.get("mtp_use_dedicated_embeddings"):
            raise CheckpointError(
                f"{file}: mtp_use_dedicated_embeddings is true, but the MTP head of Qwen3.5 shares the embeddings of "
                "the model; take the head of an original release."
            )
        layers = source.get("mtp_num_hidden_layers", 1)
        if isinstance(layers, int) and layers > 1:
            raise CheckpointError(f"{file}: mtp_num_hidden_layers is {layers}; only MTP heads of one layer can be run.")


def _written_by_mlx(file: Path) -> bool:
    return load_with_metadata(file)[1].get("format") == "mlx"
