// numbers.h: numbers within bounds, as grammar: compared digit by digit, in decimal.
#ifndef TANDEM_SERVER_NUMBERS_H
#define TANDEM_SERVER_NUMBERS_H

#include "server/grammar.h"
#include "text/pyjson.h"

enum { MAX_WHOLE = 18, MAX_FRACTION = 17 }; // digits before and behind the point

// A decimal number; the digits of its magnitude.
struct decimal {
    bool negative;
    uint8_t whole[MAX_WHOLE];       // the last is the units'
    uint8_t fraction[MAX_FRACTION]; // the first is the tenths'
};

struct number_form {
    bool integer;
    bool has_low, has_high, above, below; // above, below: the bound itself is excluded
    struct decimal low, high;
    uint32_t multiple; // of an integer: this divides it; 0: any
    int decimals;      // at most so many; -1: any
};

// A bound. 0: done; else it has too many digits: -1: it lies below all that can be written here, 1: above, 2: it lies
// between two such numbers.
int decimal_read(const struct pyjson *v, struct decimal *out);
int decimal_compare(const struct decimal *a, const struct decimal *b); // < 0, 0, > 0
// Makes the bounds of `f` stricter by one more.
void number_bound(struct number_form *f, const struct decimal *bound, bool is_low, bool excluded);
// False: it takes too many places.
bool number_compile(struct grammar *g, const struct number_form *f, uint32_t next, uint32_t *out);
bool number_has(const struct number_form *f, const struct pyjson *v);

#endif
