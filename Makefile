# make demo: install into .venv and reconstruct eight photographs.  make test: lint and the tests that take seconds;
# make test-all: also those that start and kill many processes.  make app: a page in a browser, on this machine alone.
PYTHON ?= python3
VENV := .venv

APP := .venv-app

.PHONY: demo app test test-all

demo: $(VENV)/installed
	$(VENV)/bin/python test.py --testset_name Samples --cs_ratio 0.1
	@echo "Open result/Samples/10/chelsea_*.png: a cat's face, recovered from 10 % of its measurements"

app: $(APP)/installed
	$(APP)/bin/python app.py --open

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -m "not slow"

test-all: test $(APP)/installed
	$(VENV)/bin/python -m pytest -m slow

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(APP)/installed: $(VENV)/installed requirements-app.txt
	$(PYTHON) -m venv $(APP)
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(APP)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	$(APP)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	@touch $@
