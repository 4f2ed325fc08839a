"""The oracle and the conformance cases of tests/distributed run here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
