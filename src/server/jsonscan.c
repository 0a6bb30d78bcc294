// jsonscan.c: see jsonscan.h.
#include "server/jsonscan.h"

static bool is_space(unsigned char c) {
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

static bool is_digit(unsigned char c) {
    return c >= '0' && c <= '9';
}

static void value_ended(struct jsonscan *s) {
    s->state = s->depth ? SCAN_AFTER : SCAN_DONE;
}

static bool open_level(struct jsonscan *s, bool object) {
    if (s->depth == JSONSCAN_DEPTH) return false;
    uint64_t bit = (uint64_t)1 << s->depth % 64;
    if (object) s->objects[s->depth / 64] |= bit;
    else s->objects[s->depth / 64] &= ~bit;
    s->depth++;
    s->state = object ? SCAN_OBJECT : SCAN_ARRAY;
    return true;
}

static bool close_level(struct jsonscan *s, unsigned char c) {
    if (c != (jsonscan_in_object(s) ? '}' : ']')) return false;
    s->depth--;
    value_ended(s);
    return true;
}

static bool begin_value(struct jsonscan *s, unsigned char c) {
    switch (c) {
    case '{': return open_level(s, true);
    case '[': return open_level(s, false);
    case '"': s->state = SCAN_STRING, s->key = 0; return true;
    case '-': s->state = SCAN_MINUS; return true;
    case '0': s->state = SCAN_ZERO; return true;
    case 't': s->state = SCAN_LITERAL, s->literal = "rue"; return true;
    case 'f': s->state = SCAN_LITERAL, s->literal = "alse"; return true;
    case 'n': s->state = SCAN_LITERAL, s->literal = "ull"; return true;
    default:
        if (!is_digit(c)) return false;
        s->state = SCAN_DIGITS;
        return true;
    }
}

// The first byte of a character in a string; which second bytes may follow is RFC 3629's table.
static bool begin_character(struct jsonscan *s, unsigned char c) {
    if (c < 0xC2 || c > 0xF4) return false;
    s->state = SCAN_UTF8;
    s->left = c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
    s->low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    s->high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    return true;
}

static bool in_string(struct jsonscan *s, unsigned char c) {
    switch (s->state) {
    case SCAN_STRING:
        if (c == '"') {
            if (s->key) s->state = SCAN_COLON;
            else value_ended(s);
            return true;
        }
        if (c == '\\') {
            s->state = SCAN_ESCAPE;
            return true;
        }
        return c >= 0x80 ? begin_character(s, c) : c >= 0x20;
    case SCAN_ESCAPE:
        s->state = c == 'u' ? SCAN_HEX : SCAN_STRING;
        s->left = 4;
        return c == 'u' || c == '"' || c == '\\' || c == '/' || c == 'b' || c == 'f' || c == 'n' || c == 'r' ||
               c == 't';
    case SCAN_HEX:
        if (--s->left == 0) s->state = SCAN_STRING;
        return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
    default: // SCAN_UTF8
        if (c < s->low || c > s->high) return false;
        s->low = 0x80;
        s->high = 0xBF;
        if (--s->left == 0) s->state = SCAN_STRING;
        return true;
    }
}

static bool after_value(struct jsonscan *s, unsigned char c) {
    if (is_space(c)) return true;
    if (s->state == SCAN_DONE) return false;
    if (c != ',') return close_level(s, c);
    s->state = jsonscan_in_object(s) ? SCAN_KEY : SCAN_VALUE;
    return true;
}

// A number ends with the first byte that does not belong to it.
static bool in_number(struct jsonscan *s, unsigned char c) {
    bool digit = is_digit(c), whole = false;
    switch (s->state) {
    case SCAN_MINUS:
        if (digit) s->state = c == '0' ? SCAN_ZERO : SCAN_DIGITS;
        return digit;
    case SCAN_POINT: s->state = SCAN_FRACTION; return digit;
    case SCAN_E: s->state = digit ? SCAN_EXPONENT : SCAN_SIGN; return digit || c == '+' || c == '-';
    case SCAN_SIGN: s->state = SCAN_EXPONENT; return digit;
    case SCAN_DIGITS:
        if (digit) return true;
        whole = true;
        break;
    case SCAN_ZERO: whole = true; break;
    default:
        if (digit) return true;
        break;
    }
    if (whole && c == '.') {
        s->state = SCAN_POINT;
        return true;
    }
    if ((c == 'e' || c == 'E') && s->state != SCAN_EXPONENT) {
        s->state = SCAN_E;
        return true;
    }
    value_ended(s);
    return after_value(s, c);
}

bool jsonscan_feed(struct jsonscan *s, unsigned char c) {
    switch ((enum jsonscan_state)s->state) {
    case SCAN_VALUE: return is_space(c) || begin_value(s, c);
    case SCAN_ARRAY:
        if (c == ']') return close_level(s, c);
        return is_space(c) || begin_value(s, c);
    case SCAN_OBJECT:
        if (c == '}') return close_level(s, c);
        // fall through
    case SCAN_KEY:
        if (is_space(c)) return true;
        s->state = SCAN_STRING;
        s->key = 1;
        return c == '"';
    case SCAN_COLON:
        if (c == ':') s->state = SCAN_VALUE;
        return c == ':' || is_space(c);
    case SCAN_AFTER:
    case SCAN_DONE: return after_value(s, c);
    case SCAN_STRING:
    case SCAN_ESCAPE:
    case SCAN_HEX:
    case SCAN_UTF8: return in_string(s, c);
    case SCAN_LITERAL:
        if (c != (unsigned char)*s->literal) return false;
        if (!*++s->literal) value_ended(s);
        return true;
    default: return in_number(s, c);
    }
}
