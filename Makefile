# Every target creates the environment if it is missing; README explains the targets.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUTPUT ?= output
MANIFEST ?= manifests/sample.csv
SEPARATE = $(BIN)/python -m pipelines.separate --manifest $(MANIFEST) --output $(OUTPUT) $(FLAGS)

$(READY): requirements.lock setup.py
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock -e .
	touch $@

.PHONY: env lock lint test test-engines prism fuzz run-local run-dask run-flink run-dataflow report bench train-mini

env: $(READY)

lock:  ## Rewrite requirements.lock from setup.py.
	$(BIN)/uv pip compile --quiet --upgrade --universal --all-extras --python-version 3.11 --no-emit-index-url \
		--custom-compile-command "make lock" setup.py -o requirements.lock

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

# Two processes of one thread each do more on two cores than one of two.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/pytest -q --numprocesses 2 --dist loadfile

test-engines: prism  ## Prism, worker pools, lost workers, installed packages, memory: about ten minutes, and Go.
	$(BIN)/pytest -q -m engines

prism: $(READY)  ## Beam's portable runner and its container's entry point, at the installed Beam's version.
	version=$$($(BIN)/python -c 'import apache_beam; print(apache_beam.__version__)'); \
	export GOBIN=$(CURDIR)/build/beam/$$version; \
	test -x $$GOBIN/prism || go install github.com/apache/beam/sdks/v2/go/cmd/prism@v$$version; \
	test -x $$GOBIN/container || go install github.com/apache/beam/sdks/v2/python/container@v$$version

fuzz: $(READY)  ## 10 000 hostile rows and files: about three minutes.
	$(BIN)/python -m tests.fuzz.run

run-local: $(READY)
	$(SEPARATE) --residuals --report

run-dask: $(READY)  ## docs/dask.md; DASK_SCHEDULER=tcp://host:8786
	$(SEPARATE) --runner DaskRunner $(DASK_SCHEDULER:%=--dask_client_address=%)

run-flink: $(READY)  ## docs/flink.md; FLINK_MASTER=host:8081 FLINK_JOB_SERVER_JAR=path
	$(SEPARATE) --runner FlinkRunner --flink_master='$(or $(FLINK_MASTER),[local])' \
		$(FLINK_JOB_SERVER_JAR:%=--flink_job_server_jar=%)

# What it reads and writes lies in the bucket.
run-dataflow: MANIFEST = gs://$(BUCKET)/manifests/sample.csv
run-dataflow: OUTPUT = gs://$(BUCKET)/output
run-dataflow: $(READY)  ## docs/dataflow.md; PROJECT= REGION= BUCKET= [GPU=nvidia-l4] [IMAGE=]
	$(SEPARATE) --runner DataflowRunner $(PROJECT:%=--project=%) $(REGION:%=--region=%) \
		$(BUCKET:%=--temp_location=gs://%/temp) $(GPU:%=--gpu=%) $(IMAGE:%=--sdk_container_image=%)

report: $(READY)
	$(BIN)/python -m pipelines.report $(OUTPUT)

bench: $(READY)
	$(BIN)/python -m benchmarks.model
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.queries
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.sharing
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.training

# The banks are in Debian's csound-soundfont and fluidr3mono-gm-soundfont (rendering them needs tinysoundfont), the
# voices in flite, and clapsep/training/validation.csv names packages to choose by (PACKAGES=, a folder where each is
# unpacked under its name); `apt-get download` and `dpkg -x` need no root.
train-mini: export MALLOC_MMAP_MAX_ := 0
train-mini: export MALLOC_TRIM_THRESHOLD_ := 17179869184
train-mini: $(READY)  ## CORPUS= TRAIN_BANK=sf_GMbank.sf2 TEST_BANK=FluidR3Mono_GM.sf3 FLITE=flite: hours on two cores.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps tinysoundfont==0.3.7  # its other needs are for playing
	$(BIN)/python -m clapsep.training prepare --corpus $(CORPUS) \
		$(TRAIN_BANK:%=--train-bank %) $(TEST_BANK:%=--test-bank %) $(FLITE:%=--flite %) $(PACKAGES:%=--packages %)
	$(BIN)/python -m clapsep.training pretrain
	$(BIN)/python -m clapsep.training train
	$(BIN)/python -m clapsep.training export --corpus $(CORPUS) --bundle clapsep/bundles/mini
	$(BIN)/python -m clapsep.training evaluate --bundle clapsep/bundles/mini --card
