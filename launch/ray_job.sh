#!/usr/bin/env bash
# Submit a gradq script to a Ray cluster.
#
#   launch/ray_job.sh ADDRESS SCRIPT [ARGUMENTS...]
#   launch/ray_job.sh http://head:8265 examples/ray_train.py --address auto --workers 8
#   launch/ray_job.sh http://head:8265 bench --nodes 8 --gpus-per-node 8 --seeds 3 --out /shared/results
#
# ADDRESS is the dashboard's. The word "bench" stands for `gradq bench --cluster auto`. The folder this is called in
# (or the script's, if the script lies elsewhere) travels with the job, without what .gitignore names; gradq and its
# extras must be installed on the nodes: pip install 'gradq[ray,cli]'.
#
# One machine is a cluster of one node; no job is needed: gradq bench --cluster local --ranks-per-node 2
#
#   IFACE           network interface that carries the gradients, if the nodes have several
#   PYTHON          the interpreter that has Ray here (default: .venv/bin/python if there is one, else python3)
#   CLUSTER_PYTHON  the interpreter that has torch and gradq on the nodes, as a path there (default: python). The
#                   job says so and ends if it has not.
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

remote=${CLUSTER_PYTHON:-python}
folder=$PWD
if [[ $script == bench ]]; then
  command=(-m gradq bench --cluster auto "$@")
else
  [[ -f $script ]] || {
    echo "there is no file $script: name a script of this machine, it travels with the job" >&2
    exit 2
  }
  file=$(realpath "$script")
  [[ $file == "$folder"/* ]] || folder=$(dirname "$file")
  command=("${file#"$folder"/}" "$@")
fi
# Said on the node, before anything else: which interpreter runs, and what it lacks. (Ray puts this into double quotes.)
check="import os, sys, importlib.util as u; m = [n for n in ('torch', 'ray', 'gradq') if u.find_spec(n) is None];"
check+=" m and sys.exit(sys.executable + ' on this node has no ' + ', '.join(m) + ': set CLUSTER_PYTHON');"
check+=" os.execv(sys.executable, [sys.executable] + sys.argv[1:])"

environment='{}'
if [[ -n ${IFACE:-} ]]; then
  environment=$(printf '{"env_vars": {"GLOO_SOCKET_IFNAME": "%s", "NCCL_SOCKET_IFNAME": "%s"}}' "$IFACE" "$IFACE")
fi

exec "$python" -m ray.scripts.scripts job submit --address "$address" --working-dir "$folder" \
  --runtime-env-json "$environment" -- "$remote" -c "$check" "${command[@]}"
