# make demo: install into .venv and reconstruct eight photographs.  make test: lint and all tests.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test

demo: $(VENV)/installed
	$(VENV)/bin/python test.py --testset_name Samples --cs_ratio 0.1
	@echo "The reconstructions are in result/Samples/10"

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
