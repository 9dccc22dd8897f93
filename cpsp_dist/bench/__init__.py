"""Benchmarks: what this machine and this program do, measured in one run."""
