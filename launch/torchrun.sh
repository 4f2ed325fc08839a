#!/usr/bin/env bash
# Start a gradq training script with torchrun.
#
#   launch/torchrun.sh NPROC SCRIPT [ARGUMENTS...]
#   launch/torchrun.sh 2 examples/train_gpt.py --codec int8
#
# One node: NPROC ranks on this machine; nothing else to set.
#
# Several nodes: run the same command on every node, with
#
#   NNODES=4 RDZV=node0:29500 IFACE=eth0 launch/torchrun.sh 2 examples/train_gpt.py --codec int4
#
#   NNODES   number of nodes (default 1), or 2:4 for an elastic job: nodes may join and leave, all ranks start
#            again, and the script continues from its newest checkpoint (examples/diloco.py --checkpoint does)
#   RDZV     host:port of the node where ranks meet; any free port, the same everywhere
#   JOB      a name that keeps jobs at the same RDZV apart (default gradq)
#   RESTARTS how often an elastic job may start again (default 100)
#   IFACE    network interface that carries the gradients (`ip -brief address` lists them). Set it when a node
#            has several: Gloo takes the one the host name resolves to, which is often the wrong one.
#   THREADS  threads a rank computes with (default: the cores of the node shared out evenly)
#   PYTHON   the interpreter (default: .venv/bin/python if there is one, else python3)
set -euo pipefail

if [[ $# -lt 2 || $1 == -* ]]; then
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
nproc_per_node=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3

# torchrun would set 1 and warn; more threads than cores make every rank slower.
threads=$(( $(getconf _NPROCESSORS_ONLN) / nproc_per_node ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${THREADS:-$(( threads > 0 ? threads : 1 ))}}

if [[ -n ${IFACE:-} ]]; then
  export GLOO_SOCKET_IFNAME=$IFACE NCCL_SOCKET_IFNAME=$IFACE
fi

elastic=()
if [[ ${NNODES:-1} == 1 ]]; then
  [[ -e /sys/class/net/lo ]] && export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
  meet=(--standalone) # a free port of this machine
else
  if [[ $NNODES == *:* ]]; then
    # With torch 2.13 a node that joins a running job waits for ever otherwise.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
    elastic=(--max-restarts "${RESTARTS:-100}")
  fi
  meet=("${elastic[@]}" --nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${JOB:-gradq}")
  meet+=(--rdzv-endpoint "${RDZV:?set RDZV=host:port, the same on every node}")
fi

exec "$python" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$nproc_per_node" "$@"
