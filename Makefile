# Every target is what a reader could type. `make` alone lists them.
#
#   make demo                                   the whole paper in miniature, on the embedded toy
#   make ppo DATA=samsum FLAGS="--log-every 50"  of the paper's model, fetched from the Hub
#   make ppo DATA=samsum FLAGS=--resume          continues a run that was stopped
#
# A stage is built when its result does not exist; remove its folder to build it again. File times do not matter (the
# prerequisites after | are order-only): a run that was copied or unpacked is not rebuilt. FLAGS go to the stages named on
# the command line, not to those that are built on the way.

DATA  ?= toy
OUT   ?= runs/$(basename $(notdir $(DATA:%/=%)))
MODEL ?= $(if $(filter toy,$(DATA)),$(OUT)/base)
FLAGS ?=
PYTHON ?= python3

PY  = .venv/bin/python
RUN = $(PY) lastmile.py
HOW = --data $(DATA) --output-dir $(OUT) $(if $(MODEL),--model $(MODEL)) $(call flags,$(1))
flags = $(if $(filter $(1),$(MAKECMDGOALS)),$(FLAGS))

# Only the toy's base is made here; for other data the base is a model you name.
BASE = $(if $(filter toy,$(DATA)),$(OUT)/base/model.safetensors)

help:     ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 12

demo:     ## pretrain, quantize, reward, mle, ppo, eval, tables, report on the toy: 7 minutes on 2 cores
	@$(MAKE) --no-print-directory reward DATA=toy FLAGS=
	@# ppo and mle gain next to nothing from a second thread: they run side by side, each with a progress bar of its own
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 ppo mle DATA=toy FLAGS= MLE_BAR=1
	@$(MAKE) --no-print-directory report DATA=toy

test:     ## the test suite, on the CPU: 5 minutes on 2 cores
test: .venv/dev
	$(PY) -m pytest -n 2 --dist loadfile

lint:     ## ruff
lint: .venv/dev
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

sass:     ## instructions a weight of the 4-bit kernels compiled for a Hopper, against their goals; needs no GPU
sass: .venv/dev
	$(PY) tests/bench/sass.py

# A real chat model on real data. MODEL: a folder in place of the Hub's. What is there stays, what was stopped goes on.
CONFIG ?= configs/smollm2-samsum.toml
REAL   ?= runs/smollm2-samsum
CHAT    = $(if $(filter file default undefined,$(origin MODEL)),HuggingFaceTB/SmolLM2-135M-Instruct,$(MODEL))

real:     ## SmolLM2-135M-Instruct on SAMSum: quantize, reward, mle, ppo, eval, tables, report; 70 minutes of one core
real: .venv/run
	@for stage in quantize reward mle ppo $(if $(findstring --dry-run,$(FLAGS)),,eval tables report); do \
	  folder=$$stage; flags="$(FLAGS)"; \
	  case $$stage in quantize) folder=base;; tables|report) folder=-; flags=;; reward|mle|ppo) flags="--resume $$flags";; esac; \
	  test ! -d $(REAL)/$$folder || continue; \
	  test -d $(REAL)/base || flags="--model $(CHAT) $$flags"; \
	  echo "$(RUN) $$stage --config $(CONFIG) $$flags"; \
	  $(RUN) $$stage --config $(CONFIG) $$flags || exit; \
	done

# ----------------------------------------------------------------------------------------------------------------------
# The stages. Each depends on the files of those before it.

base:     ## a tiny 4-bit Llama, pretrained and quantized from scratch
base: $(OUT)/base/model.safetensors

reward:   ## the reward model
reward: $(OUT)/reward/config.json

mle:      ## the maximum-likelihood control
mle: $(OUT)/mle/config.json

ppo:      ## policy and value; builds base and reward first
ppo: $(OUT)/ppo/config.json

eval:     ## predictions and scores of base, mle and policy; builds what is missing
eval: $(OUT)/eval/scores.json

tables:   ## the paper's two tables, ours beside the paper's
tables: $(OUT)/eval/scores.json
	@$(RUN) tables --data $(DATA) --output-dir $(OUT)

report:   ## one HTML page of the run: curves, tables, lengths, outputs token by token
report: tables
	@$(RUN) report $(call HOW,report)

picture:  ## docs/report.png, the picture in the README, of runs/toy/report.html; needs Chromium
picture: .venv/dev
	$(PY) docs/picture.py

$(OUT)/pretrain/model.safetensors: | .venv/run
	$(RUN) pretrain --data $(DATA) --output-dir $(OUT) $(call flags,base)

$(OUT)/base/model.safetensors: | $(OUT)/pretrain/model.safetensors .venv/run
	$(RUN) quantize --data $(DATA) --output-dir $(OUT)

$(OUT)/reward/config.json: | $(BASE) .venv/run
	$(RUN) reward $(call HOW,reward)

MLE_BAR ?= 0
$(OUT)/mle/config.json: export TQDM_POSITION = $(MLE_BAR)
$(OUT)/mle/config.json: | $(BASE) .venv/run
	$(RUN) mle $(call HOW,mle)

$(OUT)/ppo/config.json: | $(BASE) $(OUT)/reward/config.json .venv/run
	$(RUN) ppo $(call HOW,ppo)

$(OUT)/eval/scores.json: | $(OUT)/mle/config.json $(OUT)/ppo/config.json .venv/run
	$(RUN) eval $(call HOW,eval)

# ----------------------------------------------------------------------------------------------------------------------
# The course: docs/walkthrough.md and docs/exercises

walkthrough:  ## one batch through all four stages, every number shown; FLAGS=--write puts them into docs/walkthrough.md
walkthrough: .venv/run
	@$(PY) docs/walkthrough.py $(FLAGS)

exercise:  ## checks your answer to an exercise: make exercise N=2
exercise: .venv/run
	@$(PY) docs/exercises/check.py "$(N)" $(FILE)

# ----------------------------------------------------------------------------------------------------------------------
# Longer checks than the test suite's

fuzz:     ## 5,000 damaged inputs: each must end well, or in one line and exit code 2
fuzz: .venv/dev
	$(PY) tests/fuzz.py --count 5000 $(FLAGS)

faults:   ## kills, full disks, torn files: the table of faults F1 to F20
faults: .venv/dev
	$(PY) tests/faults.py $(FLAGS)

# ----------------------------------------------------------------------------------------------------------------------
# Measurements: tests/bench/results/*.md and .json. Run nothing else on the machine meanwhile

bench:    ## beside transformers, PEFT and TRL on one CPU thread; growth: 40 minutes, 3 GB of packages
bench: .venv-bench/ready
	.venv-bench/bin/python tests/bench/cpu.py $(FLAGS)
	.venv-bench/bin/python tests/bench/cpu.py --threads 2 --sizes 15M --runs 1 --name cpu-two-threads
	.venv-bench/bin/python tests/bench/growth.py

beyond:   ## each capability beyond the paper on the toy, one at a time: docs/beyond.md; 35 minutes
beyond: | runs/toy/base/model.safetensors
	$(PY) tests/bench/beyond.py

gpu:      ## all that only a GPU can show: marked tests, 20 steps of each stage beside the CPU's, bench-gpu: 9 minutes
gpu: .venv/dev
	$(PY) tests/bench/gpu_check.py $(FLAGS)

bench-gpu:  ## kernels, sampling and PPO at Llama-2-7B's shapes on a GPU, weights random: under 9 minutes
bench-gpu: .venv/run
	$(PY) tests/bench/gpu.py $(FLAGS)

# ----------------------------------------------------------------------------------------------------------------------
# Set-up and housekeeping

setup:    ## the virtual environment with everything that training and testing need
setup: .venv/dev

.venv/run: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check setuptools .
	touch $@

.venv/dev: .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check '.[dev]'
	touch $@

.venv-bench/ready: pyproject.toml
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check setuptools '.[bench]'
	touch $@

loc:      ## lines of the ground floor, and of each wing
	@wc -l lastmile.py data.py model.py lora.py quant.py ppo.py eval.py
	@for wing in formats safety interface beyond speed report toy; do echo "$$(cat $$wing/*.* | wc -l) $$wing/"; done

clean:    ## remove the virtual environment and caches; runs stay
	rm -rf .venv .venv-bench build *.egg-info .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: help demo test lint base reward mle ppo eval tables report picture walkthrough exercise beyond fuzz faults bench \
        gpu bench-gpu sass setup loc clean
