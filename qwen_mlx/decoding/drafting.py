"""What is asked for, as a drafter and what decides on the number of its drafts: `Drafting`, or None for the plain loop.

The draft head of a model is looked for once, and what a round with drafts costs is measured in its first texts, by
rounds that make text: both are kept as long as the model.
"""

import statistics
import warnings
from collections import deque
from collections.abc import Sequence
from weakref import finalize

from qwen_mlx.decoding.draft_length import Costs, DraftLength
from qwen_mlx.decoding.drafters import MTPDrafter, NGramDrafter
from qwen_mlx.decoding.sampling import SamplingParams
from qwen_mlx.decoding.speculative import Drafting
from qwen_mlx.errors import CheckpointError
from qwen_mlx.kernels.backend import gpu_generation
from qwen_mlx.kernels.gated_delta import SCAN_TOKENS
from qwen_mlx.load_mtp import load_mtp
from qwen_mlx.model.mtp import MTPHead
from qwen_mlx.model.qwen import Qwen

MODES = ("auto", "mtp", "ngram", "off")
MOST = 4
"""Drafts of a round at most."""
DRAFTS = range(1, SCAN_TOKENS)
"""Numbers that may be asked for: of a longer round a cache cannot take back a part."""
SETTLED = 256
"""Tokens of a text before drafts are tried where each row that is verified costs almost a step."""
RESUMED = (0, 0, 0, 1, 0, 0)
"""Drafts of rounds that tell what the one with a draft takes: the last three, against the three before them."""
M3 = 15  # the GPU generation from which a quantized matmul of a few rows costs little more than that of one

_known: dict[int, "Known"] = {}  # by the id of a model; MLX's modules have no hash


def drafting(
    model: Qwen, tokens: Sequence[int], params: SamplingParams, mode: str = "auto", most: int | None = None
) -> Drafting | None:
    """For the answer to `tokens`: "mtp" by the draft head, "ngram" by what stood in the text before, "off" none, and
    "auto" by the head where the model has one. `most` drafts a round at most, None leaving that to MOST.

    A seed promises the same text again, but how many drafts a round takes follows from measured time, and with them the
    random numbers of each token: where text is drawn with a seed, "auto" is off, and the others take `most` always.
    (The head has not seen what a prefix store spared: with one, the same seed may still give another text.)

    Raises ValueError for another mode, or a `most` that is none of DRAFTS; CheckpointError for "mtp" without a head, or
    with one that cannot be read, of which "auto" warns.
    """
    if mode not in MODES:
        raise ValueError(f"speculate must be {', '.join(MODES)}, not {mode!r}.")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most not in DRAFTS):
        raise ValueError(f"num_draft_tokens must be an integer from 1 to {DRAFTS[-1]}, not {most!r}.")
    reproducible = params.seed is not None and params.temperature > 0
    if mode == "off" or (mode == "auto" and reproducible):
        return None
    known = known_of(model)
    head = None if mode == "ngram" else known.head
    if head is None and mode == "mtp":
        raise CheckpointError(
            known.trouble
            or f"{model.folder or 'The model'} has no draft head (mtp.*), so nothing can be speculated with it: "
            "convert the model from a release that has one, or take ngram."
        )
    if head is None and mode == "auto":
        return None
    drafter = NGramDrafter(tokens) if head is None else MTPDrafter(model, head)
    kind, most = "ngram" if head is None else "mtp", most or MOST
    lengths = Fixed(most) if reproducible else Learning(known.rounds[kind], most)
    return Drafting(drafter, lengths, head)


class Known:
    """Of a model: its draft head, None where it has none or, for the reason of `trouble`, none that can be read; and
    how long its rounds take with drafts of either kind."""

    def __init__(self, model: Qwen) -> None:
        self.head: MTPHead | None = None
        self.trouble: str | None = None
        self.rounds = {"mtp": Measured(), "ngram": Measured()}
        try:
            self.head = None if model.folder is None else load_mtp(model.folder, model)
        except CheckpointError as error:  # the model itself is whole, and answers without drafts
            self.trouble = str(error)
            warnings.warn(f"Nothing is speculated: {error}", stacklevel=5)


def known_of(model: Qwen) -> Known:
    """Looked for once, and kept as long as the model is."""
    if id(model) not in _known:
        _known[id(model)] = Known(model)
        finalize(model, _known.pop, id(model))
    return _known[id(model)]


class Fixed:
    """The same number of drafts in every round."""

    def __init__(self, k: int) -> None:
        self._k = k

    def choose(self) -> int:
        return self._k

    def observe(self, k: int, accepted: int, seconds: float) -> None:
        pass


class Measured:
    """Rounds with 1 and 2 drafts in plain steps, as far as they are known: with what they leave to the two plain rounds
    behind them, against three plain rounds of just before, as no machine is always as fast.

    What was drafted in vain is taken back behind its round, and the host cannot prepare the next step while the device
    verifies. Nothing is waited for that would not be: before and behind what is measured one plain step is on its way,
    so that steps overlap as they do in plain decoding.

    `resumed` are the latest with one draft behind many plain rounds: there the drafter has more to take in, and what
    drafts need has left the processor's caches.
    """

    AT_FIRST, ENOUGH = 3, 6
    """How often each is measured before it is believed, and in all: the texts behind the first measure once more each,
    as something else may have kept the machine busy. The first makes kernels and buffers, and does not count."""

    def __init__(self) -> None:
        self._rounds: dict[int, list[float]] = {1: [], 2: []}
        self.resumed: deque[float] = deque(maxlen=9)

    def plan(self, most: int) -> list[int]:
        """The numbers of drafts, up to `most`, that a text should measure, in this order."""
        kinds = sorted((k for k in self._rounds if k <= most), key=lambda k: len(self._rounds[k]))
        known = len(self._rounds[kinds[0]])
        return [0, *kinds] * max(self.AT_FIRST - known, int(known < self.ENOUGH))

    def add(self, k: int, steps: float) -> None:
        self._rounds[k].append(steps)

    def costs(self, most: int) -> Costs:
        """Of rounds with up to `most` drafts, by a line through the medians."""
        one, *two = (max(1.0, statistics.median(self._rounds[k][1:])) for k in self._rounds if k <= most)
        slope = (two[0] - 1) / 2 if two else 0.0
        resumed = statistics.median(self.resumed) if len(self.resumed) >= self.AT_FIRST else one
        return Costs((1.0, *(one + slope * (k - 1) for k in range(1, most + 1))), resume=max(0.0, resumed - one))


def in_plain_steps(plain: Sequence[float], behind: Sequence[float]) -> float:
    """What a round takes by the seconds of as many plain ones, and of it and the plain ones behind it."""
    return len(plain) * sum(behind) / sum(plain) - len(behind) + 1


class Learning:
    """Measures first, and then decides by what it has measured and by how many drafts stand (`DraftLength`)."""

    def __init__(self, measured: Measured, most: int) -> None:
        self._measured, self._most = measured, most
        self._lengths: DraftLength | None = None
        self._plan = measured.plan(most)
        self._slow_rows = (gpu_generation() or M3) < M3
        self._plain = SETTLED if self._slow_rows else 1  # the first of a text has no step to wait for
        self._seen: list[tuple[int, int]] = []
        self._run: list[float] = []  # seconds of the rounds of what is being measured
        self._before: list[float] = []  # those of three plain rounds
        self._latest: deque[tuple[int, float]] = deque(maxlen=len(RESUMED))  # once it decides
        self._decide()

    def choose(self) -> int:
        if self._lengths is not None:
            return self._lengths.choose()
        return 0 if self._plain or self._run else self._plan[0]

    def observe(self, k: int, accepted: int, seconds: float) -> None:
        if self._lengths is not None:
            self._lengths.observe(k, accepted)
            self._latest.append((k, seconds))
            if tuple(k for k, _ in self._latest) == RESUMED:
                times = [seconds for _, seconds in self._latest]
                self._measured.resumed.append(in_plain_steps(times[:3], times[3:]))
            return
        if k:
            self._seen.append((k, accepted))
        if self._plain:
            self._plain -= 1
            return
        self._run = [*self._run, seconds] if k == (0 if self._run else self._plan[0]) else []
        if len(self._run) == 3:
            if kind := self._plan.pop(0):
                self._measured.add(kind, in_plain_steps(self._before, self._run))
            else:
                self._before = self._run
            self._run = []
        self._decide()

    def _decide(self) -> None:
        if not self._plan:
            self._lengths = DraftLength(self._measured.costs(self._most), start=0 if self._slow_rows else None)
            for k, accepted in self._seen:
                self._lengths.observe(k, accepted)
