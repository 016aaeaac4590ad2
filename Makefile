# Everything on a fresh machine: `make demo`, or `make test`. Both set up a virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ROOMS := analysis checkpoints configuration conversion imports modeling_emo quantization subsets tokenization training
CODE := api $(ROOMS) benchmarks docs examples plugins tests setup.py
# What is compiled at installation: it is installed again when they change.
KERNELS := setup.py modeling_emo/kernels/instruction_sets.py $(wildcard modeling_emo/kernels/native/*.cpp modeling_emo/kernels/native/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo report test test-demo test-report torture test-oldest test-slow test-tools docs test-docs test-engines lint typecheck editor-imports bench emo-tiny clean test-python test-processors test-arm test-gpu test-middle test-newest

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# The package is installed as a tree of links to its files, under build/: editors and type checkers follow them. Files that
# are added or removed have to be linked anew, which takes seconds: what is compiled stays. The list is written only if it changed.
LINKED := build/__editable__.transformers_emo-*/transformers_emo/__init__.py
$(VENV)/.files: FORCE
	@mkdir -p $(VENV)
	@ls $(LINKED) > /dev/null 2>&1 || rm -f $@
	@find api $(ROOMS) -type f ! -name '*.pyc' ! -name '*.so' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:

# The stamps are made last, so that an interrupted installation is begun again.
NEEDED := pyproject.toml constraints.txt $(KERNELS) $(VENV)/.files
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=strict
only_files = $(if $(filter-out %/.files,$?),,yes)
$(VENV)/.installed: $(NEEDED)
	$(if $(only_files),,$(PYTHON) -m venv $(VENV))
	$(INSTALL) $(if $(only_files),--no-deps --editable .,--editable '.[analysis]')
	touch $@

$(VENV)/.installed-dev: $(NEEDED) | $(VENV)/.installed
	$(if $(only_files),,$(INSTALL) --editable '.[dev]')
	touch $@

demo: $(VENV)/.installed  ## choose experts for a domain, load only those, generate, compare
	$(BIN)/python examples/demo.py

# A file of tests stays on one processor: what its tests share is made once. `tests/conftest.py` orders the files.
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
ORDINARY := not slow and not tools and not engines and not gpu and not docs and not report
test: $(VENV)/.installed-dev  ## all tests but the slow ones
	$(BIN)/python -m pytest -m '$(ORDINARY)' $(PARALLEL)

# Minutes, on a machine with a GPU: VENV=<environment> with a PyTorch that uses it, if the one made here has none.
# EMO_TEST_DEVICE=cpu runs all of it once without.
test-gpu: $(VENV)/.installed-dev  ## the tests that want a GPU, then ratios of time on it
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python benchmarks/gpu.py --quick

# `make test` runs the newest Transformers that is supported: constraints.txt pins it. The targets below put another
# beside the environment's own, and with the oldest its oldest huggingface_hub (Transformers 5.17 takes no newer one).
# What takes long and asks nothing of Transformers that other tests do not is left out.
OLDEST := 5.17.0
OLDEST_HUB := huggingface_hub==1.31.0 httpx==0.28.1 httpcore==1.0.9
NOT_OLDEST := analysis benchmarks conversion docs examples test_examples.py test_hub_server.py test_hub_subsets.py \
  training/test_distributed.py transformers_suite/test_emo_distributed.py modeling_emo/kernels/test_native_library.py \
  modeling_emo/kernels/test_expert_kernels.py
MIDDLE := 5.18.0 5.19.0 5.20.2 5.21.1 5.22.0 5.23.0
OF_MIDDLE := modeling_emo/test_caches.py imports/test_transformers_versions.py modeling_emo/test_modeling_emo.py \
  modeling_emo/pools/test_prompt_pool.py subsets/loading/test_from_pretrained.py subsets/loading/test_swapping.py
# $(call beside,FOLDER,PACKAGES): install packages into a folder under build/, once.
beside = test -d build/$(1) || ( $(BIN)/python -m pip install --quiet --no-deps --target build/$(1).partial $(2) && \
  mv build/$(1).partial build/$(1) )
test-oldest: $(VENV)/.installed-dev  ## the tests with the oldest Transformers supported
	$(call beside,transformers-$(OLDEST),transformers==$(OLDEST) $(OLDEST_HUB))
	PYTHONPATH="$(CURDIR)/build/transformers-$(OLDEST)" $(BIN)/python -m pytest -m '$(ORDINARY)' $(PARALLEL) $(NOT_OLDEST:%=--ignore=tests/%)

# Another Python or PyTorch: a wheel is built and installed into an environment of its own under build/, and the tests
# that touch most of both run on it. What else is installed is as in constraints.txt. torch.compile needs that Python's
# headers (Debian: libpython3.14-dev).
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
OTHER = build/python$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-torch$(TORCH)
SMOKE := api/test_cli.py api/test_import_hook.py imports/test_lazy_imports.py configuration conversion/olmo_core/test_pickled_metadata.py \
  conversion/test_to_olmo_core.py modeling_emo/kernels/test_expert_kernels.py modeling_emo/test_goldens.py \
  modeling_emo/kernels/test_layer_kernels.py modeling_emo/test_modeling_emo.py modeling_emo/kernels/test_private_torch.py \
  modeling_emo/pools/test_prompt_pool.py modeling_emo/kernels/packed/test_packed_tensor.py subsets/loading/test_from_pretrained.py \
  training/test_fine_tuning.py training/test_trainer.py test_docstrings.py
test-python:  ## a selection of tests on another Python or PyTorch: PYTHON=python3.14 TORCH=2.15.0
	$(PYTHON) -m venv $(OTHER)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(OTHER)/constraints.txt
	rm -rf $(OTHER)/wheel build/lib build/bdist.* && $(OTHER)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(OTHER)/wheel .
	wheel=$$(echo $(OTHER)/wheel/*.whl) && \
	  $(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt "$$wheel[dev]" && \
	  $(OTHER)/bin/python -m pip install --quiet --no-deps --force-reinstall "$$wheel"
	$(OTHER)/bin/python -m pytest $(PARALLEL) $(SMOKE:%=tests/%)

test-processors: $(VENV)/.installed-dev  ## kernels and network for each instruction set that this machine runs
	$(BIN)/python tests/processors.py $(PARALLEL)

# By the rules of setup.py, as in any cross build; run by an emulator.
ARM := aarch64-linux-gnu
ARM_BUILD := build/$(ARM)
test-arm: $(VENV)/.installed-dev  ## kernels compiled for ARM (aarch64), emulated
	@for tool in $(ARM)-g++ qemu-aarch64; do command -v $$tool > /dev/null || { \
	  echo "$$tool is missing. Debian: apt install g++-$(ARM) qemu-user"; exit 1; }; done
	rm -rf $(ARM_BUILD)
	CXX=$(ARM)-g++ _PYTHON_HOST_PLATFORM=linux-aarch64 EMO_BUILD_KERNELS=all $(BIN)/python setup.py --quiet \
	  build_ext --build-lib $(ARM_BUILD) --build-temp $(ARM_BUILD)/objects
	$(ARM)-g++ -O2 -std=c++17 -fopenmp tests/modeling_emo/kernels/native_driver.cpp -o $(ARM_BUILD)/driver -ldl
	qemu-aarch64 -L /usr/$(ARM) $(ARM_BUILD)/driver \
	  $(ARM_BUILD)/transformers_emo/modeling_emo/kernels/native/emo_kernels_portable.so

test-middle: $(VENV)/.installed-dev  ## network, loading and generation with each Transformers between the oldest and the newest
	set -e; for version in $(MIDDLE); do \
	  $(call beside,transformers-$$version,transformers==$$version); \
	  PYTHONPATH="$(CURDIR)/build/transformers-$$version" $(BIN)/python -m pytest -m '$(ORDINARY)' $(PARALLEL) $(OF_MIDDLE:%=tests/%); \
	done

# It says early what the next release breaks. Not part of CI: what it runs is not ours to choose.
test-newest: $(VENV)/.installed-dev  ## the tests with the newest Transformers on PyPI, tested before or not
	rm -rf build/transformers-newest && $(call beside,transformers-newest,transformers)
	EMO_ANY_TRANSFORMERS=1 PYTHONPATH="$(CURDIR)/build/transformers-newest" $(BIN)/python -m pytest -m '$(ORDINARY)' $(PARALLEL) $(NOT_OLDEST:%=--ignore=tests/%)

test-slow: $(VENV)/.installed-dev  ## the slow tests
	$(BIN)/python -m pytest -m 'slow and not gpu'

# Hours: each fault 50 times. TORTURE="--quick" takes minutes, TORTURE="--only kills --jobs extract" a part;
# `--write docs/security.md` puts the table there. Disks that fill need the right to mount (root).
torture: $(VENV)/.installed-dev  ## kills, full disks, power cuts, lying Hubs, over and over; not a part of the tests
	PYTHONPATH=tests $(BIN)/python -m torture $(TORTURE)

$(VENV)/.installed-docs: $(VENV)/.installed-dev constraints-docs.txt
	$(INSTALL) --constraint constraints-docs.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs  ## the manual, into build/site; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test-docs: $(VENV)/.installed-docs docs  ## the manual, and its notebooks run from top to bottom
	$(BIN)/python -m pytest -m docs tests/docs

# The tools of others that `emo run` starts have an environment of their own.
TOOLS := .venv-tools
$(TOOLS)/.installed: pyproject.toml constraints.txt constraints-tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-tools.txt \
	  --editable '.[train]' pytest compressed-tensors 'lm_eval[hf]' trl 'transformers[serving]'
	touch $@

test-tools: $(TOOLS)/.installed  ## lm_eval, `transformers serve` and `chat`, TRL, torchrun through `emo run`
	$(TOOLS)/bin/python -m pytest -m tools tests/tools
	$(TOOLS)/bin/python -m pytest tests/training/test_trl.py tests/api/test_autoload.py

# Each engine has an environment of its own under build/engines; tests/engines/environments.py says of what.
# ENGINES="vllm" runs a part.
ENGINES := transformers mlx llama_cpp vllm
test-engines: $(VENV)/.installed-dev  ## the engines that people serve with, real ones, on small models
	set -e; for engine in $(ENGINES); do \
	  $(PYTHON) tests/engines/environments.py $$engine; \
	  python=build/engines/$$engine/bin/python; \
	  $$python -c 'import transformers_emo' 2> /dev/null || python=$(BIN)/python; \
	  $$python -m pytest -m engines tests/engines/test_$$engine*.py; \
	done

lint: $(VENV)/.installed-dev typecheck editor-imports  ## style, types, imports that editors find, which room may import which
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports --no-cache

typecheck: $(VENV)/.installed-dev
	$(BIN)/mypy --package transformers_emo
	$(BIN)/mypy plugins/vllm/transformers_emo_vllm

editor-imports: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# BENCH="experts loading --quick" measures a selection; `python benchmarks/run.py --help` says what else.
bench: $(VENV)/.installed-dev  ## measure what the README claims, into benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py $(BENCH)

# Hours on two cores. Interrupted, it goes on where it was; the corpus needs Debian's package lists and PyPI.
TINY := examples/emo_tiny
STANDARD := --set model.config.document_pool_min=63
CARDS := emo-tiny=model_cards/emo-tiny std-tiny=model_cards/std-tiny
MEASURE := --baseline std-tiny --texts corpus --test 16 --dtype float32 --out out/results/retention
emo-tiny: $(VENV)/.installed-dev  ## train emo-tiny and std-tiny anew, measure them, write their cards
	test -e corpus/manifest.json || $(BIN)/python $(TINY)/corpus.py build corpus
	test -e corpus/tokenizer-4096 || $(BIN)/python $(TINY)/corpus.py tokenizer corpus --vocab-size 4096
	$(BIN)/emo train $(TINY)/emo-tiny.yaml --resume
	$(BIN)/emo train $(TINY)/emo-tiny.yaml --resume --set output_dir=out/std-tiny $(STANDARD)
# The standard model's last steps once more, with pools: what annealing gives.
	test -d out/std-annealed || ( mkdir -p out/std-annealed.partial && \
	  cp -r out/std-tiny/checkpoint-2500 out/std-annealed.partial/ && mv out/std-annealed.partial out/std-annealed )
	$(BIN)/emo train $(TINY)/emo-tiny.yaml --resume --set output_dir=out/std-annealed
	$(BIN)/python $(TINY)/publish.py weights
	$(BIN)/emo retention $(CARDS) $(MEASURE) --seeds 3
	$(BIN)/emo retention $(CARDS) std-annealed=out/std-annealed $(MEASURE) --methods layerwise --seeds 3
	$(BIN)/python $(TINY)/prompts.py model_cards/emo-tiny --out out/results/prompts
	$(BIN)/python $(TINY)/fine_tuned.py $(CARDS) --out out/results/fine-tuned
	$(BIN)/python $(TINY)/ablations.py out/results/ablations
	$(BIN)/python $(TINY)/publish.py cards
	$(MAKE) report

# Some minutes on two cores. The page lies in build/, its pictures with emo-tiny.
REPORT := build/report
PAIR := model_cards/emo-tiny model_cards/std-tiny
report: $(VENV)/.installed-dev  ## what the experts of emo-tiny and std-tiny learned, as a page: build/report/index.html
	$(BIN)/emo report $(PAIR) --texts model_cards/emo-tiny/documents --dtype float32 \
	  --languages english=en scripture=en german=de --retention model_cards/emo-tiny/results/retention \
	  --title "What the experts of emo-tiny and std-tiny learned" --work $(REPORT)/data \
	  --pictures model_cards/emo-tiny/results/report --out $(REPORT)/index.html
	mkdir -p model_cards/std-tiny/results/report
	cp model_cards/emo-tiny/results/report/*.png model_cards/std-tiny/results/report/
	$(BIN)/python $(TINY)/publish.py text

# In a real Chromium (Debian: `apt install chromium`). Where there is none, the tests say so and are skipped.
test-report: $(VENV)/.installed-dev  ## the page of `emo report` in a headless browser
	$(BIN)/python -m pip install --quiet --constraint constraints.txt playwright
	$(BIN)/python -m pytest -m report tests/analysis/page

# Gradio is not among what `make test` installs: it brings a web server.
test-demo: $(VENV)/.installed-dev  ## the page of `emo demo` in a headless browser, and the app of a Space
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint constraints-demo.txt gradio playwright
	$(BIN)/python -m pytest -m report tests/analysis/trying

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(TOOLS) build dist *.egg-info modeling_emo/kernels/native/*.so \
	  .pytest_cache .ruff_cache .mypy_cache .hypothesis
