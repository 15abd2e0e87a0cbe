"""Triton kernels, one file per kernel. Imported only where there is a GPU, or by tests in triton's interpreter."""
