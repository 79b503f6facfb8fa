#!/usr/bin/env bash
# Installs the CUDA compiler in a manylinux_2_28 container, for cibuildwheel.
set -euo pipefail
case "$(uname -m)" in
  x86_64) processor=x86_64 ;;
  aarch64) processor=sbsa ;;
esac
dnf install -y dnf-plugins-core
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$processor/cuda-rhel8.repo"
dnf install -y cuda-nvcc-12-8 cuda-cudart-devel-12-8
ln -sfn /usr/local/cuda-12.8 /usr/local/cuda
