"""Apple's chips: the memory bandwidth that is published for each, and the least time that bytes take at it.

A floor is a prediction: no launch, no latency and no second read is in it, and no chip reaches its published bandwidth.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """`bandwidth` in GB/s (10^9 bytes), for the variants with these numbers of GPU cores; `source` has the figure."""

    name: str
    gpu_cores: tuple[int, ...]
    bandwidth: float
    source: str

    @property
    def label(self) -> str:
        """The name, with the GPU cores where the bandwidth depends on them."""
        variants = [chip for chip in CHIPS if chip.name == self.name]
        return f"{self.name} ({self.gpu_cores[0]})" if len(variants) > 1 else self.name

    def floor_us(self, moved: int) -> float:
        """Microseconds that `moved` bytes take at least."""
        return moved / (1e3 * self.bandwidth)


# The figures are as others quote them from these pages, which could not be opened here.
# Apple has published no bandwidth for the M1. 68.25 GB/s is that of its memory (LPDDR4X-4266, 128 bits; AnandTech) and
# fits what Apple says of the next ones: M2 has 100 GB/s, "50 percent more" (newsroom, "Apple unveils M2"); M1 Max has
# "nearly 6x" the M1. For the M3 Ultra the newsroom says "over 800GB/s" only; the technical specifications have 819.
CHIPS = (
    Chip("M1", (7, 8), 68.25, "AnandTech, The 2020 Mac Mini Unleashed: https://www.anandtech.com/show/16252"),
    Chip(
        "M1 Max",
        (24, 32),
        400,
        "Apple newsroom, Introducing M1 Pro and M1 Max: https://www.apple.com/newsroom/2021/10/"
        "introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built/",
    ),
    Chip("M3 Ultra", (60, 80), 819, "Apple, Mac Studio (2025) Tech Specs: https://support.apple.com/en-us/122211"),
    Chip(
        "M4",
        (8, 10),
        120,
        "Apple newsroom, Apple introduces M4 chip: https://www.apple.com/newsroom/2024/05/apple-introduces-m4-chip/",
    ),
    Chip("M5 Max", (32,), 460, "Apple, MacBook Pro Tech Specs: https://www.apple.com/macbook-pro/specs/"),
    Chip(
        "M5 Max",
        (40,),
        614,
        "Apple newsroom, Apple debuts M5 Pro and M5 Max: https://www.apple.com/newsroom/2026/03/"
        "apple-debuts-m5-pro-and-m5-max-to-supercharge-the-most-demanding-pro-workflows/",
    ),
)


def recognise(device_name: str) -> Chip | None:
    """The chip of a name such as "Apple M1 Max", None if the table lacks it.

    MLX does not tell the number of GPU cores; of two variants it is the faster, so that no share is too large.
    """
    variants = [chip for chip in CHIPS if device_name == f"Apple {chip.name}"]
    return max(variants, key=lambda chip: chip.bandwidth, default=None)
