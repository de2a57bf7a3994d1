"""The native tier: kernels for the GPU at hand."""
