# Two commands do everything, set-up included: make demo, make test.
VENV ?= .venv
PYTHON ?= python3
# Arguments of pip that install torch: its build decides between a CPU and a CUDA device.
TORCH ?= torch
RUN ?= runs/demo
SECONDS ?= 60
BIN := $(VENV)/bin

.PHONY: demo test test-slow paper install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/rl-ebm train --agent soft-q --task random --vocab-size 8 --max-length 4 --seed 0 \
		--seconds $(SECONDS) --out $(RUN) --overwrite
	$(BIN)/rl-ebm verify $(RUN)
	@echo "curves and pictures: $(BIN)/tensorboard --logdir $(RUN)"

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

test-slow: install
	$(BIN)/pytest -n auto --dist worksteal -m slow

# Every claim of the paper: hours the first time, nothing where the results are there already.
PAPER := function_space figures harder_data bounds scale weights samples traces sampled_ebm
paper: install
	for name in $(PAPER); do $(BIN)/python -m benchmarks.paper.$$name $(if $(QUICK),--quick) || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
