# make demo and make test do everything on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0
# The toolkit that nvcc belongs to: nvcc on the PATH may be a link or a wrapper, but it knows its own place.
CUDA_HOME ?= $(shell nvcc --dryrun -c none.cu 2>&1 | sed -n 's/^\#\$$ _HERE_=//p' | xargs -r dirname)

# Machine code for these GPUs; `all` is what a release is built for. One is enough to check the kernels.
CUDA_ARCHITECTURES ?= 9.0
# Compiled once, found again: a compiler of this name in front of the others, where ccache is installed.
CCACHE_COMPILERS := $(firstword $(wildcard /usr/lib/ccache /usr/lib64/ccache))
ifneq ($(CCACHE_COMPILERS),)
export PATH := $(CCACHE_COMPILERS):$(PATH)
endif

BIN := $(VENV)/bin
BUILD_NEEDS := "setuptools>=70" wheel ninja "pybind11>=2.13" numpy
SOURCES := setup.py pyproject.toml MANIFEST.in $(shell find csrc -type f)
ENVIRONMENT := $(VENV)/.environment-$(TORCH)
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.lint-installed
CUDA_ENVIRONMENT := $(CUDA_VENV)/.environment-$(CUDA_TORCH)
CUDA_INSTALLED := $(CUDA_VENV)/.installed-$(subst ;,_,$(CUDA_ARCHITECTURES))
# As many processes as there are cores, up to four: each has torch's threads and takes about 1.5 GB. A group of tests
# (the mark xdist_group) shares one process.
PYTEST_PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadgroup
# What another torch can break: binding, dispatch, transforms, values in each dtype, the package's own calls of torch.
OLDEST_TORCH_TESTS := operator/test_values.py operator/test_autograd.py operator/test_errors.py operator/test_transforms.py \
	operator/test_overhead.py operator/test_nn.py operator/test_distributed.py operator/test_many_outputs.py \
	statistics training/test_operator_calls.py training/test_full_batch_fit.py packaging/test_import.py packaging/test_examples.py
# The kernels know nothing of torch, so their own tests are programs of their own, compiled in one mode each: `address` and
# `thread` with sanitizers, `plain` as the package compiles them. SEED and ROUNDS may be given: a longer night, other numbers.
SEED ?= 1
ROUNDS ?= 20000
CUDA_ROUNDS ?= 1500
ifeq ($(origin CXX),default)
CXX := c++
endif
# -Wno-maybe-uninitialized: GCC's own AVX-512 header.
KERNEL_FLAGS := -std=c++17 -Icsrc -Itests/kernels -Wall -Wextra -Wno-unused-parameter -Wno-maybe-uninitialized
address_FLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
thread_FLAGS := -O1 -g1 -fsanitize=thread
plain_FLAGS := -O3
KERNEL_TESTS := build/kernels/address/fuzz build/kernels/thread/threads build/kernels/plain/fuzz \
	$(foreach mode,address thread plain,build/kernels/$(mode)/cuda_fuzz)
# The CUDA kernels are compiled as C++. In the mode `thread` they alone are instrumented, for tests/kernels/emulation/races.h.
CUDA_KERNEL_FLAGS := -Itests/kernels/emulation $(KERNEL_FLAGS) -Wno-unknown-pragmas -Wno-unused-variable
CUDA_KERNEL_HEADERS := csrc/fit/rule.h $(shell find csrc/cuda/kernels tests/kernels -name '*.h' -o -name '*.cuh')
address_MACHINE_FLAGS := $(address_FLAGS) -O2
thread_MACHINE_FLAGS := -O2 -g1
plain_MACHINE_FLAGS := $(plain_FLAGS)
# ThreadSanitizer's memory has fixed places, which some kernels' randomized addresses get into.
FIXED_ADDRESSES = $(shell setarch -R true 2>/dev/null && echo setarch -R)
# From a folder where `import torchintro` finds the installed package, not the checkout's build for the other torch.
CUDA_PYTEST := cd $(CUDA_VENV) && bin/pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR)

.PHONY: help demo test sanitize lint format bench build cuda-environment cuda-build gpu-check clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1  /p' $(MAKEFILE_LIST) | awk '{printf "  make %-18s", $$2; $$1=$$2=""; print}'

demo: $(INSTALLED) ## Set up, build and run the introduction's six steps on real data
	$(BIN)/torchintro demo

test: $(INSTALLED) ## Set up, build and run the test suite
	@echo "Running the tests (about 12 minutes on two slow cores)"
	$(BIN)/pytest $(PYTEST_PROCESSES)

sanitize: ## Fuzz the kernels alone, CUDA's on an emulated GPU, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	@$(MAKE) --no-print-directory -j$$(getconf _NPROCESSORS_ONLN) $(KERNEL_TESTS)
	build/kernels/address/fuzz --self-test
	build/kernels/address/fuzz --seed $(SEED) --rounds $(ROUNDS)
	$(FIXED_ADDRESSES) build/kernels/thread/threads --self-test
	$(FIXED_ADDRESSES) build/kernels/thread/threads
	build/kernels/plain/fuzz --self-test
	build/kernels/plain/fuzz --seed $(SEED) --rounds $(ROUNDS)
	for mode in address thread plain; do \
		build/kernels/$$mode/cuda_fuzz --self-test && \
		build/kernels/$$mode/cuda_fuzz --seed $(SEED) --rounds $(CUDA_ROUNDS) || exit 1; \
	done

.SECONDARY: # keeps the object files
define kernel_tests
build/kernels/$(1)/%.o: csrc/cpu/kernels/%.cpp $(wildcard csrc/cpu/kernels/*.h)
	@mkdir -p $$(@D)
	@echo "$(1): $$<"
	@$$(CXX) $(KERNEL_FLAGS) $($(1)_FLAGS) -c $$< -o $$@

build/kernels/$(1)/%: tests/kernels/%.cpp $(wildcard tests/kernels/*.h) \
		$(patsubst csrc/cpu/kernels/%.cpp,build/kernels/$(1)/%.o,$(wildcard csrc/cpu/kernels/*.cpp))
	@echo "$(1): $$<"
	@$$(CXX) $(KERNEL_FLAGS) $($(1)_FLAGS) $$(filter %.cpp %.o,$$^) -o $$@

build/kernels/$(1)/cuda/%.o: csrc/cuda/kernels/%.cu $(CUDA_KERNEL_HEADERS)
	@mkdir -p $$(@D)
	@echo "$(1): $$<"
	@$$(CXX) $(CUDA_KERNEL_FLAGS) $($(1)_FLAGS) -x c++ -c $$< -o $$@

build/kernels/$(1)/cuda/%.o: tests/kernels/emulation/%.cu $(CUDA_KERNEL_HEADERS)
	@mkdir -p $$(@D)
	@echo "$(1): $$<"
	@$$(CXX) $(CUDA_KERNEL_FLAGS) $($(1)_FLAGS) -x c++ -c $$< -o $$@

build/kernels/$(1)/cuda/%.o: tests/kernels/emulation/%.cpp $(CUDA_KERNEL_HEADERS)
	@mkdir -p $$(@D)
	@echo "$(1): $$<"
	@$$(CXX) $(CUDA_KERNEL_FLAGS) $($(1)_MACHINE_FLAGS) -c $$< -o $$@

build/kernels/$(1)/cuda_fuzz: tests/kernels/cuda_fuzz.cpp $(CUDA_KERNEL_HEADERS) \
		$(patsubst %,build/kernels/$(1)/cuda/%.o,$(basename $(notdir \
			$(wildcard csrc/cuda/kernels/*.cu tests/kernels/emulation/*.cu tests/kernels/emulation/*.cpp))))
	@echo "$(1): $$<"
	@$$(CXX) $(CUDA_KERNEL_FLAGS) $($(1)_MACHINE_FLAGS) $$(filter %.cpp %.o,$$^) -o $$@
endef
$(foreach mode,address thread plain,$(eval $(call kernel_tests,$(mode))))

bench: $(INSTALLED) ## Time eager PyTorch, torch.compile and the fused operator side by side
	$(BIN)/python -m benchmarks --grid --trials --json benchmarks/results/latest.json --plot benchmarks/results/latest

lint: $(LINT_INSTALLED) ## Check format, style, types and the direction of imports: ruff, clang-format, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'examples/*' 'tests/kernels/*' | grep -E '\.(h|cpp|cu|cuh)$$')
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(LINT_INSTALLED) ## Format the sources in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'examples/*' 'tests/kernels/*' | grep -E '\.(h|cpp|cu|cuh)$$')

build: $(INSTALLED) ## Set up and build only

$(ENVIRONMENT):
	@echo "1/3 Creating the environment $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "2/3 Installing $(TORCH) (0.2 GB where it is built for the CPU, 4 GB with CUDA) and what the build needs"
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet $(BUILD_NEEDS)
	rm -f $(VENV)/.environment-* && touch "$@"

# The object files stay in build/objects: after a change only what it touches is compiled.
$(INSTALLED): $(ENVIRONMENT) $(SOURCES)
	@echo "3/3 Building torchintro: $(words $(filter csrc/%.cpp,$(filter-out csrc/cuda/% csrc/fit/cuda/%,$(SOURCES)))) C++ files" \
		"(about 4 minutes on two slow cores, once), and installing what it needs"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[cli,test]"
	touch "$@"

$(LINT_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --group lint
	touch "$@"

cuda-environment: $(CUDA_ENVIRONMENT) # Install a CUDA build of the oldest torch supported (5 GB, no GPU needed)

$(CUDA_ENVIRONMENT):
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet --upgrade pip
	$(CUDA_VENV)/bin/pip install --quiet "$(CUDA_TORCH)"
	$(CUDA_VENV)/bin/pip install --quiet $(BUILD_NEEDS)
	touch "$@"

# A build folder and a wheel of its own, so that the checkout's in-place build for the other torch stays as it is.
$(CUDA_INSTALLED): $(CUDA_ENVIRONMENT) $(SOURCES) $(shell find torchintro -name "*.py")
	@echo "Building torchintro with CUDA for $(CUDA_ARCHITECTURES) (about 5 minutes on two slow cores for one architecture)"
	rm -rf build/cuda/dist $(CUDA_VENV)/.installed*
	CUDA_HOME="$(CUDA_HOME)" TORCHINTRO_CUDA=1 $(if $(filter-out all,$(CUDA_ARCHITECTURES)),TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)") \
		$(CUDA_VENV)/bin/python setup.py --quiet build --build-base build/cuda bdist_wheel --skip-build --dist-dir build/cuda/dist
	$(CUDA_VENV)/bin/pip install --quiet --force-reinstall --no-deps build/cuda/dist/*.whl
	$(CUDA_VENV)/bin/pip install --quiet "$(CUDA_TORCH)" "$$(ls build/cuda/dist/*.whl)[cli,test]"
	touch "$@"

cuda-build: $(CUDA_INSTALLED) ## Build with CUDA, no GPU needed, for one architecture or CUDA_ARCHITECTURES=all; test the oldest torch
	@echo "Running the tests of the build and of the oldest torch (about 5 minutes on two slow cores)"
	$(CUDA_PYTEST) $(CURDIR)/tests/cuda/test_cuda_build.py -rs
	$(CUDA_PYTEST) $(PYTEST_PROCESSES) $(addprefix $(CURDIR)/tests/,$(OLDEST_TORCH_TESTS)) -m "not slow"

gpu-check: ## On a machine with a GPU and torch: build, tests marked cuda, compute-sanitizer, benchmarks, their record
	$(PYTHON) -m benchmarks.gpu_check

clean: ## Remove what was built (not the environments)
	rm -rf build dist torchintro/*.so *.egg-info $(INSTALLED) $(CUDA_VENV)/.installed*
