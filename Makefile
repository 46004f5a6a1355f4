# Everything from a fresh clone: `make demo` runs the story on small models, `make test` checks the code, `make docs`
# builds the site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := $(VENV)-docs
OLDEST := $(VENV)-oldest
CHECKED := src tests benchmarks examples tools
DEMO := src/polymerge/demo/checkpoints
# tests that need neither torch nor transformers
CORE := $(addprefix tests/,test_durable.py test_errors.py test_paths.py $(addsuffix .py, \
    $(addprefix recipe/test_,depth mergekit_forms parameters parsing schedule stages yaml_values) \
    $(addprefix checkpoints/test_,added_tokens bounds json_objects patterns) \
    $(addprefix families/test_,registry resolve pairs) planning/test_plan \
    $(addprefix methods/test_,calibration dc_merge ip_merge isotropic leading lora tsv wudi) \
    $(addprefix cli/test_,flags progress varied) $(addprefix evaluation/test_,scorers scoring) tuning/test_criterion))

.PHONY: demo test lint types tests format bench docs oldest clean

demo: $(READY)
	$(BIN)/polymerge demo

test: lint types tests

lint: $(READY)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

format: $(READY)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

bench: $(READY)
	$(BIN)/python benchmarks/merge.py

# a link or a reference that leads nowhere ends it; what it needs is no part of the tests' environment
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet

# the tests of the core, with the oldest versions that pyproject.toml allows of what the core needs
oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(CORE)
	mkdir -p build
	$(OLDEST)/bin/polymerge merge --template $(DEMO)/vlm --with $(DEMO)/reason --base $(DEMO)/base --method ties \
	    --weight 0.9,0.1 --parts text --no-verify --force -o build/oldest

$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(OLDEST)/.ready: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable . pytest hypothesis
	touch $@

# torch first and by itself: whatever comes after it finds it there and asks for no other build
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) $(DOCS) $(OLDEST) build demo-output
