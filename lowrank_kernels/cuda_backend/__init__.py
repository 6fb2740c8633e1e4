"""The CUDA C++ kernels of ``csrc/`` as a backend: what was built, where it runs, and the launchers of the operators.

The compiled module ``lowrank_kernels._cuda`` is made by ``pip install`` where there is a CUDA compiler. It knows
nothing of torch, so one build serves every torch of that Python.
"""
