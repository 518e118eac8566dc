"""Tile shapes of the exp-sum product: the shipped default and what a GPU can be tuned over.

Every one compiles for compute capability 9.0 without spilling a register, in every mode that it
can run in (`bench/compile_report.py` is the proof).
"""

from dataclasses import dataclass

SHARED_BYTES = 232_448
"""Shared memory that one program can have on a Hopper GPU."""


@dataclass(frozen=True)
class Tiles:
    """How the product [T, H] x [V, H]^T is cut, and how deep its loads run ahead."""

    block_m: int
    """Rows of a tile."""
    block_n: int
    """Vocabulary ids of a tile, at most 256."""
    block_k: int
    """Depth of one step."""
    warps: int
    stages: int
    """Steps in shared memory at once."""
    split: int = 1
    """Parts in which a tile of the table leaves; 2 halves the shared memory that it needs."""
    group_m: int = 16
    """Row tiles of a band (see `expsum_kernels.tile_of`)."""
    per_sm: int = 1
    """Programs of one multiprocessor: with two, one sums up while the other multiplies."""

    def shared_bytes(self, *, store: bool) -> int:
        """Shared memory of a program but for its barriers, under 1 KB."""
        steps = self.stages * (self.block_m + self.block_n) * self.block_k * 2
        return steps + (self.block_m * self.block_n * 2 // self.split if store else 0)

    def fits(self, *, store: bool) -> bool:
        """Whether the mode's shared memory suffices for `per_sm` programs."""
        return self.per_sm * (self.shared_bytes(store=store) + 1024) <= SHARED_BYTES


TILES: dict[str, Tiles] = {
    "128x256": Tiles(128, 256, 64, warps=8, stages=3),
    "128x256-deep": Tiles(128, 256, 64, warps=8, stages=4, split=2),
    "128x256-band8": Tiles(128, 256, 64, warps=8, stages=3, group_m=8),
    "128x256-band32": Tiles(128, 256, 64, warps=8, stages=3, group_m=32),
    "128x256-k128": Tiles(128, 256, 128, warps=8, stages=2),
    "256x128": Tiles(256, 128, 64, warps=8, stages=3),
    "256x128-deep": Tiles(256, 128, 64, warps=8, stages=4, split=2),
    "128x128-pair": Tiles(128, 128, 64, warps=4, stages=3, split=2, per_sm=2),
    "64x256": Tiles(64, 256, 64, warps=4, stages=4),
}
"""By name. A 128 x 256 tile moves the fewest bytes for its products that the registers can hold."""

DEFAULT = "128x256"
