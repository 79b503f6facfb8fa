#!/bin/sh
# The report on a GPU, for machines with or without make: benchmarks/gpu_report.sh [FOLDER] [OPTIONS].
# PYTHON has the torch to build against; nothing is downloaded or installed into it.
here=$(cd "$(dirname "$0")/.." && pwd) || exit 1
case ${1-} in
  '' | -*) ;;
  *) mkdir -p "$1" && folder=$(cd "$1" && pwd) || exit 1; shift; set -- "$folder" "$@" ;;
esac
cd "$here" || exit 1
exec "${PYTHON:-python3}" -m benchmarks.gpu.report "$@"
