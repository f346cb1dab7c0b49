# make demo: install into .venv and reconstruct eight photographs.  make test: lint and the tests that take seconds;
# make test-all: also those that start and kill many processes, and deepinv's; make app: a page in a browser.
PYTHON ?= python3
VENV := .venv

APP := .venv-app
DEEPINV := .venv-deepinv

.PHONY: demo app test test-all

demo: $(VENV)/installed
	$(VENV)/bin/python test.py --testset_name Samples --cs_ratio 0.1
	@echo "Open result/Samples/10/chelsea_*.png: a cat's face, recovered from 10 % of its measurements"

app: $(APP)/installed
	$(APP)/bin/python app.py --open

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -m "not slow"

test-all: test $(APP)/installed $(DEEPINV)/installed
	$(VENV)/bin/python -m pytest -m slow
	$(DEEPINV)/bin/python -m pytest tests/model/test_deepinv.py

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(DEEPINV)/installed: FLAGS := --no-deps
.venv-%/installed: $(VENV)/installed-dev requirements-%.txt
	$(PYTHON) -m venv .venv-$*
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(.venv-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(FLAGS) -r requirements-$*.txt
	@touch $@
