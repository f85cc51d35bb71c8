"""How far long work is, on stderr, by the bars of huggingface_hub; nothing where nobody watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def tokens_through(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told how many tokens are through, and of how many."""
    with _bar(desc=what, unit=" tokens") as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def tensors_through(what: str, tensors: int, nbytes: int) -> Iterator[Callable[[int, int], None]]:
    """A function that is told how many tensors more, and bytes more, are through."""
    finished = 0
    with _bar(desc=what, unit="B", total=nbytes) as bar:

        def advance(count: int, read: int) -> None:
            nonlocal finished
            finished += count
            bar.set_postfix_str(f"{finished} of {tensors} tensors", refresh=False)
            bar.update(read)

        yield advance


def _bar(**options: Any) -> Any:
    from huggingface_hub.utils import tqdm  # late: 0.4 s

    return tqdm(unit_scale=True, leave=False, disable=not sys.stderr.isatty(), **options)
