"""Benchmarks of pymc_flows; run one with ``python -m benchmarks.NAME``. See README.md."""
