# make demo and make test do everything on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0
# The toolkit that nvcc belongs to: nvcc on the PATH may be a link or a wrapper, but it knows its own place.
CUDA_HOME ?= $(shell nvcc --dryrun -c none.cu 2>&1 | sed -n 's/^\#\$$ _HERE_=//p' | xargs -r dirname)

BIN := $(VENV)/bin
BUILD_NEEDS := "setuptools>=70" wheel ninja "pybind11>=2.13" numpy
SOURCES := setup.py pyproject.toml MANIFEST.in $(shell find csrc -type f)
ENVIRONMENT := $(VENV)/.environment-$(TORCH)
INSTALLED := $(VENV)/.installed
LINT_INSTALLED := $(VENV)/.lint-installed
CUDA_ENVIRONMENT := $(CUDA_VENV)/.environment-$(CUDA_TORCH)
CUDA_INSTALLED := $(CUDA_VENV)/.installed
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
address_FLAGS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
thread_FLAGS := -O1 -g -fsanitize=thread
plain_FLAGS := -O3
KERNEL_TESTS := build/kernels/address/fuzz build/kernels/thread/threads build/kernels/plain/fuzz \
	$(foreach mode,address thread plain,build/kernels/$(mode)/cuda_fuzz)
# The CUDA kernels are compiled as C++. In the mode `thread` they alone are instrumented, for tests/kernels/emulation/races.h.
CUDA_KERNEL_FLAGS := -Itests/kernels/emulation $(KERNEL_FLAGS) -Wno-unknown-pragmas -Wno-unused-variable
CUDA_KERNEL_HEADERS := csrc/fit/rule.h $(shell find csrc/cuda/kernels tests/kernels -name '*.h' -o -name '*.cuh')
address_MACHINE_FLAGS := $(address_FLAGS) -O2
thread_MACHINE_FLAGS := -O2 -g
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
	$(BIN)/pytest

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
	$(BIN)/torchintro bench --grid --trials --json benchmarks/results/latest.json --plot benchmarks/results/latest

lint: $(LINT_INSTALLED) ## Check format, style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'examples/*' 'tests/kernels/*' | grep -E '\.(h|cpp|cu|cuh)$$')
	$(BIN)/mypy

format: $(LINT_INSTALLED) ## Format the sources in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'examples/*' 'tests/kernels/*' | grep -E '\.(h|cpp|cu|cuh)$$')

build: $(INSTALLED) ## Set up and build only

$(ENVIRONMENT):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet $(BUILD_NEEDS)
	rm -f $(VENV)/.environment-* && touch "$@"

$(INSTALLED): $(ENVIRONMENT) $(SOURCES)
	@echo "Building torchintro (about a minute on two cores)"
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
	rm -rf build/cuda/dist
	CUDA_HOME="$(CUDA_HOME)" TORCHINTRO_CUDA=1 $(CUDA_VENV)/bin/python setup.py --quiet \
		build --build-base build/cuda bdist_wheel --skip-build --dist-dir build/cuda/dist
	$(CUDA_VENV)/bin/pip install --quiet --force-reinstall --no-deps build/cuda/dist/*.whl
	$(CUDA_VENV)/bin/pip install --quiet "$(CUDA_TORCH)" "$$(ls build/cuda/dist/*.whl)[cli,test]"
	touch "$@"

cuda-build: $(CUDA_INSTALLED) ## Compile, link and register the CUDA kernels without a GPU; CPU tests on the oldest torch
	$(CUDA_PYTEST) $(CURDIR)/tests/cuda/test_cuda_build.py -rs
	$(CUDA_PYTEST) $(CURDIR)/tests -m "not slow"

gpu-check: ## On a machine with a GPU and torch: build, tests marked cuda, compute-sanitizer, benchmarks, their record
	$(PYTHON) benchmarks/gpu_check.py

clean: ## Remove what was built (not the environments)
	rm -rf build dist torchintro/*.so *.egg-info $(INSTALLED) $(CUDA_INSTALLED)
