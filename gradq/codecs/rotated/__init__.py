"""Rotated codecs: blocks are rotated at random and coded by levels that are optimal for normal numbers."""
