// octets.c: see octets.h.
#include "format/octets.h"

#include <string.h>

// A block's fields: `lead` halves, `words` 32-bit words, `tail` halves.
struct layout {
    size_t lead, words, tail;
};

static bool layout_of(enum dtype type, struct layout *out) {
    switch (type) {
    case DTYPE_Q8_0: *out = (struct layout){1, 8, 0}; return true;
    case DTYPE_Q4_0: *out = (struct layout){1, 4, 0}; return true;
    case DTYPE_Q4_1: *out = (struct layout){2, 4, 0}; return true;
    case DTYPE_Q5_0: *out = (struct layout){1, 5, 0}; return true;
    case DTYPE_Q5_1: *out = (struct layout){2, 5, 0}; return true;
    case DTYPE_Q4_K: *out = (struct layout){0, 36, 0}; return true;
    case DTYPE_Q5_K: *out = (struct layout){0, 44, 0}; return true;
    case DTYPE_Q6_K: *out = (struct layout){0, 52, 1}; return true;
    default: return false;
    }
}

bool octets_known(enum dtype type) {
    struct layout l;
    return type == DTYPE_BF16 || layout_of(type, &l);
}

bool octets_fit(enum dtype type, size_t row_bytes) {
    return octets_known(type) && (type != DTYPE_BF16 || row_bytes % QUAD_LINE == 0);
}

// `pack`: from rows to the octet, else back.
static void move_lines(unsigned char *octet, unsigned char *rows, size_t row_bytes, bool pack) {
    for (size_t q = 0; q < OCTET_ROWS; q += QUAD_ROWS, rows += QUAD_ROWS * row_bytes) {
        for (size_t at = 0; at + QUAD_LINE <= row_bytes; at += QUAD_LINE) {
            for (size_t r = 0; r < QUAD_ROWS; r++, octet += QUAD_LINE) {
                if (pack) memcpy(octet, rows + r * row_bytes + at, QUAD_LINE);
                else memcpy(rows + r * row_bytes + at, octet, QUAD_LINE);
            }
        }
    }
}

// One field of `size` bytes, of eight rows; `pack`: from rows to the octet, else back.
static inline void move_field(unsigned char *octet, unsigned char *rows, size_t row_bytes, size_t size, bool pack) {
    for (size_t r = 0; r < OCTET_ROWS; r++) {
        if (pack) memcpy(octet + r * size, rows + r * row_bytes, size);
        else memcpy(rows + r * row_bytes, octet + r * size, size);
    }
}

static inline void move(enum dtype type, unsigned char *octet, unsigned char *rows, size_t row_bytes, bool pack) {
    struct layout l;
    if (type == DTYPE_BF16) move_lines(octet, rows, row_bytes, pack);
    if (!layout_of(type, &l)) return;
    const size_t block = 2 * (l.lead + l.tail) + 4 * l.words;
    for (size_t at = 0; at + block <= row_bytes; at += block) {
        unsigned char *from = rows + at;
        for (size_t i = 0; i < l.lead; i++, octet += 16, from += 2) move_field(octet, from, row_bytes, 2, pack);
        for (size_t i = 0; i < l.words; i++, octet += 32, from += 4) move_field(octet, from, row_bytes, 4, pack);
        for (size_t i = 0; i < l.tail; i++, octet += 16, from += 2) move_field(octet, from, row_bytes, 2, pack);
    }
}

void octets_pack(enum dtype type, void *to, const void *rows, size_t row_bytes) {
    move(type, to, (unsigned char *)(uintptr_t)rows, row_bytes, true);
}

void octets_unpack(enum dtype type, void *rows, const void *octet, size_t row_bytes) {
    move(type, (unsigned char *)(uintptr_t)octet, rows, row_bytes, false);
}
