"""Triton kernels of the decode step; each has a plain torch counterpart that says what it computes.

Responsible for: speed on NVIDIA GPUs. Imported only where a graph of the decode step is captured (graphs.py).
Not responsible for: anything a CPU runs.
"""
