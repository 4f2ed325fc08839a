"""Runners: where the ranks of a scenario run. One interface, `base.Runner`; a file each."""
