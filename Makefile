# Two commands for a fresh clone: `make quickstart` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
# On Linux the default index brings torch with CUDA (gigabytes). For a CPU build, take it from pytorch.org:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu quickstart
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SAMPLE := outputs/sample
RUN := outputs/quickstart
# Files of tests, two at a time: most tests keep one core busy.
PARALLEL := --numprocesses 2 --dist loadfile
CORPUS := data_tools/sample_corpus/corpus.parquet

.PHONY: quickstart test test-cluster test-full soak lint clean

quickstart: $(SAMPLE)/store/build_report.json
	$(BIN)/megalite train experiment=quickstart
	$(BIN)/megalite report run_dir=$(RUN)
	@echo; echo "--- megalite generate run_dir=$(RUN) prompt=\"ROMEO:\""
	@$(BIN)/megalite generate run_dir=$(RUN) prompt="ROMEO:" temperature=0.7 max_new_tokens=160
	@echo; echo "--- megalite generate run_dir=$(RUN) prompt=\"春\""
	@$(BIN)/megalite generate run_dir=$(RUN) prompt="春" temperature=0.7 max_new_tokens=160
	@echo; echo "The loss curve: $(RUN)/report.html. More text: $(BIN)/megalite generate run_dir=$(RUN) prompt=..."

$(SAMPLE)/store/build_report.json: $(SAMPLE)/tokenizer/tokenizer.model
	$(BIN)/megalite data build input=$(CORPUS) output=$(SAMPLE)/store tokenizer.path=$(SAMPLE)/tokenizer \
	  reader.source_column=source reader.language_column=language reader.split_column=split overwrite=true

$(SAMPLE)/tokenizer/tokenizer.model: $(CORPUS) | $(VENV)/core
	$(BIN)/megalite tokenizer train input=$(CORPUS) output=$(SAMPLE)/tokenizer tokenizer.vocab_size=4096 \
	  tokenizer.character_coverage=0.95 tokenizer.language_balance=0.5 \
	  reader.language_column=language reader.split_column=split split=train overwrite=true

test: $(VENV)/dev lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not soak and not cluster"

test-full: $(VENV)/dev lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not soak and not cluster"

# A real Slurm, hosts with networks of their own, a container: as root on Debian, whose packages it installs.
test-cluster: $(VENV)/dev
	MEGALITE_TEST_INSTALL=1 $(BIN)/python -m pytest -m "not soak" tests/cluster

soak: $(VENV)/dev
	$(BIN)/python -m pytest -m soak

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy data_tools launch

# Torch first, so that its index can be chosen; DeepSpeed is built without its compiled operations, which are not used.
$(VENV)/core: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	DS_BUILD_OPS=0 $(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
