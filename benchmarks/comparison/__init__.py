"""What ``benchmarks/compare.py`` is made of: contenders, their traffic, and what becomes of the figures."""
