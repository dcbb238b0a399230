# `make demo` and `make test` work on a fresh machine: they make .venv and install what constraints.txt pins.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread each: on 2 cores that takes half the time of one process of two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
NATIVE := packaging/kernels/setup.py kernels/torch-ext/fastunlearn_kernels/native.cpp

.PHONY: demo test test-guarantees test-slow fuzz lint docs bench results readme weights gallery-weights clean

# torch first and by its pinned version: pip then takes a CPU build where the machine offers one, and keeps it.
# The gallery last: an older pip does not see that what it asks for, this package, is in the same command.
$(VENV)/.installed: pyproject.toml packaging/kernels/pyproject.toml packaging/gallery/pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable packaging/kernels --editable ".[test,dev,docs]"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable packaging/gallery
	touch $@

demo: $(VENV)/.installed
	$(BIN)/fastunlearn demo --output demo --overwrite

test: $(VENV)/.installed
	$(PYTEST)

# The slow tests that guarantees name; the long tail of the kernels' tests is of `test-slow` alone.
test-guarantees: $(VENV)/.installed
	$(PYTEST) -m slow --ignore tests/kernels

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.installed
	$(BIN)/python tools/fuzz.py --seconds 600 --seed $$RANDOM

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-enable -m "not gpu" --benchmark-json benchmarks/results/cpu.json

# The figures in README and docs: made by these commands, kept in benchmarks/results/.  Half a day on 2 cores with nothing
# else to do.  First what times something, an hour or two; then what only counts, each of which keeps what is done, so that
# the same command continues: the leaderboard takes hours, metrics_miss half an hour, edits and attacks minutes each.
results: $(VENV)/.installed
	mkdir -p .benchmarks
	$(BIN)/fastunlearn demo --output demo --overwrite
	cp demo/demo.json benchmarks/results/demo.json
	cp demo/grid.png docs/grid.png
	$(BIN)/fastunlearn demo --model gallery --output .benchmarks/demo-gallery --overwrite
	cp .benchmarks/demo-gallery/demo.json benchmarks/results/demo_gallery.json
	$(BIN)/python -m pytest benchmarks/bench_bank.py --benchmark-enable --benchmark-json .benchmarks/bank.json
	$(BIN)/python -m pytest benchmarks/bench_evaluation.py --benchmark-enable --benchmark-json .benchmarks/evaluation.json
	$(BIN)/python -m pytest benchmarks/bench_second_model.py --benchmark-enable --benchmark-json .benchmarks/second.json
	$(BIN)/python -m pytest benchmarks/bench_training.py --benchmark-enable -m "not gpu" --benchmark-json .benchmarks/training.json
	$(BIN)/python benchmarks/bench_training.py .benchmarks/training.json benchmarks/results/training_cpu.json
	$(BIN)/python -m pytest benchmarks/bench_kernels.py --benchmark-enable -m "not gpu" --benchmark-json .benchmarks/kernels.json
	$(BIN)/python benchmarks/report_kernels.py collect .benchmarks/kernels.json
	$(BIN)/python benchmarks/bench_cpu.py --deepspeed --output benchmarks/results/native_cpu.json
	$(BIN)/python benchmarks/edit_cost.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/bank_quality.py --output benchmarks/results/bank_quality.json
	$(BIN)/python benchmarks/coverage.py --output benchmarks/results/coverage.json
	$(BIN)/python tools/models_table.py
	$(BIN)/python benchmarks/gallery.py
	$(BIN)/python benchmarks/edits.py
	$(BIN)/python benchmarks/attacks.py
	$(BIN)/python benchmarks/attacks.py --world gallery --models original,gold,uce
	$(BIN)/python benchmarks/metrics_miss.py
	$(BIN)/python benchmarks/leaderboard.py --minutes 1000
	$(BIN)/python benchmarks/leaderboard.py --world gallery --minutes 1000
	$(BIN)/python benchmarks/leaderboard_figure.py
	$(BIN)/python benchmarks/readme.py --bank-speed .benchmarks/bank.json --evaluation-speed .benchmarks/evaluation.json \
	  --second-model .benchmarks/second.json

readme:
	$(PYTHON) benchmarks/readme.py

weights: $(VENV)/.installed
	$(BIN)/python tools/train_shapes.py --output fastunlearn/worlds/shapes/weights

# Needs npm, whose packages the drawings are. What is done stays in .benchmarks/gallery, so a stopped run continues.
gallery-weights: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt resvg-py
	$(BIN)/python tools/train_gallery.py --work .benchmarks/gallery --output packaging/gallery/fastunlearn_gallery/weights

clean:
	rm -rf $(VENV) demo site build dist *.egg-info packaging/*/build packaging/*/dist packaging/*/*.egg-info
