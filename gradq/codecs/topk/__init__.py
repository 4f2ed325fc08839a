"""Top-k: the largest elements of every block, with their places."""
