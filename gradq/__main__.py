"""`python -m gradq`: the command line, where no script `gradq` is on PATH."""

from __future__ import annotations

from gradq.cli import main

if __name__ == "__main__":
    main()
