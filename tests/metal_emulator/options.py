"""How the emulator runs kernels: one frozen `Options`, and `using(...)` to change some of them for a while.

In: keyword arguments of `using`. Out: `current()`, the options in force. Knows nothing of kernels.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

from tests.metal_emulator.findings import KINDS

ORDERS = ("forward", "reverse", "random")
REDUCE_ORDERS = ("ascending", "descending", "sequential")


@dataclass(frozen=True)
class Options:
    """check: hook every memory access. False leaves guard pages, divergence, and no traffic figures.
    static_check: look at the text as the Metal compiler would before it is run.
    order: of threads, SIMD-groups and threadgroups; "random" is drawn from `seed`.
    reduce_order: how simd_sum and its kin add up: a butterfly over distances 1, 2, ... ("ascending"), over
        16, 8, ... ("descending"), or one lane after the other ("sequential").
    fma: contract a * b + c, as Apple's compiler may or may not.
    timeout_s: a kernel that runs longer is a finding.
    allow: kinds of findings that become notes of the `Run` instead of an error.
    """

    check: bool = True
    static_check: bool = True
    order: str = "forward"
    seed: int = 0
    reduce_order: str = "ascending"
    fma: bool = False
    timeout_s: float = 60.0
    allow: tuple[str, ...] = ("redundant write", "write-after-read inside a SIMD-group")

    def __post_init__(self) -> None:
        for name, choices in (("order", ORDERS), ("reduce_order", REDUCE_ORDERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if unknown := sorted(set(self.allow) - set(KINDS)):
            raise ValueError(f"allow has {unknown[0]!r}; the kinds of findings are {', '.join(KINDS)}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be positive")


_DEFAULTS = Options()
_options: ContextVar[Options] = ContextVar("metal_emulator_options", default=_DEFAULTS)


def current() -> Options:
    """The options in force."""
    return _options.get()


@contextlib.contextmanager
def using(**options: object) -> Iterator[Options]:
    """Inside, kernels run with these options in place of the ones in force outside."""
    token = _options.set(replace(current(), **options))
    try:
        yield current()
    finally:
        _options.reset(token)
