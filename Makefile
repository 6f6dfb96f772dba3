# Every target sets up what it needs in .venv. OUT holds what the demo makes.
OUT := out/demo
BIN := .venv/bin

.PHONY: demo serve test test-all test-gpu lint clean

demo:
	@.ci/venv gguf || .ci/venv
	$(BIN)/python -m benchmarks.demo $(OUT)

serve:
	@.ci/venv gguf || .ci/venv
	$(BIN)/python -m benchmarks.demo $(OUT) --serve

test:
	@.ci/venv test
	@.ci/chromium
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --max-worker-restart 0

test-all:
	@.ci/venv test
	@.ci/venv bench
	@.ci/chromium
	$(BIN)/pytest -m "slow or not slow"

# on a machine with an NVIDIA GPU and a python that has torch, triton and pytest: nothing is installed
test-gpu:
	failed=0; \
	$(or $(PYTHON),python3) -m pytest -c tests/gpu/pytest.ini tests/gpu || failed=1; \
	$(or $(PYTHON),python3) -m benchmarks.gpu || failed=1; \
	exit $$failed

lint:
	@.ci/venv test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy

clean:
	rm -rf out .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
