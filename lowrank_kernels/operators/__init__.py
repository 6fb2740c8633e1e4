"""The operators as users call them: checks, dispatch, ``torch.library`` registration and autograd, a file for each.

Each file defines ``torch.ops.lowrank_kernels.<name>`` with ``Library.define`` and ``impl`` rather than ``custom_op``:
it costs the host a third as much per call, and at batch 1 the host is slower than the kernel. The backend is chosen
inside the operator, so that a compiled graph holds for every number of rows.
"""
