# make demo   four agents learn real digits together on this machine
# make test   format, lint, types, import contracts, and the tests: below ten minutes
# make test-long  the tests marked `long`: real fleets that are killed, cut off, filled up
# make test-extras   tests of Keras, LoRA, Dask, Spark and a browser, each in an environment of its own
# make test-cluster  tests of ledger and versions outside of the home; make cluster-setup installs PostgreSQL and Mosquitto first
# make setup  only build .venv
# make wheel  dist/: the wheel to install on other machines, and install.sh with its locks
# make lock   deploy/locks: every package of an installation, pinned by hash
# make sbom   the same as a CycloneDX list in build/; make audit-packages asks for known weaknesses
# make attacks  every attack that was tried, on the code as it is: the tables in docs/attacks.md
# make attacks-others  attacks on the secure aggregation of Flower and OpenFL, and the same on ours
# make quality  how well it learns, beside the known behaviour: about a minute a row
# make figures  writes the figures of the docs from the results files
# make pictures  the pictures of both monitors, docs/monitor.svg and docs/owner-monitor.svg
# make bench  speed beside stock Flower and the limits of wire and memory; make bench-quick: 3 minutes
# make bench-gpu  local training beside a plain PyTorch loop, on this machine's graphics card
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-long test-extras test-cluster cluster-setup check setup wheel docs man month upgrade bench bench-quick \
	bench-gpu figures pictures quality faults faults-quick faults-cluster soak journeys attacks attacks-others \
	lock sbom audit-packages clean

demo: setup
	$(BIN)/commonweight demo

test: check
	$(BIN)/pytest -m 'not long'

test-long: setup
	$(BIN)/pytest -m long

# Tests of the extras, each in an environment of its own; EXTRAS="dask spark" for some of them.
EXTRAS ?=
test-extras: setup
	$(BIN)/python -m tests.extras $(EXTRAS)

# They are a part of test-extras. Without PostgreSQL or Mosquitto they are skipped, with the reason.
test-cluster: setup
	$(BIN)/python -m tests.extras cluster

# As root, on Debian. Only the programs are used: tests start servers of their own.
cluster-setup:
	apt-get update
	apt-get install -y --no-install-recommends postgresql mosquitto

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every fault on real processes and in the simulator, about half an hour; faults-quick: 5 minutes.
faults: setup
	$(BIN)/python -m benchmarks.faults

faults-quick: setup
	$(BIN)/python -m benchmarks.faults --quick

# The loss of the leader of two replicas at every step of a round, two hours; after cluster-setup
faults-cluster: setup
	$(BIN)/python -m benchmarks.faults.leaders

# make soak MINUTES=20: random faults on a real fleet
MINUTES ?= 20
soak: setup
	$(BIN)/python -m benchmarks.faults --soak $(MINUTES)

# Sequences of operations on real fleets. A seed such as 7.3 plays one sequence again.
# A sequence that has begun ends after the time is over.
SEED ?=
journeys: MINUTES = 30
journeys: setup
	$(BIN)/python -m tests.journeys --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# Runs each attack, quick and long, about ten minutes. After a new test: python -m tests.attacks --new
attacks: setup
	$(BIN)/python -m tests.attacks

# Installs them in environments of their own. ALL=1 tries every seed of Flower, minutes of one core
ALL ?=
attacks-others: setup
	$(BIN)/python -m tests.attacks_others $(if $(ALL),--full)

quality: setup
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.quality.models
	$(BIN)/python -m benchmarks.quality.models --held-out
	$(BIN)/python -m benchmarks.quality.models --trees

# The docs as a site in build/site, with a reference made from the code; no warning passes
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python deploy/run_options.py > docs/run-options.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

TOOLS := .venv-tools
$(TOOLS)/.ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check \
		'uv>=0.8' 'pip-audit>=2.9' 'cyclonedx-bom>=7'
	touch $@

# The packages of deploy/install.sh and of the container. torch is the release that the tests run with
LOCK := $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
	--generate-hashes --no-header --no-annotate --constraint deploy/locks/constraints.in
lock: $(TOOLS)/.ready
	$(LOCK) pyproject.toml -o deploy/locks/coordinator.txt
	$(LOCK) --constraint deploy/locks/coordinator.txt --extra cluster pyproject.toml \
		-o deploy/locks/cluster.txt
	$(LOCK) --extra tabular --extra analyze pyproject.toml -o deploy/locks/agent.txt
	$(LOCK) deploy/locks/build.in -o deploy/locks/build.txt

sbom: $(TOOLS)/.ready
	mkdir -p build
	for role in coordinator cluster agent; do $(TOOLS)/bin/cyclonedx-py requirements --output-reproducible \
		--pyproject pyproject.toml -o build/sbom-$$role.json deploy/locks/$$role.txt; done

audit-packages: $(TOOLS)/.ready
	for role in coordinator cluster agent build; do $(TOOLS)/bin/pip-audit --disable-pip --require-hashes \
		-r deploy/locks/$$role.txt || exit 1; done

# Needs no .venv: pip fetches the build backend. The folder dist/ is all that a machine needs
wheel:
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	mkdir -p dist/locks
	cp deploy/install.sh dist/
	cp deploy/locks/coordinator.txt deploy/locks/cluster.txt deploy/locks/agent.txt dist/locks/

man: setup
	$(BIN)/python deploy/manual.py build/man

# A month in an hour: ROUNDS=10000 of a tiny model, and how memory and open files grew with them
ROUNDS ?= 10000
month: setup
	$(BIN)/python -m benchmarks.faults.month --rounds $(ROUNDS) --out docs/faults/month-results.json

# Old agents with a new coordinator and the reverse, from wheels of three versions
upgrade: setup
	$(BIN)/pytest -n 0 tests/e2e/upgrade.py

bench: setup
	$(BIN)/python -m benchmarks.speed --full

bench-quick: setup
	$(BIN)/python -m benchmarks.speed

# On a machine with a graphics card; DEVICE=cuda:1 for another one. Writes nothing
DEVICE ?= auto
bench-gpu: setup
	$(BIN)/python -m benchmarks.speed.gpu --device $(DEVICE)

# The tables and numbers of the README and docs/, from docs/*/*.json; says what to write by hand
figures: setup
	$(BIN)/python -m benchmarks.figures

pictures: setup
	$(BIN)/python deploy/monitor_animation.py > docs/monitor.svg
	$(BIN)/python deploy/owner_picture.py > docs/owner-monitor.svg

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "commonweight needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-extras $(TOOLS) dist build
