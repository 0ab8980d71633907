# Every target creates the environment if it is missing; README explains the targets.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUTPUT ?= output

$(READY): requirements.lock setup.py
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock -e .
	touch $@

.PHONY: env lock lint test fuzz run-local report bench train-mini

env: $(READY)

lock:  ## Rewrite requirements.lock from setup.py.
	$(BIN)/uv pip compile --quiet --upgrade --universal --all-extras --python-version 3.11 --no-emit-index-url \
		--custom-compile-command "make lock" setup.py -o requirements.lock

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(READY)
	$(BIN)/pytest -q

fuzz: $(READY)  ## 10 000 hostile rows and files: about ten minutes.
	$(BIN)/python -m tests.fuzz.run

run-local: $(READY)
	$(BIN)/python -m pipelines.separate --manifest manifests/sample.csv --output $(OUTPUT) --residuals --report

report: $(READY)
	$(BIN)/python -m pipelines.report $(OUTPUT)

bench: $(READY)
	$(BIN)/python -m benchmarks.model
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.queries
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.memory

# The banks are in Debian's csound-soundfont and fluidr3mono-gm-soundfont; rendering them needs tinysoundfont.
train-mini: export MALLOC_MMAP_MAX_ := 0
train-mini: export MALLOC_TRIM_THRESHOLD_ := 17179869184
train-mini: $(READY)  ## CORPUS=folder TRAIN_BANK=sf_GMbank.sf2 TEST_BANK=FluidR3Mono_GM.sf3: hours on two cores.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps tinysoundfont==0.3.7  # its other needs are for playing
	$(BIN)/python -m clapsep.training prepare --corpus $(CORPUS) \
		$(TRAIN_BANK:%=--train-bank %) $(TEST_BANK:%=--test-bank %)
	$(BIN)/python -m clapsep.training pretrain
	$(BIN)/python -m clapsep.training fit
	$(BIN)/python -m clapsep.training export --corpus $(CORPUS) --bundle clapsep/bundles/mini
	$(BIN)/python -m clapsep.training evaluate --bundle clapsep/bundles/mini --card
