# Two commands do everything on a machine that has Python 3.11 or 3.12 and pip:
#   make run    set up, then the whole loop: measure real models, pre-train five small twins, judge and compare them, report
#   make test   set up, check style and types, run all tests
# and two more for docs/results:
#   make results   edits and contributions of the real models (about an hour on two cores)
#   make judge     five variants with three seeds each, trained, judged and compared (about an hour)
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
TORCH = torch==2.13.0
BIN = .venv/bin
MODELS = minilm smollm2
TOKENS = 12000
OUT = out
TWINS = vanilla wider cea avg_k jreg
TWIN_TOKENS = 32768
TEXTS = python_docs python_source

.PHONY: run measured twins test results judge setup check fix bench clean

run: setup $(MODELS:%=material/%/config.json) $(TEXTS:%=material/%.jsonl.gz)
	@rm -rf $(addprefix $(OUT)/,$(MODELS) corpus twins judged compared)
	@$(MAKE) --no-print-directory measured twins
	@$(BIN)/transect report $(OUT)/compared $(TWINS:%=$(OUT)/twins/%) $(OUT)/judged $(MODELS:%=$(OUT)/%) -o $(OUT)/report.html
	@echo "== open $(OUT)/report.html in a browser. In it: the five twins compared at equal loss, what they do on two tasks,"
	@echo "   how they trained, and what the layers of the real encoder and decoder do."
	@echo "   One seed each is a demonstration and no verdict; make judge trains three."

measured:
	@echo "== measure a real encoder and a real decoder on the built-in text, $(TOKENS) tokens each"
	@$(BIN)/transect measure material/minilm --limit-tokens $(TOKENS) --output $(OUT)/minilm \
		--set contribution.lens_tokens=1024
	@$(BIN)/transect measure material/smollm2 --limit-tokens $(TOKENS) --output $(OUT)/smollm2 \
		--set "nonlinearity.elements=[ffn,attn,layer]" --set "nonlinearity.cosine=[]" \
		--set "contribution.estimators=[lens_loss]" --set contribution.lens_tokens=256

twins:
	@echo "== pre-train five twins on $(TWIN_TOKENS) tokens of the built-in text each, with probes on the way"
	@$(BIN)/transect data prepare builtin $(foreach name,$(TEXTS),ood/$(name)=material/$(name).jsonl.gz) \
		--vocab-size 2048 --valid-fraction 0.1 -o $(OUT)/corpus
	@for twin in $(TWINS); do \
		$(BIN)/transect train demo-$$twin --data $(OUT)/corpus -o $(OUT)/twins/$$twin --set train.tokens=$(TWIN_TOKENS) \
			$$(case $$twin in (wider|cea) echo --set model.ffn.multiple=16;; esac) \
			--set train.batch_size=8 --set train.schedule.kind=constant --set train.evaluation.every=8 \
			--set train.evaluation.tokens=2048 --set "train.probes=[{probe: jump, every: 16, tokens: 2048}]" || exit 1; done
	@echo "== judge and compare them"
	@$(BIN)/transect evaluate $(TWINS:%=$(OUT)/twins/%) --task minimal_pairs:word_order --set minimal_pairs.limit=100 \
		--task linear_probe:era --set linear_probe.limit_training=300 --set linear_probe.limit_test=150 -o $(OUT)/judged
	@$(BIN)/transect compare $(TWINS:%=$(OUT)/twins/%) --by loss,steps -o $(OUT)/compared

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

SEEDS = 0 1 2
DOMAINS = brown moby_dick licences python_docs
judge: setup $(patsubst %,material/%.jsonl.gz,speeches $(DOMAINS))
	@test -d data/judging || $(BIN)/transect data prepare train+valid/speeches=material/speeches.jsonl.gz \
		$(foreach name,$(DOMAINS),ood/$(name)=material/$(name).jsonl.gz) --vocab-size 2048 --valid-fraction 0.1 -o data/judging
	@for seed in $(SEEDS); do for twin in $(TWINS); do run=runs/judging/$$twin-$$seed; \
		test -f $$run/rows.parquet || $(BIN)/transect train demo-$$twin --data data/judging -o $$run \
			$$(test -f $$run/config.json && echo --resume) $(JUDGED) --set train.seed=$$seed || exit 1; done; done
	@$(BIN)/transect evaluate $(foreach seed,$(SEEDS),$(TWINS:%=runs/judging/%-$(seed))) \
		--revision step-00000060 --revision step-00000080 --revision step-00000100 \
		--task minimal_pairs:word_order --set minimal_pairs.limit=200
	@rm -rf $(OUT)/judging && $(BIN)/transect compare $(foreach seed,$(SEEDS),$(TWINS:%=runs/judging/%-$(seed))) \
		--baseline demo-vanilla --by loss,steps,flops,seconds -o $(OUT)/judging
	@$(BIN)/transect report $(OUT)/judging -o $(OUT)/judging.html
JUDGED = --set model.width=64 --set model.layers=3 --set train.tokens=204800 --set train.schedule.kind=constant \
	--set train.evaluation.every=10 --set train.evaluation.tokens=2048 --set train.checkpoints.every=20 \
	--set train.checkpoints.keep_last=9 --set "train.probes=[{probe: jump, every: 50, tokens: 4096}]"

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

material/%.jsonl.gz: | .venv/ready
	@echo "== fetch the text $* (once)"
	@$(BIN)/transect fetch $* -o material

clean:
	rm -rf .venv $(OUT) material .pytest_cache .ruff_cache
