"""Tiles as data: the pieces a rank is cut into, the tuning space of each GPU family, and the default choice.

The space is kept small on purpose: every tile in it is compiled offline for its family and must use no local memory
(``python -m lowrank_kernels.tools.compile_check``), so each one must earn its place. What decides it:
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
from enum import Enum
from functools import lru_cache

from ..problem import RANK_CLASSES

OPERATORS = ("linear", "qkv", "ffn", "linear_norm")
SPLITS = (1, 2, 4, 8, 16)
# Queries of a sentence up to which ``attention`` has a tile of its own: the last layer of a classifier asks one.
FEW_QUERIES = 16
# Column and neuron blocks are at least this wide where a split is chosen.
SPLIT_UNIT = 64


class Family(Enum):
    """GPUs that share a tuning space. Beside each: the shared memory that a block may use there."""

    AMPERE = "ampere"
    """A100 and A30 (compute capability 8.0): 163 KiB."""
    COMPACT = "compact"
    """A10, A40, L4, L40 and RTX 30, 40 (8.6, 8.9): 99 KiB."""
    COMPACT_BLACKWELL = "compact_blackwell"
    """RTX 50 (12.0): 99 KiB; its compiler spills where the one for the older cards does not."""
    HOPPER = "hopper"
    """H100, H200 (9.0): 227 KiB, wgmma."""
    BLACKWELL = "blackwell"
    """B200 (10.0): 227 KiB, and 512 columns of tensor memory."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a block may use."""
        return {"ampere": 163, "hopper": 227, "blackwell": 227}.get(self.value, 99) * 1024

    @property
    def is_compact(self) -> bool:
        """Whether a block has 99 KiB of shared memory."""
        return self in (Family.COMPACT, Family.COMPACT_BLACKWELL)


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
    """Whether a kernel can be compiled for a tile at all: powers of two, in and somewhat beyond the tuning space."""
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


def pieces(rank: int, one_piece: bool = False) -> tuple[int, int]:
    """The widths (A, B) of the two pieces that hold ``rank``: powers of two, A > B, or B = 0 (always in one piece)."""
    size = rank_class(rank)
    first = 1 << (size.bit_length() - 1)
    if one_piece and size > first:
        return 2 * first, 0
    return first, size - first


def ffn_pieces(rank: int, family: Family) -> tuple[int, int]:
    """The pieces in the feed-forward, where two of them spill below rank 256 without wgmma."""
    return pieces(rank, one_piece=family is not Family.HOPPER and rank <= 256)


def space(
    operator: str, rank: int, itemsize: int, family: Family = Family.HOPPER
) -> tuple[Tile, ...]:
    """Every tile worth trying for an operator at a rank and element size, with splits = 1.

    The order is that of ``default``: the tile for many rows, for fewer, and for less than 64.
    """
    size = rank_class(rank)
    if itemsize == 4:
        rtx50 = family is Family.COMPACT_BLACKWELL and operator in ("linear", "qkv") and size == 128
        warps = 4 if size == 96 or rtx50 else 8
        return (Tile(16, 32, 32, 32 if operator == "ffn" else 0, warps, 1),)
    if operator == "ffn":
        return _ffn_space(size, family)
    # A row of the norm is walked twice by one program, so more programs with fewer rows are wanted; and three products
    # in one kernel leave no registers for 128 rows without wgmma.
    wide = operator != "linear_norm" and (
        operator != "qkv" or size <= 128 or family in (Family.HOPPER, Family.BLACKWELL)
    )
    if family.is_compact:
        tiles = _compact_space(size, family, operator)
        return tiles if wide or tiles[0].block_m < 128 else tiles[1:]
    if size <= 128:
        tiles = (Tile(128, 64, 64, 0, 8, 3), Tile(64, 64, 64, 0, 4, 3), Tile(16, 64, 64, 0, 4, 2))
        if family is Family.BLACKWELL and size == 64:
            # With three stages, or 64 columns and 128 rows, a few bytes spill.
            tiles = (Tile(128, 32, 64, 0, 8, 2), Tile(64, 64, 64, 0, 4, 2), tiles[2])
    elif size <= 256:
        # 32 features at a time and 8 warps: with more of the one or fewer of the other Ampere spills.
        tiles = (Tile(128, 64, 32, 0, 8, 3), Tile(64, 64, 32, 0, 8, 3), Tile(16, 64, 64, 0, 4, 2))
    elif size <= 384:
        return Tile(64, 64, 32, 0, 8, 3), Tile(16, 64, 64, 0, 4, 2)
    else:
        return Tile(64, 32, 32, 0, 8, 2), Tile(32, 32, 64, 0, 8, 2)
    return tiles if wide else tiles[1:]


def _compact_space(size: int, family: Family, operator: str) -> tuple[Tile, ...]:
    """The linear operators in 99 KiB: two stages instead of three from rank 192 on."""
    few, rtx50 = Tile(16, 64, 64, 0, 4, 2), family is Family.COMPACT_BLACKWELL
    if size <= 128:
        warps = 8 if rtx50 and size == 128 and operator == "qkv" else 4
        columns = 32 if rtx50 and size == 64 and operator == "linear" else 64
        return Tile(128, columns, 64, 0, 8, 2), Tile(64, 64, 64, 0, warps, 3), few
    if size <= 256:
        if rtx50:
            return Tile(64, 32, 64 if size == 192 else 32, 0, 8, 2), few
        return Tile(64, 64, 32, 0, 8, 2), few
    if size <= 384:
        return Tile(64, 32, 32, 0, 8, 2), few
    return (Tile(32, 32, 64, 0, 8, 2),)


def _ffn_space(size: int, family: Family) -> tuple[Tile, ...]:
    """The feed-forward's tiles: 128 rows only where the right operand comes from shared or tensor memory."""
    if size > 256:
        if family.is_compact:
            return (Tile(64, 32, 32, 16, 8, 2),)
        return (Tile(64, 64, 32, 32, 8, 2),)
    narrow = Tile(64, 64, 32, 32, 8, 2)
    if size <= (96 if family is Family.HOPPER else 64):
        narrow = Tile(64, 64, 64, 64, 4, 2)
    elif family is Family.AMPERE and size <= 128:
        # With two stages some bytes spill where p and q are kept.
        narrow = Tile(64, 64, 32, 32, 8, 3)
    elif family is Family.AMPERE:
        # With 64 columns some bytes spill where parts are added, by Triton 3.7.
        narrow = Tile(64, 128, 32, 32, 8, 2)
    few = Tile(16, 64, 64, 64, 4, 2)
    if family.is_compact and size > 128:
        few = Tile(16, 64, 64, 64, 4, 1)
    if family is Family.HOPPER:
        if size <= 128:
            # Of 66 on an H100 the fastest at 128 and 512 rows, and within 3 % of it at 4096 and 16384.
            return Tile(128, 128, 64, 64, 8, 4), narrow, Tile(16, 128, 128, 128, 8, 3)
        return Tile(128, 64, 32, 32, 8, 2), narrow, few
    if family is Family.BLACKWELL:
        return Tile(128, 64, 32, 32, 8, 2), narrow, few
    return narrow, few


def best_split(
    programs: int, shared: float, divided: float, processors: int, limit: int, merge: float = 0.0
) -> int:
    """How many programs should share a block of rows, by counting waves.

    With s of them a GPU of P multiprocessors works through ceil(programs * s / P) waves, each of which repeats the
    shared part of the work (the product with ``down``) and does 1 / s of the rest: time(s) = waves * (shared + divided
    / s), plus ``merge`` where parts have to be added up. The smallest s of the least time wins.

    Args:
        programs: programs without a split.
        shared, divided, merge: work in any one unit, for example features and columns of a row block.
        processors: multiprocessors of the GPU.
        limit: the largest split that leaves every program something to do.
    """

    def time(splits: int) -> float:
        waves = -(-programs * splits // processors)
        return waves * (shared + divided / splits) + (merge if splits > 1 else 0.0)

    return min((s for s in SPLITS if s <= max(limit, 1)), key=time)


@lru_cache(maxsize=4096)
def default(
    operator: str,
    rank: int,
    itemsize: int,
    rows: int,
    inner: int,
    width: int,
    processors: int,
    family: Family = Family.HOPPER,
) -> Tile:
    """The tile used where no measurement says better.

    ``width`` is what a split divides (columns, or neurons of a feed-forward), ``processors`` the GPU's multiprocessors.
    """
    tiles = space(operator, rank, itemsize, family)
    if itemsize == 4:
        tile = tiles[0]
    elif rows < 64 or (operator == "ffn" and rows <= 4 * processors):
        # In a feed-forward the chain of products is long: up to there more and shorter programs win.
        tile = tiles[-1]
    else:
        tile = tiles[0] if rows >= 64 * processors else tiles[max(len(tiles) - 2, 0)]
    if operator == "linear_norm":
        return tile
    return with_split(tile, operator, rows, inner, width, processors)


def with_split(
    tile: Tile, operator: str, rows: int, inner: int, width: int, processors: int
) -> Tile:
    """A tile with the split that counting waves finds best (see ``best_split``, and ``default`` for the arguments)."""
    programs = -(-rows // tile.block_m) * (3 if operator == "qkv" else 1)
    # A neuron costs two products with the rank, a column one. The parts of a split feed-forward are added by a second
    # kernel, which also makes the columns: about as much as one more product with ``down``.
    divided, merge = (2.0 * width, float(inner)) if operator == "ffn" else (float(width), 0.0)
    limit = -(-width // SPLIT_UNIT)
    return replace(
        tile, splits=best_split(programs, float(inner), divided, processors, limit, merge)
    )


def attention_space(queries: int, size: int) -> tuple[Tile, ...]:
    """The tiles of ``attention``: block_m queries, and block_n keys at a time.

    A head is held whole, so block_k says nothing. The first is the default.

    Args:
        queries: of a sentence, at most.
        size: of a head's scores or values, the larger.
    """
    if queries <= FEW_QUERIES:
        return (Tile(16, 64, 16, 0, 4, 2),)
    if queries <= 32:
        return (Tile(32, 32, 16, 0, 2, 2),)
    tiles = (Tile(64, 64, 16, 0, 4, 2), Tile(64, 32, 16, 0, 4, 2))
    # With four warps, or larger heads, some bytes spill.
    return (*tiles, Tile(128, 64, 16, 0, 8, 2)) if queries > 64 and size <= 64 else tiles
