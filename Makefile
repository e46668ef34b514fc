# make demo   text -> tokenizer -> shards -> trained, quantized, packed, scored model -> plot; about five minutes on two cores
# make test   the test suite; make check = lint + types + tests
PYTHON ?= python3
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
CORPUS := $(wildcard ../shared/corpus)
export TEST_CORPUS_DIR ?= $(if $(CORPUS),$(abspath $(CORPUS)),)
RUN_ID ?= demo

.PHONY: help venv data demo test lint check clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

venv: $(BIN)/.installed

data: venv
	$(BIN)/python data/prepare.py stdlib --name stdlib --vocab-size 2048 --val-docs 60

demo: data
	set -a && . presets/laptop.env && set +a && RUN_ID=$(RUN_ID) $(BIN)/python train_gpt.py
	$(BIN)/python tools/summary.py logs/$(RUN_ID).txt --data data/datasets/stdlib --text-tokenizer data/tokenizers/stdlib.model
	$(BIN)/python tools/sample.py logs/$(RUN_ID).artifact --tokenizer data/tokenizers/stdlib.model --prompt 'def ' --tokens 80
	$(BIN)/python tools/plot_runs.py logs/$(RUN_ID).txt

test: venv
	$(BIN)/python -m pytest -n auto

lint: venv
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python tools/count_lines.py train_gpt.py --limit 2500 --function-limit 60

check: lint test

clean:
	rm -rf $(VENV) logs data/datasets data/tokenizers
