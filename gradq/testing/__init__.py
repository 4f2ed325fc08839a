"""For tests of what runs between ranks, ours and those of users.

`run_ranks` starts real processes over Gloo: for timing, for faults, for trainers. `run_in_process` and
`Network` keep all ranks in one process: for what is computed and sent, in milliseconds.
"""

from __future__ import annotations

from gradq.testing.in_process import InProcessGroup, run_in_process
from gradq.testing.network import Exchange, Network, Route
from gradq.testing.ranks import RankError, run_ranks

__all__ = ["Exchange", "InProcessGroup", "Network", "RankError", "Route", "run_in_process", "run_ranks"]
