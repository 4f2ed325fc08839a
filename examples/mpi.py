"""Train the small GPT with mpiexec: no torchrun, compressed gradients over MPI.

    launch/mpirun.sh 2 examples/mpi.py --codec int4
    mpiexec -n 2 python examples/mpi.py

One line differs from ddp.py: `mpi.init()` stands in the place of `init_process_group`. The model, the loop
and `gradq.compress` are the same. Under Slurm: launch/slurm.sbatch.
"""

from __future__ import annotations

import os

import ddp
import torch
import torch.distributed as dist

import gradq
from gradq.backends import mpi


def main() -> None:
    """Train as the command line says."""
    args = ddp.parse_args(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        mpi.init()
        ddp.train(args)
    except gradq.ConfigError as error:
        raise SystemExit(f"mpi.py: error: {error}") from None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
