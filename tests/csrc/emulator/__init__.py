"""Executes the PTX of the CUDA kernels on a CPU, as the PTX ISA manual describes it.

``toolchain`` makes the PTX with the build's compiler and flags. ``ptx`` parses it. ``memory`` has matrices, shared
memory and tensor maps, ``machine`` clusters, CTAs, warpgroups and barriers, and the order in which they run.
``arithmetic``, ``accesses``, ``synchronisation``, ``bulk_copies`` and ``tensor_cores`` have the instructions.
``launches`` fills the matrices of a launch, runs it, and compares with float64 (``exact``).

What the hardware may delay is delayed: copies, multicasts, and arrivals and stores at other CTAs take effect at
random later times, in any order; products read their operands and write their accumulators only when they are waited
for; stores by TMA read their source only when they are waited for; ordinary stores reach TMA and the tensor cores
only through a proxy fence. Shared memory starts as NaN. So a missing fence, wait or barrier gives a wrong number, a
deadlock, or an error.

Not modelled: time; the skew of warps inside a warpgroup, whose 128 threads run in lockstep; stale reads by a thread
that waits without acquiring.
"""
