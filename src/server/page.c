// page.c: the web page at /: page.html, which stands in the program as it is, and the policy that lets a browser run
// its own script and style and nothing else.
#include "server/internal.h"

#include "base/digest.h"

#include <stdio.h>
#include <string.h>

__asm__(".section .rodata\n"
        ".globl server_page_begin\n"
        ".globl server_page_end\n"
        ".hidden server_page_begin\n"
        ".hidden server_page_end\n"
        "server_page_begin: .incbin \"src/server/page.html\"\n"
        "server_page_end: .byte 0\n"
        ".previous\n");
extern const char server_page_begin[], server_page_end[];

// What stands between two tags: its SHA-256 in base64, as a policy names it.
static bool put_hash(struct buffer *out, const char *open, const char *close) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *begin = strstr(server_page_begin, open), *end = begin ? strstr(begin, close) : NULL;
    struct digest digest;
    unsigned char bytes[33] = {0}; // 32, and one to fill the last group
    if (!end) return false;
    begin += strlen(open);
    if (!digest_bytes(begin, (size_t)(end - begin), &digest, NULL)) return false;
    for (int i = 0; i < 32; i++) {
        unsigned value = 0;
        sscanf(digest.hex + 2 * i, "%2x", &value);
        bytes[i] = (unsigned char)value;
    }
    bool ok = buffer_append_text(out, "'sha256-");
    for (int i = 0; ok && i < 33; i += 3) {
        unsigned group = (unsigned)(bytes[i] << 16 | bytes[i + 1] << 8 | bytes[i + 2]);
        for (int k = 18; ok && k >= 0; k -= 6) ok = buffer_append_byte(out, digits[group >> k & 63]);
    }
    if (ok) out->len--; // 32 bytes are 43 digits and a =
    return ok && buffer_append_text(out, "='");
}

bool page_policy(struct buffer *out) {
    return buffer_append_text(
               out, "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                    "frame-ancestors 'none'; script-src ") &&
           put_hash(out, "<script>", "</script>") && buffer_append_text(out, "; style-src ") &&
           put_hash(out, "<style>", "</style>");
}

void handle_page(struct exchange *x) {
    struct buffer body = {0};
    buffer_append(&body, server_page_begin, (size_t)(server_page_end - server_page_begin));
    x->is_page = true;
    exchange_reply_type(x, 200, &body, "text/html; charset=utf-8");
}
