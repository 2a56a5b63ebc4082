# Each target sets up what it needs: a Python (3.10 to 3.13), make and a C++ compiler are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA_BIN := .venv-cuda/bin
CSRC := $(shell find csrc -type f -not -name '*.md')
# make matrix MATRIX='--rows 3.12/2.13.0 -- tests/test_modules.py', or other options of .ci/matrix.py
MATRIX ?=
# make bench RESULTS=benchmarks/results/<name of the machine>
RESULTS ?= benchmarks/results/cpu
# what holds rnnfast and torch back to AVX2
AVX2 := RNNFAST_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	MKL_ENABLE_INSTRUCTIONS=AVX2
FORMATTED := $(filter %.h %.c %.cpp %.cu %.cuh,$(CSRC)) $(wildcard benchmarks/*.cu tests/native/*)
# the C library: everything without torch
C_SOURCES := $(wildcard csrc/c/*.cpp csrc/cpu/*.cpp csrc/cpu/drivers/*.cpp csrc/cpu/kernels/*.cpp)
C_OBJECTS := $(C_SOURCES:csrc/%.cpp=build/c/%.o)
C_FLAGS := -O3 -fopenmp -fPIC -fno-math-errno -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Icsrc
C_LINK := -shared -fopenmp -static-libstdc++ -static-libgcc \
	-Wl,-z,defs -Wl,-z,now -Wl,--version-script=csrc/c/exports.map

.PHONY: help build test test-full test-held-back wheel matrix demo lint format docs bench report \
	c-library cuda-build gpu-check clean
.DELETE_ON_ERROR:

help:
	@echo "make test        build, and run the tests that take some minutes"
	@echo "make test-full   all tests, and test-held-back: hours"
	@echo "make test-held-back  the tests once for each lesser instruction set of this machine"
	@echo "make wheel       a wheel for this Python and torch -> dist/"
	@echo "make matrix      build and test with other Pythons and torches: hours, 5 GB for each"
	@echo "make demo        train a character LSTM on English text, and sample from it"
	@echo "make lint        ruff, clang-format and mypy; make format applies the first two"
	@echo "make docs        the documentation as a site -> build/docs/index.html"
	@echo "make bench       rnnfast beside its peers on this CPU -> benchmarks/results/"
	@echo "make report      write the figures of benchmarks/results/ into the documents"
	@echo "make c-library   frozen layers for C and C++, without Python -> build/c/librnnfast.so"
	@echo "make cuda-build  compile and import the CUDA kernels (needs nvcc, no GPU)"
	@echo "make gpu-check   on a GPU machine: PYTHON=<a Python with a CUDA torch>; no network;"
	@echo "                 GPU_CHECK='--stage probe', or other options of benchmarks.gpu_check"
	@echo "make clean       remove what was built, and the virtual environments"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirements.done: .ci/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r $<
	touch $@

# The compiler's output is kept in a file, and shown only if it fails.
$(VENV)/build.done: $(VENV)/requirements.done setup.py pyproject.toml $(CSRC)
	@echo "building rnnfast (a few minutes the first time; log: $(VENV)/build.log)"
	@$(BIN)/python -m pip install -v --no-deps --no-build-isolation -e . > $(VENV)/build.log 2>&1 \
		|| { cat $(VENV)/build.log; exit 1; }
	@grep -m1 -o 'rnnfast: .*' $(VENV)/build.log
	@touch $@

build: $(VENV)/build.done

# One process for each core; a process then takes one thread where a test does not say otherwise.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test: build
	$(PYTEST)

# also those marked full: kernels with every combination of options, long trainings
test-full: build
	$(PYTEST) -m ""
	$(BIN)/python -m tests.held_back

# as machines with fewer instruction sets would run them
test-held-back: build
	$(BIN)/python -m tests.held_back

build/c/%.o: csrc/%.cpp $(filter %.h,$(CSRC))
	@mkdir -p $(@D)
	$(CXX) -std=c++20 $(C_FLAGS) -c $< -o $@

build/c/librnnfast.so: $(C_OBJECTS) csrc/c/exports.map
	$(CXX) $(C_LINK) $(C_OBJECTS) -o $@

build/c/%: csrc/c/examples/%.c build/c/librnnfast.so
	$(CC) -O2 -Wall -Wextra -Icsrc $< -Lbuild/c -lrnnfast -lm -Wl,-rpath,'$$ORIGIN' -o $@
build/c/%: csrc/c/examples/%.cpp build/c/librnnfast.so
	$(CXX) -O2 -std=c++20 -Wall -Wextra -Icsrc $< -Lbuild/c -lrnnfast -Wl,-rpath,'$$ORIGIN' -o $@

c-library:
	@$(MAKE) --no-print-directory -j$$(nproc) build/c/librnnfast.so build/c/step build/c/audio

wheel: build
	$(BIN)/python .ci/wheel.py

matrix: $(VENV)/requirements.done
	$(BIN)/python .ci/matrix.py $(MATRIX)

demo: build
	$(BIN)/rnnfast train --overwrite

lint: $(VENV)/requirements.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/requirements.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(VENV)/docs.done: .ci/requirements-docs.txt $(VENV)/requirements.done
	$(BIN)/python -m pip install --quiet -c .ci/requirements.txt -r $<
	touch $@

# Warnings, such as links that lead nowhere, are errors.
docs: build $(VENV)/docs.done
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c rnnfast/docs . build/docs
	@echo "built build/docs/index.html"

bench: build
	$(BIN)/python -m pip install --quiet -c .ci/requirements.txt -r .ci/requirements-bench.txt \
		|| echo "peers that are not installed are left out"
	$(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,rounds
	$(BIN)/python -m benchmarks.compare --peers torch onnxruntime openvino jax torch_int8 \
		--json $(RESULTS).json --csv $(RESULTS).csv
	$(BIN)/python -m benchmarks.compare --dtype bfloat16 --peers torch \
		--json $(RESULTS)-bfloat16.json --csv $(RESULTS)-bfloat16.csv
	$(AVX2) $(BIN)/python -m benchmarks.compare --peers torch \
		--json $(RESULTS)-avx2.json --csv $(RESULTS)-avx2.csv
	$(AVX2) $(BIN)/python -m benchmarks.compare --table odd --threads 1 2 --processes 2 --no-limit \
		--min-time 0.2 --peers torch --json benchmarks/results/odd-avx2.json
	$(AVX2) $(BIN)/python -m benchmarks.cells --threads 1 2 --processes 2 --min-time 0.2 \
		--peers torch --json benchmarks/results/cells-avx2.json
	$(BIN)/python -m benchmarks.models --threads 1 2 --min-time 0.3 \
		--json benchmarks/results/models.json
	$(BIN)/python -m benchmarks.cells --threads 1 2 --min-time 0.3 \
		--json benchmarks/results/cells.json
	$(BIN)/python -m benchmarks.custom --threads 1 2 --min-time 0.3 \
		--json benchmarks/results/custom.json
	$(BIN)/python -m benchmarks.frozen --threads 1 2 --json benchmarks/results/frozen.json
	$(AVX2) $(BIN)/python -m benchmarks.frozen --weights int8 --peers unfrozen torch_int8 \
		--threads 1 2 --json benchmarks/results/frozen-avx2.json
	$(BIN)/python -m benchmarks.programs --threads 1 2 --json benchmarks/results/programs.json
	$(BIN)/python -m benchmarks.sequences --json benchmarks/results/sequences.json
	$(BIN)/python -m benchmarks.streams --json benchmarks/results/streams.json
	$(BIN)/python -m benchmarks.systems --json benchmarks/results/systems.json
	$(BIN)/python -m benchmarks.memory --size 100,64,512 200,64,512 --json benchmarks/results/memory.json
	$(BIN)/python -m benchmarks.plot $(RESULTS).json --markdown --png $(RESULTS).png

report: build
	$(BIN)/python -m benchmarks.report

.venv-cuda/requirements.done: .ci/requirements-cuda.txt
	$(PYTHON) -m venv .venv-cuda
	$(CUDA_BIN)/python -m pip install --quiet -r $<
	touch $@

# Installed as a copy, not in place: the working tree's module belongs to $(VENV).
cuda-build: .venv-cuda/requirements.done
	rm -rf build/lib.*
	FORCE_CUDA=1 $(CUDA_BIN)/python -m pip install -v --force-reinstall --no-deps \
		--no-build-isolation . > .venv-cuda/build.log 2>&1 \
		|| { cat .venv-cuda/build.log; exit 1; }
	@grep -m1 -o 'rnnfast: .*' .venv-cuda/build.log
	$(CUDA_BIN)/python tests/check_cuda_build.py

# Compiles in place, for the GPU alone: the next `make build` links the module for the CPU again.
gpu-check:
	rm -f $(VENV)/build.done
	$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

clean:
	rm -rf build dist *.egg-info rnnfast/_C*.so rnnfast/_C*.json $(VENV) .venv-cuda
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
