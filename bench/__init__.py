"""Benchmarks of the ops against their peers; see bench/README.md."""
