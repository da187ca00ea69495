# make demo    install, then trace, replay and report on the bundled model
# make test    install, then run the tests
# make test-portable
#              install, then check that other processors make the same decisions and pass the tests
# make test-trackers
#              install, then export replays to wandb, mlflow and tensorboard, offline, and read them back
# make campaign
#              install, then damage traces and replays in ten thousand ways, run where nothing can be written, and put
#              hostile strings wherever text goes: nothing damaged may be accepted, nothing unfinished left, and no
#              string may be more than text
# make check-models
#              install, then try every type of model in transformers: traced, replayed and verified as the table says
# make test-ray
#              install with Ray, then run experiments on clusters of this machine, with workers that are killed
# make test-kvpress
#              install with kvpress and the transformers that it needs, then compare its presses with their live runs
# make test-lens
#              install TransformerLens and nnsight, then import their caches as the documentation does
# make docs    install the generator, then build the documentation site into build/site; a warning is an error
# make check   install, then format, lint, types, tests and docs: a change must pass all of them
# make format  rewrite the code in the project's format

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRACKERS := .venv-trackers
RAY := .venv-ray
KVPRESS := .venv-kvpress
LENS := .venv-lens
DOCS := .venv-docs
JOBS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo docs test test-slow test-portable test-trackers test-ray test-kvpress test-lens campaign check check-models format clean

demo: $(VENV)/.installed
	$(BIN)/kvscope demo

# One thread for each test process: more threads than cores would slow down all of them.
test test-slow check test-trackers test-ray test-kvpress test-lens: export OMP_NUM_THREADS ?= 1
# Tests start many processes, each of which would compile all modules again.
test test-slow check test-trackers test-ray test-kvpress test-lens: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(JOBS) -m 'not slow'

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(JOBS) -m slow

test-portable: $(VENV)/.installed-dev
	$(BIN)/python tools/portable.py

test-trackers: $(TRACKERS)/.installed
	$(TRACKERS)/bin/python -c 'import mlflow, tensorboard, wandb'  # without them the tests are skipped
	$(TRACKERS)/bin/python -m pytest -q tests/tracking

test-ray: $(RAY)/.installed
	$(RAY)/bin/python -c 'import ray'  # without it the tests are skipped
	$(RAY)/bin/python -m pytest -q tests/experiments/test_on_ray.py

test-kvpress: $(KVPRESS)/.installed
	$(KVPRESS)/bin/python -c 'from kvscope.presses.build import kvpress; kvpress()'  # without it the tests are skipped
	$(KVPRESS)/bin/python -m pytest -q tests/presses

test-lens: export WANDB_MODE ?= disabled
test-lens: export HF_HUB_OFFLINE ?= 1
test-lens: $(LENS)/.installed
	$(LENS)/bin/python -c 'import nnsight, transformer_lens'  # without them the tests are skipped
	$(LENS)/bin/python -m pytest -q tests/trace/test_lens_caches.py

# The message that it switches off is about a future version of the generator, which constraints.txt does not allow.
docs: export NO_MKDOCS_2_WARNING ?= 1
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

check-models: export OMP_NUM_THREADS ?= 1
check-models: $(VENV)/.installed-dev
	$(BIN)/python tools/models.py --check

campaign: $(VENV)/.installed-dev
	$(BIN)/python tools/campaign.py --cases 10000 --output benchmarks/results/campaign.json
	$(BIN)/python tools/damaged_files.py --cases 4000 --output benchmarks/results/damaged_files.json
	$(BIN)/python tools/surroundings.py --out benchmarks/results/surroundings.json
	$(BIN)/python tools/strings.py --output benchmarks/results/strings.json

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n $(JOBS)
	$(BIN)/python tools/docs.py --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(TRACKERS) $(RAY) $(KVPRESS) $(LENS) $(DOCS) build/site

# torch is installed first, by its exact version, so that pip uses a wheel that is already in its cache.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvscope needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[fast]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# The trackers bring 40 packages that nothing else needs: they are installed beside the others, which are used as they are.
$(TRACKERS)/.installed: $(VENV)/.installed-dev
	test -x $(TRACKERS)/bin/python || $(BIN)/python -m venv $(TRACKERS)
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$site" > "$$($(TRACKERS)/bin/python -c "$$site")/dev.pth"
	$(TRACKERS)/bin/python -m pip install --quiet -c constraints.txt -e ".[wandb,mlflow,tensorboard]"
	touch $@

# Likewise: Ray is large.
$(RAY)/.installed: $(VENV)/.installed-dev
	test -x $(RAY)/bin/python || $(BIN)/python -m venv $(RAY)
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$site" > "$$($(RAY)/bin/python -c "$$site")/dev.pth"
	$(RAY)/bin/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	touch $@

# Likewise: TransformerLens and nnsight bring 40 packages. kvscope imports neither.
$(LENS)/.installed: $(VENV)/.installed-dev
	test -x $(LENS)/bin/python || $(BIN)/python -m venv $(LENS)
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$site" > "$$($(LENS)/bin/python -c "$$site")/dev.pth"
	$(LENS)/bin/python -m pip install --quiet -c constraints.txt transformer-lens nnsight
	touch $@

# kvpress needs an older transformers than the other tests, and with it older versions of what both need: an environment
# of its own, with the same torch.
$(KVPRESS)/.installed: pyproject.toml constraints.txt
	test -x $(KVPRESS)/bin/python || $(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(KVPRESS)/bin/python -m pip install --quiet -e ".[fast,kvpress]" pytest hypothesis
	touch $@

# The generator reads the package and does not import it: it needs neither torch nor the package installed.
$(DOCS)/.installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet -c constraints.txt -r $(DOCS)/requirements.txt
	touch $@
