"""The commands of `n`, a file each. None imports torch, pydantic or another nmoe package before it runs."""
