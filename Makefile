# make demo   text -> tokenizer -> shards -> trained, quantized, packed, scored model -> plot; about five minutes on two cores
# make test   the test suite; make check = lint + types + tests
# make seeds  SEEDS="42 314 999" PRESET=presets/laptop.env RUNS=laptop   one run per seed, then means and spreads
# make record NAME=Demo TRACK=non_record_16mb RUNS=laptop OPTIONS="--notes my.md"   their logs -> a folder in records/
# make pack   build/train_gpt.py, the program as it is counted, shipped and run; make size: its bytes by section
# make leaderboard   the README's table of records, from records/*/*/submission.json
PYTHON ?= python3
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
CORPUS := $(wildcard ../shared/corpus)
export TEST_CORPUS_DIR ?= $(if $(CORPUS),$(abspath $(CORPUS)),)
RUN_ID ?= demo
SEEDS ?= 42 314 999
PRESET ?= presets/laptop.env
RUNS ?= $(basename $(notdir $(PRESET)))
LAUNCH ?= $(BIN)/python
PROGRAM ?= train_gpt.py
SETTINGS ?=
NAME ?= $(RUNS)
TRACK ?= non_record_16mb
OPTIONS ?=
unexport SEEDS PRESET RUNS LAUNCH PROGRAM SETTINGS NAME TRACK OPTIONS  # the program takes its settings from the environment

.PHONY: help venv data demo seeds record pack size leaderboard test lint check clean

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

# LAUNCH=".venv/bin/torchrun --standalone --nproc_per_node=8" uses eight GPUs; SETTINGS="NAME=value ..." goes over the preset;
# PROGRAM=build/train_gpt.py runs what make pack made, and counts its bytes
seeds: $(if $(findstring laptop,$(PRESET)),data,venv)
	for seed in $(SEEDS); do \
	  (set -a && . $(PRESET) && set +a && \
	   env $(SETTINGS) SEED=$$seed RUN_ID=$(RUNS)_seed$$seed $(LAUNCH) $(PROGRAM)) || exit; \
	done
	$(BIN)/python tools/compare_runs.py $(foreach seed,$(SEEDS),logs/$(RUNS)_seed$(seed).txt) --out logs/$(RUNS).png

record: venv
	$(BIN)/python tools/make_record.py $(foreach seed,$(SEEDS),logs/$(RUNS)_seed$(seed).txt) \
	  --name $(NAME) --track $(TRACK) --base $(PRESET) $(OPTIONS)

pack: venv
	$(BIN)/python tools/pack.py train_gpt.py -o build/train_gpt.py

size: venv
	$(BIN)/python tools/pack.py train_gpt.py --size

leaderboard: venv
	$(BIN)/python tools/leaderboard.py README.md

test: venv
	$(BIN)/python -m pytest -n auto

lint: venv
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python tools/count_lines.py train_gpt.py --limit 2500 --function-limit 60

check: lint test

clean:
	rm -rf $(VENV) build logs data/datasets data/tokenizers
