"""Hooks: how a trainer reaches `GradientSync`."""
