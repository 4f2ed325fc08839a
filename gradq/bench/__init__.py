"""Benchmarks: what every measurement records, whatever it measures."""
