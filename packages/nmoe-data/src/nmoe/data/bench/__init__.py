"""Measures of nmoe-data on the machine at hand: `python -m nmoe.data.bench`."""
