"""What every MPI rank of the tests runs: `python ranks.py FOLDER`; warnings are errors here too."""

from __future__ import annotations

import faulthandler
import importlib
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gradq.backends import mpi


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(float(sys.argv[2]), exit=False)  # a hang says where
    mpi.init(timeout=timedelta(seconds=30))
    rank, results = dist.get_rank(), {}
    for name, (module, function, args) in pickle.loads((folder / "jobs").read_bytes()).items():
        try:
            results[name] = getattr(importlib.import_module(module), function)(rank, *args)
        except BaseException:
            print(f"rank {rank} failed in {name}:\n{traceback.format_exc()}", flush=True)
            raise  # ends the job
        dist.barrier()
    (folder / f"rank{rank}").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
