# Each target sets up what it needs: a virtual environment in .venv with exactly what requirements.txt names.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/requirements.txt
PAGE := .venv/requirements-space.txt

# One process of tests for each core, one thread for each process.
test fast: export OMP_NUM_THREADS := 1
FAST := $(addprefix tests/test_,$(addsuffix .py,comparison corpora corpora_convert corpora_formats evaluation fusion \
	model_card modeling processing results results_avatars results_folds robustness towers))

.PHONY: help install test fast quickstart demo results gpu

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv, with exactly what requirements.txt names

fast: $(INSTALLED) ## linter and the quick tests, in under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q -n auto -m "not slow" $(FAST)

test: $(INSTALLED) ## linter, types and all tests, fast ones first
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto --dist loadfile -m "not slow"
	$(BIN)/pytest -q -n auto --dist worksteal -m slow

# Each step is skipped once it is finished; an interrupted one goes on where it was.
QUICK := runs/quickstart
CLIPS := --corpus_dir $(QUICK)/clips --corpus_options '{"train": 2880, "validation": 24, "test": 240}'
TOWERS := $(QUICK)/towers/towers
EVAL := $(BIN)/python eval.py $(QUICK)/model --corpus avatars --corpus_dir $(QUICK)/clips --split test

quickstart: $(QUICK)/emotion/metrics.json $(QUICK)/score/metrics.json ## generate clips, train, evaluate, predict: a quarter of an hour on two CPU cores
	$(BIN)/python predict.py $(QUICK)/model $(QUICK)/clips/test/avatars_test_disagreement_0000.mp4 \
		--text "when I think of the library, I am extremely glad"
	@echo "$(QUICK)/model is the trained model, the one that the snippet in README.md loads, $(QUICK)/clips its clips;"
	@echo "$(QUICK)/emotion and $(QUICK)/score have metrics, predictions and plots: confusion.png, scores.png, gates.png."

$(TOWERS)/vision/preprocessor_config.json: | $(INSTALLED)
	$(BIN)/python train.py recipes/avatars_towers.yaml $(CLIPS) --output_dir $(QUICK)/towers
$(QUICK)/model/recipe.json: $(TOWERS)/vision/preprocessor_config.json
	$(BIN)/python train.py recipes/avatars_smollm2.yaml $(CLIPS) --output_dir $(QUICK) \
		--audio_tower $(TOWERS)/audio --vision_tower $(TOWERS)/vision --max_steps 60
$(QUICK)/emotion/metrics.json: $(QUICK)/model/recipe.json
	$(EVAL) --task avatars --output $(@D)
$(QUICK)/score/metrics.json: $(QUICK)/model/recipe.json
	$(EVAL) --task avatars_score --output $(@D)

# The words are those of the corpus.
demo: $(PAGE) $(QUICK)/model/recipe.json ## show the quickstart's model in a browser
	$(BIN)/python app.py $(QUICK)/model \
		--example $(QUICK)/clips/test/avatars_test_words_0000.mp4 "when I think of the picnic, I am a little angry" \
		--example $(QUICK)/clips/test/avatars_test_face_0000.mp4 "after the picnic I felt quite ready" \
		--example $(QUICK)/clips/test/avatars_test_disagreement_0000.mp4 \
			"when I think of the library, I am extremely glad"

results: $(INSTALLED) ## results/*.md and the tables in README.md, from results/*.json
	$(BIN)/python -m experiments.benchmarks render
	$(BIN)/python -m experiments.folds render
	$(BIN)/python -m experiments.avatars render
	$(BIN)/python -m experiments.languages render
	$(BIN)/python -m experiments.performance

PERFORMANCE := --device cuda --output results/performance.json

gpu: $(INSTALLED) ## on a machine with a GPU: its tests, and the benchmarks that fill results/performance.md
	$(BIN)/pytest -q tests/test_gpu.py
	$(BIN)/python -m bench.answer $(PERFORMANCE) --layers 28
	$(BIN)/python -m bench.train_step $(PERFORMANCE)
	$(BIN)/python -m experiments.performance

# The copy of requirements.txt is written last: an interrupted installation is begun anew from an empty .venv, and a
# changed requirements.txt updates the .venv that is there. Without pyvenv.cfg, pip would write to the system's Python.
$(INSTALLED): requirements.txt
	@if [ ! -e .venv/pyvenv.cfg ] || [ -e .venv/unfinished ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "$(PYTHON) -m venv --clear .venv"; $(PYTHON) -m venv --clear .venv; \
	fi
	@touch .venv/unfinished
	$(BIN)/python -m pip install -r requirements.txt
	@cp requirements.txt $@ && rm .venv/unfinished

$(PAGE): requirements-space.txt $(INSTALLED)
	$(BIN)/python -m pip install -r requirements.txt -r requirements-space.txt
	@cp requirements-space.txt $@
