# Everything runs in .venv at the project's root. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin

BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

.PHONY: demo test check chromium bench train clean

demo: .venv/installed  ## real vLLM, hub and edge workers on this machine, answers side by side and a score table
	$(BIN)/costeer demo

test: check chromium  ## the whole suite: first what takes minutes, then the end-to-end tests on real vLLM
	$(BIN)/pytest --ignore=tests/e2e
	$(BIN)/pytest tests/e2e

check: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

chromium:  ## a browser, for the test of the device's page
	@for name in $(BROWSERS); do if command -v $$name >/dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq chromium; \
	else echo "make: the tests need a browser: install chromium or google-chrome (none of $(BROWSERS) is on the PATH)" >&2; exit 1; fi

bench: .venv/installed  ## the figures of docs/performance.md; 20 minutes
	$(BIN)/costeer bench

train: .venv/installed  ## train the demo pair anew
	$(BIN)/python -m costeer_vllm.demo.train

.venv/installed: pyproject.toml scripts/install_vllm.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python scripts/install_vllm.py
	$(BIN)/pip install --quiet --editable '.[dev,demo,eval]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
