# Each target sets up what it needs: a virtual environment in .venv with exactly what requirements.txt names.
#
#   make test        lint, then every test, fast ones first
#   make quickstart  train, evaluate: a small random LLM on a generated corpus, seconds on a CPU
#   make results     results/*.md and the tables in README.md, from results/*.json

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/requirements.txt

.PHONY: test quickstart results

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q -m "not slow"
	$(BIN)/pytest -q -m slow

quickstart: $(INSTALLED)
	@echo "A small random LLM on a generated feature corpus: it shows that everything runs, and nothing else."
	$(BIN)/python train.py recipes/tiny.yaml
	$(BIN)/python eval.py runs/tiny/model --corpus generated --task mosi --split test --output runs/tiny/test
	@echo "runs/tiny/model is the trained model, the one that the snippet in README.md loads;"
	@echo "runs/tiny/log.jsonl the training log; runs/tiny/test has metrics.json and predictions.jsonl."

results: $(INSTALLED)
	$(BIN)/python results/make_tables.py render
	$(BIN)/python results/ravdess.py render

# The copy of requirements.txt is written last: an interrupted installation is begun anew from an empty .venv, and a
# changed requirements.txt updates the .venv that is there. Without pyvenv.cfg, pip would write to the system's Python.
$(INSTALLED): requirements.txt
	@if [ ! -e .venv/pyvenv.cfg ] || [ -e .venv/unfinished ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "$(PYTHON) -m venv --clear .venv"; $(PYTHON) -m venv --clear .venv; \
	fi
	@touch .venv/unfinished
	$(BIN)/python -m pip install -r requirements.txt
	@cp requirements.txt $@ && rm .venv/unfinished
