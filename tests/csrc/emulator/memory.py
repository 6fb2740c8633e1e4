"""Global and shared memory, and the tensor maps between them. The instructions that use them are in ``accesses``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SEGMENT = 40  # every matrix has an address of its own, a multiple of 2 to this power
BLANK = 0x7FC1  # a NaN in both 16-bit types, which nothing computes


def swizzle(address: np.ndarray, bytes_: int) -> np.ndarray:
    """Where a byte lies under the 128-byte or 64-byte swizzle: its 16-byte unit changes place with its 128-byte row.

    PTX ISA, "Tensors", "Swizzling modes": bits 4 to 6 are XORed with bits 7 to 9, or bits 4 and 5 with bits 7 and 8.
    The pattern follows the address in shared memory, so it repeats every 1024 or 512 bytes.
    """
    return address ^ ((address >> 7 & bytes_ // 16 - 1) << 4)


@dataclass
class Matrix:
    """A matrix of 16-bit elements in global memory, rows of ``stride``, with how often each element was written."""

    values: np.ndarray
    columns: int
    writes: np.ndarray

    @classmethod
    def blank(cls, rows: int, columns: int, stride: int) -> Matrix:
        shape = (rows, stride)
        return cls(np.full(shape, BLANK, np.uint16), columns, np.zeros(shape, np.int32))

    @property
    def inner(self) -> np.ndarray:
        """The elements, without what pads the rows."""
        return self.values[:, : self.columns]

    def written_once(self) -> bool:
        """Whether every element was written once, and nothing beside them."""
        columns = self.columns
        return bool((self.writes[:, :columns] == 1).all() and not self.writes[:, columns:].any())


class GlobalMemory:
    """Matrices by address; any access outside of them is an IndexError."""

    def __init__(self) -> None:
        self.matrices: dict[int, Matrix] = {}

    def at(self, address: int) -> Matrix:
        return self.matrices[int(address) >> SEGMENT << SEGMENT]

    def _elements(self, address: int, bytes_: int) -> tuple[Matrix, slice]:
        matrix, offset = self.at(address), int(address) & (1 << SEGMENT) - 1
        if offset % bytes_ or offset + bytes_ > matrix.values.nbytes:
            raise IndexError(f"{bytes_} bytes at {offset} of a matrix of {matrix.values.nbytes}")
        return matrix, slice(offset // 2, (offset + bytes_) // 2)

    def load(self, address: int, bytes_: int) -> np.ndarray:
        matrix, where = self._elements(address, bytes_)
        return matrix.values.reshape(-1)[where]

    def store(self, address: int, values: np.ndarray) -> None:
        matrix, where = self._elements(address, values.nbytes)
        matrix.values.reshape(-1)[where] = values
        matrix.writes.reshape(-1)[where] += 1


class SharedMemory:
    """A CTA's shared memory as ordinary instructions see it, and as the async proxy (TMA, bulk copies, wgmma) does.

    PTX ISA, "Memory Consistency Model", "Proxies": an ordinary store reaches the async proxy only by
    ``fence.proxy.async`` of the thread that made it. The other way needs none: the completion of an asynchronous copy
    at an mbarrier makes it visible ("Async Operations").
    """

    def __init__(self, size: int) -> None:
        self.generic = np.full(size, 0xFF, np.uint8)
        self.asynchronous = self.generic.copy()
        self.unpublished: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []

    def store(
        self, group: int, active: np.ndarray, addresses: np.ndarray, data: np.ndarray
    ) -> None:
        """Ordinary stores of a row of bytes for each thread."""
        self.generic[addresses[active, None] + np.arange(data.shape[1])] = data[active]
        self.unpublished.append((group, active, addresses, data))

    def publish(self, group: int, threads: np.ndarray) -> None:
        """``fence.proxy.async`` by these threads of a warpgroup."""
        left = []
        for owner, active, addresses, data in self.unpublished:
            now = active & threads if owner == group else np.zeros_like(active)
            self.asynchronous[addresses[now, None] + np.arange(data.shape[1])] = data[now]
            if (active & ~now).any():
                left.append((owner, active & ~now, addresses, data))
        self.unpublished = left

    def store_async(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """What a copy brings; ``data`` are bytes."""
        self.generic[addresses] = data
        self.asynchronous[addresses] = data

    def elements(self, addresses: np.ndarray) -> np.ndarray:
        """16-bit elements at these byte addresses, as the async proxy sees them."""
        low, high = self.asynchronous[addresses], self.asynchronous[addresses + 1]
        return low.astype(np.uint16) | high.astype(np.uint16) << 8


@dataclass(frozen=True)
class TensorMap:
    """Boxes of ``width`` columns by ``height`` rows of a matrix; a box's row is one swizzle row of 128 or 64 bytes."""

    matrix: Matrix
    width: int
    height: int

    def box(self, column: int, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and columns of a box's elements, and which of them lie in the matrix."""
        rows, columns = np.meshgrid(
            row + np.arange(self.height), column + np.arange(self.width), indexing="ij"
        )
        inside = (rows >= 0) & (rows < len(self.matrix.values))
        return rows, columns, inside & (columns >= 0) & (columns < self.matrix.columns)

    def addresses(self, start: int) -> np.ndarray:
        """Where the elements of a box lie in shared memory."""
        pitch = self.width * 2
        plain = np.arange(self.height)[:, None] * pitch + np.arange(self.width) * 2
        return swizzle(start + plain, pitch)

    @property
    def bytes(self) -> int:
        return self.width * self.height * 2
