# make demo        set up .venv, export the demo model, make two pictures, print the table
# make demo-video  set up .venv, export the video demo, make two clips
# make test        set up .venv, lint, type check, tests
# make clean       remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip's own index serves the CUDA build of torch, several gigabytes: without a GPU take the CPU build, and where
# that index does not answer whatever build pip finds.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ANSWERS := import urllib.request as web; web.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)
GPU := $(shell command -v nvidia-smi 2>/dev/null)
ASK = $(shell $(PYTHON) -c '$(ANSWERS)' 2>/dev/null && echo --extra-index-url $(TORCH_CPU_INDEX))
TORCH_INDEX = $(if $(GPU),,$(ASK))
TORCH := torch>=2.11,<2.14

.PHONY: demo demo-video test lint types unit setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_INDEX) "$(TORCH)"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[cpu,export,plot,test]'
	touch $@

demo: setup
	$(BIN)/ddit-export flux --levels 2,4,8 --model demo --out demo.bundle
	$(BIN)/python scripts/demo.py demo.bundle

demo-video: setup
	$(BIN)/ddit-export wan --model demo-video --out demo-video.bundle
	$(BIN)/python scripts/demo.py demo-video.bundle

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files "*.cpp" "*.hpp" "*.cu" "*.cuh" ":(glob)**/kernels/*.h" | xargs $(BIN)/clang-format --dry-run -Werror

# The packages live in exporter/, runtime/ and profiles/ and import as ddit.*: links show mypy that layout. Commands
# and the packages beside them import from scripts/, as they do when they run.
types: setup
	mkdir -p build/types/ddit
	for package in exporter runtime profiles; do ln -sfn ../../../$$package build/types/ddit/$$package; done
	MYPYPATH=build/types:scripts $(BIN)/mypy --namespace-packages --explicit-package-bases build/types/ddit scripts

unit: setup
	$(BIN)/pytest -n 2 --dist loadgroup

clean:
	rm -rf $(VENV) build images demo.bundle demo-video.bundle
