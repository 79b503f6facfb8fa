#!/usr/bin/env bash
# Installs the CUDA compiler in a manylinux_2_28 container, for cibuildwheel.
set -euo pipefail
case "$(uname -m)" in
  x86_64) platform=rhel8/x86_64 ;;
  aarch64) platform=rhel8/sbsa ;;
esac
dnf install -y dnf-plugins-core
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/$platform/cuda-$(basename "$(dirname "$platform")").repo"
dnf install -y cuda-nvcc-12-8 cuda-cudart-devel-12-8
ln -sfn /usr/local/cuda-12.8 /usr/local/cuda
