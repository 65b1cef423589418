"""Benchmarks of parafit beside what people use today. Read README.md, then `run.py`."""
