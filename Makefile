# make demo     shows the main job end to end, on a private containerd
# make test     does all set-up, builds, runs all tests
# make check    formatting and lints
# make fuzz     the decoders of images with libFuzzer, FUZZ_SECONDS each
# make bench    measures side by side with runc, tar and cp: a table, and target/bench/results.json
# make install  release builds of the shim and the command to $(DESTDIR)$(PREFIX)/bin

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := test
.PHONY: demo test check bench install setup setup-test build probe writers release fuzz

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

HOST = $$(rustc -vV | sed -n 's/^host: //p')
OTHERS = --package stillframe-integration --package stillframe-runtime
PROGRAMS = containerd-shim-stillframe-v1 stillframe

# The shim of a release has its libraries in it, where the machine has a static C library: shared ones take 1.3 MB more of
# memory a pod. It looks up neither names nor users, which glibc can't do statically. Its relocations are packed where glibc
# knows that (2.36): they are read at the start, and stay in memory.
STATIC = $$([ ! -e "$$(cc -print-file-name=libc.a)" ] || { echo "-C target-feature=+crt-static"; \
	printf '%s\n' 2.36 "$$(getconf GNU_LIBC_VERSION | cut -d ' ' -f 2)" | sort -CV && echo "-C link-arg=-Wl,-z,pack-relative-relocs"; })
SHIM = $(CARGO) rustc --release --package stillframe-shim --bin containerd-shim-stillframe-v1 -- $(STATIC)

setup:
	@scripts/setup

# Other versions of containerd besides.
setup-test:
	@scripts/setup test

# Linked statically, since they run in an image without libraries; for a named target, since the flag that does
# it must not reach build scripts and macros.
IN_IMAGE = --target "$(HOST)" -- -C target-feature=+crt-static -C strip=symbols

probe:
	$(CARGO) rustc --release --package stillframe-probe --bin stillframe-probe $(IN_IMAGE)

writers:
	$(CARGO) rustc --release --package stillframe-writers --bin stillframe-writers $(IN_IMAGE)

# With the tests: alone, the programs would have other features of what they share with them, and all of that be built twice.
build: probe writers
	$(CARGO) build --workspace --bins --tests

release: probe
	$(CARGO) build --bins $(OTHERS) --release
	$(SHIM)

# The output of all tests is shown, so that no SKIPPED line is lost; the last lines count them.
test: setup-test build
	@log="$$CARGO_TARGET_DIR/test.log"; status=0; \
	$(CARGO) test --workspace --no-fail-fast -- --show-output 2>&1 | tee "$$log" || status=$$?; \
	echo; awk '/^test result:/ {passed += $$4; failed += $$6; ignored += $$8} /^SKIPPED: / {print; skipped++} \
		END {printf "make test: %d passed, %d failed, %d skipped, %d ignored\n", \
			passed - skipped, failed, skipped, ignored}' "$$log"; \
	exit $$status

demo: setup release
	@echo; exec "$$CARGO_TARGET_DIR/release/stillframe-demo"

# Minutes, and worth something only on a machine that does nothing else. BENCH="save start" measures a part.
bench: probe
	@scripts/setup bench
	$(CARGO) build --release --bins $(OTHERS) --package stillframe-bench
	$(SHIM)
	$(CARGO) bench --package stillframe-pgalloc --package stillframe-tmpfs --bench digest --bench tree -- --quick
	@"$$CARGO_TARGET_DIR/release/stillframe-bench" $(BENCH)

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# The same targets run over mutations of their corpus in `make test` (runtime/tests/fuzz.rs). A stable toolchain needs
# RUSTC_BOOTSTRAP for the sanitizer; what is found lies in fuzz/artifacts, new inputs in the target directory.
FUZZ_SECONDS ?= 180
fuzz:
	@command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz
	@export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR="$$CARGO_TARGET_DIR/fuzz"; \
	for target in tree meta manifest pax acl; do \
		found="$$CARGO_TARGET_DIR/corpus/$$target"; mkdir -p "$$found"; \
		$(CARGO) fuzz run "$$target" "$$found" "fuzz/corpus/$$target" -- -max_total_time=$(FUZZ_SECONDS) -max_len=65536; \
	done

install:
	$(CARGO) build --release --bin stillframe
	$(SHIM)
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 0755 $(foreach program,$(PROGRAMS),"$$CARGO_TARGET_DIR/release/$(program)") "$(DESTDIR)$(PREFIX)/bin"
