# tandem's build. `make help` lists the targets.
#
# One binary (build/tandem) and one library. Everything under src/ but src/cli/ is the library; tests link its objects
# directly. Files under src/ops/cpu/<isa>/ are compiled with that instruction set's flags and no others are.

BUILD ?= build
CC ?= gcc
PREFIX ?= /usr/local
PKGS = jansson libpcre2-8 libutf8proc

CSTD = -std=c17
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes -Werror
OPT ?= -O3 -g
# No contraction and no fast-math: the order and rounding of every sum is part of the contract (DESIGN.md section 3).
FP = -ffp-contract=off -fno-math-errno
CPPFLAGS += -D_GNU_SOURCE -Iinclude -Isrc $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
CFLAGS += $(CSTD) $(WARN) $(OPT) $(FP) -fPIC -fvisibility=hidden -pthread $(SAN)
LDLIBS += $(shell pkg-config --libs $(PKGS) 2>/dev/null) -lm -pthread
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
FUZZ_SECONDS ?= 60
FUZZ_SAN = address,undefined -fno-sanitize-recover=all
FUZZ_BIN = $(patsubst %.c,$(BUILD)/%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
# The layers that read hostile bytes; the ops use compiler features that Debian 12's clang lacks.
FUZZ_OBJ = $(filter $(addprefix $(BUILD)/src/,base/% format/% text/% model/config.o),$(LIB_OBJ))
$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(FUZZ_OBJ)
	$(CC) -fsanitize=fuzzer,$(FUZZ_SAN) -o $@ $^ $(LDLIBS)

.PHONY: fuzz fuzz-run
fuzz:
	$(MAKE) BUILD=build/fuzz CC=clang OPT="-O1 -g" SAN="-fsanitize=fuzzer-no-link,$(FUZZ_SAN)" fuzz-run
fuzz-run: $(FUZZ_BIN)
	@for f in $(FUZZ_BIN); do echo "== $$f"; mkdir -p $$f.corpus && \
	    $$f -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1 $$f.corpus || exit 1; done

.PHONY: clean
clean:
	rm -rf $(BUILD)

-include $(LIB_OBJ:.o=.d) $(CLI_OBJ:.o=.d) $(TEST_SRC:%.c=$(BUILD)/%.d)
.SECONDARY:

# The genuine Qwen3 tokenizer, unpacked for the tests.
build/data/qwen3-tokenizer/tokenizer.json: tests/data/qwen3-tokenizer/tokenizer.json.xz
	@mkdir -p $(@D)
	cp tests/data/qwen3-tokenizer/tokenizer_config.json $(@D)/
	xz -dc $< > $@.part && mv $@.part $@
