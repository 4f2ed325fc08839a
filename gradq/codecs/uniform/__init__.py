"""Uniform levels: 2 to 8 bits an element, one scale a block."""
