"""Measures the MoE layer beside its peers, and each hot op beside its bound, on the GPU at hand;
`python -m nmoe.kernels.bench --help`.

Nothing here imports the native tier before a layer of ours is built: a peer's process may need other versions of the
compilers that the native tier uses.
"""
