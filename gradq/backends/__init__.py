"""Backends: torch.distributed over transports that torch itself does not ship."""
