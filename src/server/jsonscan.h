// jsonscan.h: JSON text read byte by byte: is what came so far the beginning of a JSON value, and is it complete?
// Strict (RFC 8259, valid UTF-8). Small enough to be copied, so that "what if this byte came next" costs a copy.
#ifndef TANDEM_SERVER_JSONSCAN_H
#define TANDEM_SERVER_JSONSCAN_H

#include <stdbool.h>
#include <stdint.h>

enum { JSONSCAN_DEPTH = 128 };

enum jsonscan_state {
    SCAN_VALUE,  // a value must come
    SCAN_OBJECT, // behind {: a key or }
    SCAN_KEY,    // behind , in an object: a key
    SCAN_COLON,
    SCAN_ARRAY,  // behind [: a value or ]
    SCAN_AFTER,  // behind a value inside something
    SCAN_STRING, // inside a string (scan.key tells whether it is a key)
    SCAN_ESCAPE,
    SCAN_HEX,
    SCAN_UTF8,
    SCAN_MINUS,
    SCAN_ZERO,
    SCAN_DIGITS,
    SCAN_POINT,
    SCAN_FRACTION,
    SCAN_E,
    SCAN_SIGN,
    SCAN_EXPONENT,
    SCAN_LITERAL,
    SCAN_DONE // the outermost value is complete; white space may follow
};

// All zero: nothing came yet.
struct jsonscan {
    uint8_t state, depth;
    uint8_t key;                           // the string in progress is a key
    uint8_t left;                          // hex digits or continuation bytes still to come
    uint8_t low, high;                     // what the next continuation byte may be
    const char *literal;                   // what is left of true, false, null
    uint64_t objects[JSONSCAN_DEPTH / 64]; // bit d: level d + 1 is an object
};

bool jsonscan_feed(struct jsonscan *s, unsigned char byte); // false: no JSON begins like this; *s is spoilt

// Inside an object (not an array)?
static inline bool jsonscan_in_object(const struct jsonscan *s) {
    unsigned d = s->depth - 1u;
    return s->depth > 0 && (s->objects[d / 64] >> d % 64 & 1);
}

#endif
