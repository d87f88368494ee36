# Two commands do everything on a machine that has Python 3.11 or 3.12 and pip:
#   make run    set up, measure a real encoder and a real decoder, write the report
#   make test   set up, check style and types, run all tests
# and one more for docs/results (about an hour on two cores):
#   make results
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
TORCH = torch==2.13.0
BIN = .venv/bin
MODELS = minilm smollm2
TOKENS = 20000
OUT = out

.PHONY: run test results setup check fix bench clean

run: setup $(MODELS:%=material/%/config.json)
	@echo "== measure a real encoder and a real decoder on the built-in text, $(TOKENS) tokens each"
	@rm -rf $(OUT)
	@for model in $(MODELS); do \
		$(BIN)/transect measure material/$$model --limit-tokens $(TOKENS) --set contribution.lens_tokens=1024 \
			--output $(OUT)/$$model || exit 1; done
	@$(BIN)/transect report $(MODELS:%=$(OUT)/%) -o $(OUT)/report.html
	@echo "== open $(OUT)/report.html in a browser"

EDITS = --probe commutativity --probe ablation
results: setup $(MODELS:%=material/%/config.json)
	$(BIN)/transect measure material/minilm --probe contribution $(EDITS) --limit-tokens 210000 \
		--set commutativity.sample=4096 --set ablation.sample=4096 --output $(OUT)/results/minilm
	$(BIN)/transect measure material/smollm2 --probe contribution --set contribution.mi_clusters=2000 \
		--limit-tokens 210000 --output $(OUT)/results/smollm2
	$(BIN)/transect measure material/smollm2 $(EDITS) --limit-tokens 210000 \
		--set "commutativity.kinds=[pairs,shuffle,repeat]" --set commutativity.shuffles=4 \
		--set commutativity.sample=512 --set ablation.sample=512 --output $(OUT)/results/smollm2_edits
	$(BIN)/transect report $(OUT)/results/minilm $(OUT)/results/smollm2 $(OUT)/results/smollm2_edits -o $(OUT)/results/report.html

test: setup check
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

check: setup
	@echo "== style and types"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

fix: setup
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: setup
	@$(BIN)/python -m benchmarks.measuring
	@$(BIN)/python -m benchmarks.contribution
	@$(BIN)/python -m benchmarks.commutativity
	@$(BIN)/python -m benchmarks.sparse_ffn
	@$(BIN)/python -m benchmarks.caa
	@$(BIN)/python -m benchmarks.jump_penalty
	@$(BIN)/python -m benchmarks.anchor
	@$(BIN)/python -m benchmarks.pretraining

setup: .venv/ready

# torch comes first and pinned, so that no other package asks pip for another build of it.
.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "transect needs Python 3.11 or 3.12; found neither"; exit 2; }
	@echo "== set up .venv with $(PYTHON): $(TORCH), transect and its tools (minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

material/%/config.json: | .venv/ready
	@echo "== fetch the model $* (once)"
	@$(BIN)/transect fetch $* -o material

clean:
	rm -rf .venv $(OUT) material .pytest_cache .ruff_cache
