"""Measures the exchange of rows between GPUs, and MoE layers over several of them: `python -m nmoe.rdep.bench`."""
