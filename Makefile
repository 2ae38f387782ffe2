# offrl: `make` lists what there is. Every target sets up what it needs.
SHELL := /bin/bash
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DAGSTER_HOME := $(CURDIR)/.dagster
export DVC_SITE_CACHE_DIR := $(CURDIR)/.dvc/tmp/site
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export GX_ANALYTICS_ENABLED := false
export OMP_NUM_THREADS := 1
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 3000
PIPELINE ?= icu_sepsis

.DEFAULT_GOAL := help
.PHONY: help install logs demo ui new check test bench-data bench-ope bench-training bench-control bench-answers calibrate calibrate-smoke clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(VENV)/.installed  ## make .venv and install the pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

logs: install  ## make or fetch the example's raw logs, a DVC stage
	@dvc repro --quiet $(PIPELINE)

demo: logs  ## from raw ICU logs to a gated policy, then one table; with PIPELINE=open_bandit, from real clicks
	@python -m orchestration.demo $(PIPELINE)

ui: install  ## the Dagster UI with the reports, on 127.0.0.1:3000
	@python -m orchestration.webserver --port $(PORT)

new: install  ## a pipeline for your own logs: make new NAME=my_logs
	@dg scaffold defs orchestration.pipeline.OfflineRLPipeline $(NAME)

check: install  ## is every pipeline's YAML right?
	@offrl validate $$(grep -l OfflineRLPipeline orchestration/defs/*/defs.yaml)
	@dg check defs

test: install  ## style, types and every test
	ruff check .
	ruff format --check .
	pyright
	dg check defs
	pytest --numprocesses auto --dist loadfile

bench-data: install  ## from 10 million raw rows to episodes, and every check of them, beside polars, DuckDB and pandas
	@python -m benchmarks.data
	@python -m benchmarks.coverage

bench-ope: install  ## off-policy evaluation beside SCOPE-RL, OBP and d3rlpy, which get an environment of their own in .peers
	@python -m benchmarks.ope --make-peers

bench-training: install  ## gradient steps per second beside d3rlpy, and CORL: make bench-training CHECKOUTS="--corl ../CORL"
	@python -m benchmarks.training --make-peers $(CHECKOUTS)

bench-control: install  ## what continuous methods earn on Pendulum and MuJoCo's Reacher beside d3rlpy's, in the same environment
	@python -m benchmarks.control --make-peers

bench-answers: install  ## what discrete methods find on ICU-Sepsis beside the optimum of a log, and beside d3rlpy
	@python -m benchmarks.known_answers --make-peers

calibrate: install  ## how often the gate is wrong, on logs whose truth is known: hours; stop and start it at will
	@python -m benchmarks.calibrate

calibrate-smoke: install  ## policies that are no better, and one that is, on 60 small logs: seconds
	@python -m benchmarks.calibrate --smoke

clean:  ## remove everything that can be made again, but no raw logs and no released policy
	rm -rf data/*/{coverage,episodes,behavior,candidates,leaderboard,evidence,shift,reports,tensorboard}
