# Two commands do everything, set-up included: make demo, make test.
VENV ?= .venv
PYTHON ?= python3
# Arguments of pip that install torch: its build decides between a CPU and a CUDA device.
TORCH ?= torch
RUN ?= runs/demo
STEPS ?= 2000
BIN := $(VENV)/bin
# The strict editable install, which type checkers can read, is a folder of links to these files:
# it is made again where one has come or gone.
FILES := $(shell find rl_ebm/ agents envs -name '*.py' | sort | cksum | cut -d' ' -f1)
EDITABLE := --config-settings editable_mode=strict -e '.[dev]'
# What touches another library: run with its oldest release that is allowed, and with the newest.
RELEASES := tests/cli/test_cli.py tests/envs/test_envs_flat.py tests/envs/test_envs_gymnasium.py \
	tests/house/test_lowest.py tests/policies/test_hf.py tests/policies/test_transformer.py \
	tests/tokens/test_tokens.py tests/training/test_runs.py tests/training/test_tensorboard.py

.PHONY: demo test test-slow test-lowest test-newest paper install clean

install: $(VENV)/.installed-$(FILES)

$(VENV)/.installed-$(FILES): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt $(TORCH)
	$(BIN)/pip install -q -c constraints.txt $(EDITABLE)
	rm -f $(VENV)/.installed-*
	touch $@

# By steps and on one thread: what it prints does not depend on what else the machine does.
demo: install
	OMP_NUM_THREADS=1 $(BIN)/rl-ebm train --agent soft-q --task random --vocab-size 8 \
		--max-length 4 --seed 0 --steps $(STEPS) --out $(RUN) --overwrite
	OMP_NUM_THREADS=1 $(BIN)/rl-ebm verify $(RUN)
	@echo "curves and pictures: $(BIN)/tensorboard --logdir $(RUN)"

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

# Without the types of every call, which the fast tests check: half of the time is theirs.
test-slow: install
	$(BIN)/pytest -n auto --dist worksteal -m slow -o addopts="--strict-markers --strict-config"

# The lower bounds, exactly; TORCH puts another torch in the place of the oldest. Give both of
# these a VENV of their own. What other libraries deprecate is no error there.
test-lowest:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(filter torch,$(TORCH)),"$$(grep ^torch== constraints-lowest.txt)",$(TORCH))
	grep -v ^torch== constraints-lowest.txt > $(VENV)/lowest.txt
	$(BIN)/pip install -q -c $(VENV)/lowest.txt $(EDITABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/tensorboard --version
	$(BIN)/pytest -n auto --dist worksteal -W default -m "not slow" $(RELEASES)

test-newest:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q $(EDITABLE)
	$(BIN)/tensorboard --version
	$(BIN)/pytest -n auto --dist worksteal -W default -m "not slow" $(RELEASES)

# Every claim of the paper: hours the first time, nothing where the results are there already.
PAPER := function_space figures harder_data bounds scale weights samples traces sampled_ebm
paper: install
	for name in $(PAPER); do $(BIN)/python -m benchmarks.paper.$$name $(if $(QUICK),--quick) || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
