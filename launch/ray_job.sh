#!/usr/bin/env bash
# Submit a gradq script to a Ray cluster.
#
#   launch/ray_job.sh ADDRESS SCRIPT [ARGUMENTS...]
#   launch/ray_job.sh http://head:8265 examples/ray_train.py --address auto --workers 8
#   launch/ray_job.sh http://head:8265 bench --nodes 8 --gpus-per-node 8 --seeds 3 --out /shared/results
#
# ADDRESS is the dashboard's. The word "bench" stands for `gradq bench --cluster auto`. The working directory (this
# repository) travels with the job; gradq and its extras must be installed on the nodes: pip install 'gradq[ray,cli]'.
#
#   IFACE    network interface that carries the gradients, if the nodes have several
#   PYTHON   the interpreter that has Ray here (default: .venv/bin/python if there is one, else python3)
set -euo pipefail

if [[ $# -lt 2 || $1 == -* ]]; then
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
address=$1
script=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python || -n ${PYTHON:-} ]] || python=python3

if [[ $script == bench ]]; then
  command=(python -c 'from gradq.cli import main; main()' bench --cluster auto "$@")
else
  command=(python "$script" "$@")
fi

environment='{}'
if [[ -n ${IFACE:-} ]]; then
  environment=$(printf '{"env_vars": {"GLOO_SOCKET_IFNAME": "%s", "NCCL_SOCKET_IFNAME": "%s"}}' "$IFACE" "$IFACE")
fi

exec "$python" -m ray.scripts.scripts job submit --address "$address" --working-dir "$root" \
  --runtime-env-json "$environment" -- "${command[@]}"
