#!/usr/bin/env bash
# Makes virtual environments for ExecuTorch, LiteRT and OpenVINO in a folder (default: .runtimes), then runs
# benchmarks/int8_runtimes.py with them from the environment of gradq. Needs about 6 GB and, by the network,
# 5 to 20 minutes. What cannot be installed is named, and its rows are left out.
#
#     benchmarks/int8_environments.sh [folder] [arguments of int8_runtimes.py]
set -u
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-.runtimes}"
[ $# -gt 0 ] && shift
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
# The versions that were run; torchao's own limit is below 0.19, torch's is that of both converters.
declare -A packages=(
  [executorch]="torch==2.13.0 torchao==0.18.0 executorch==1.5.1 scikit-learn"
  [openvino]="torch==2.13.0 openvino==2026.4.1 onnx onnxscript scikit-learn"
  [litert]="torch==2.13.0 torchao==0.18.0 litert-torch==0.10.0 ai-edge-litert==2.3.0 scikit-learn"
)
arguments=()
for name in executorch litert openvino; do
  python="$folder/$name/bin/python"
  if [ ! -e "$folder/$name/.installed" ]; then
    echo "==> installing $name: ${packages[$name]}"
    "${PYTHON:-python3}" -m venv "$folder/$name" || exit 1
    # shellcheck disable=SC2086  # a list of words
    if "$python" -m pip install --quiet --disable-pip-version-check ${packages[$name]} 2> "$folder/$name.log"; then
      touch "$folder/$name/.installed"
    else
      echo "==> $name could not be installed: $(grep -v WARNING "$folder/$name.log" | tail -n 1)"
      continue
    fi
  fi
  arguments+=("--$name" "$python")
done
[ ${#arguments[@]} -gt 0 ] || { echo "==> no runtime is there"; exit 1; }
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" exec "${GRADQ_PYTHON:-python3}" "$here/int8_runtimes.py" "${arguments[@]}" "$@"
