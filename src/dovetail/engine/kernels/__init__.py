"""Triton kernels of the decode step; each has a counterpart in plain torch that defines what it computes.

Responsible for: speed on NVIDIA GPUs. Imported only where a graph of the decode step is captured (graphs.py).
Not responsible for: anything a CPU runs.
"""
