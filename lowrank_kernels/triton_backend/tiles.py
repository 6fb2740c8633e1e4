"""Tiles as data: the pieces a rank is cut into, the default tile of each operator, and the whole tuning space.

The space is kept small on purpose: every tile in it is compiled offline for sm_80 and sm_90 and must use no local
memory (``python -m lowrank_kernels.tools.compile_check``), so each one must earn its place. What decides it:
- a block of rows times the rank is held in float32 accumulators: block_m * rank <= 32768 (128 registers a thread at 8
  warps); above rank 256 block_m is therefore 64;
- block_m 128 reads the factors half as often and is for many rows; block_m 64 fills the GPU sooner; block_m 16 is for
  less than 64 rows, where the tensor cores' time does not matter and mma.sync replaces wgmma;
- few rows leave multiprocessors idle, so ``splits`` programs share a block of rows and each does its part of the
  columns (linear, qkv) or neurons (ffn); ``splits`` is a run-time argument and costs no compilation;
- float32 without TF32 has no tensor core: one small tile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ..problem import RANK_CLASSES

OPERATORS = ("linear", "qkv", "ffn", "linear_norm")
SPLITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        block_m: rows of x.
        block_n: columns of y at a time.
        block_k: features of x at a time.
        block_f: neurons at a time (ffn only, else 0).
        warps, stages: Triton's num_warps and num_stages.
        splits: programs that share a block of rows.
    """

    block_m: int
    block_n: int
    block_k: int
    block_f: int
    warps: int
    stages: int
    splits: int = 1


def fits(tile: Tile) -> bool:
    """Whether a kernel can be compiled for a tile at all: powers of two in the range of the tuning space and somewhat beyond."""
    if not all(type(value) is int for value in asdict(tile).values()):
        return False
    blocks = (tile.block_m, tile.block_n, tile.block_k, *([tile.block_f] if tile.block_f else []))
    return (
        all(16 <= block <= 256 and block & (block - 1) == 0 for block in blocks)
        and tile.warps in (1, 2, 4, 8, 16)
        and 1 <= tile.stages <= 8
        and tile.splits in SPLITS
    )


def rank_class(rank: int) -> int:
    """The smallest rank class that holds ``rank``.

    Raises:
        ValueError: the rank is above what the kernels hold.
    """
    for size in RANK_CLASSES:
        if rank <= size:
            return size
    raise ValueError(f"rank is {rank}; the fused kernels hold at most {RANK_CLASSES[-1]}")


def pieces(rank: int, whole: bool = False) -> tuple[int, int]:
    """The widths (A, B) of the two pieces that hold ``rank``: powers of two, A > B, or B = 0; ``whole`` forbids B."""
    size = rank_class(rank)
    first = 1 << (size.bit_length() - 1)
    if whole and size > first:
        return 2 * first, 0
    return first, size - first


def ffn_pieces(rank: int, hopper: bool) -> tuple[int, int]:
    """The pieces in the feed-forward, where two of them spill on Ampere below rank 256."""
    return pieces(rank, whole=not hopper and rank <= 256)


def space(operator: str, rank: int, itemsize: int, hopper: bool = True) -> list[Tile]:
    """Every tile worth trying for an operator at a rank and element size, with splits = 1; the first is the default."""
    size = rank_class(rank)
    if itemsize == 4:
        return [Tile(16, 32, 32, 32 if operator == "ffn" else 0, 4 if size == 96 else 8, 1)]
    if operator == "ffn":
        return _ffn_space(size, hopper)
    if size <= 128:
        wide, narrow, small = (
            Tile(128, 64, 64, 0, 8, 3),
            Tile(64, 64, 64, 0, 4, 3),
            Tile(16, 64, 64, 0, 4, 2),
        )
    elif size <= 256:
        # 32 features at a time and 8 warps: with more of the one or fewer of the other Ampere spills.
        wide, narrow, small = (
            Tile(128, 64, 32, 0, 8, 3),
            Tile(64, 64, 32, 0, 8, 3),
            Tile(16, 64, 64, 0, 4, 2),
        )
    elif size <= 384:
        wide, narrow, small = None, Tile(64, 64, 32, 0, 8, 3), Tile(16, 64, 64, 0, 4, 2)
    else:
        wide, narrow, small = None, Tile(64, 32, 32, 0, 8, 2), Tile(32, 32, 64, 0, 8, 2)
    # A row of the norm is walked twice by one program, so more programs with fewer rows are wanted; and three products
    # in one kernel leave Ampere no registers for 128 rows.
    if operator == "linear_norm" or operator == "qkv" and size > 128 and not hopper:
        wide = None
    return [tile for tile in (wide, narrow, small) if tile is not None]


def _ffn_space(size: int, hopper: bool) -> list[Tile]:
    """The feed-forward's tiles: 128 rows only on Hopper, whose wgmma reads its right operand from shared memory."""
    if size > 256:
        return [Tile(64, 64, 32, 32, 8, 2)]
    narrow = (
        Tile(64, 64, 64, 64, 4, 2) if size <= (96 if hopper else 64) else Tile(64, 64, 32, 32, 8, 2)
    )
    wide = Tile(128, 64, 32, 32, 8, 2) if size > 128 else Tile(128, 64, 64, 64, 8, 3)
    return [*([wide] if hopper else []), narrow, Tile(16, 64, 64, 64, 4, 2)]


def default(
    operator: str,
    rank: int,
    itemsize: int,
    rows: int,
    units: int,
    processors: int,
    hopper: bool = True,
) -> Tile:
    """The tile used where no measurement says better.

    ``units`` is what ``splits`` divides (blocks of columns or neurons), ``processors`` the GPU's multiprocessors: the
    smallest split that gives every multiprocessor a program is taken.
    """
    tiles = space(operator, rank, itemsize, hopper)
    if itemsize == 4:
        tile = tiles[0]
    elif rows < 64:
        tile = tiles[-1]
    else:
        tile = tiles[0] if rows >= 64 * processors else tiles[max(len(tiles) - 2, 0)]
    blocks = -(-rows // tile.block_m)
    if operator == "linear_norm":
        return tile
    wanted = [s for s in SPLITS if s <= max(units, 1)]
    splits = next((s for s in wanted if blocks * s >= processors), wanted[-1])
    return replace(tile, splits=splits)
