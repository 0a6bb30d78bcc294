// documents.c: see documents.h.
#include "cli/documents.h"

#include "cli/cli.h"

#include <string.h>

int for_each_document(const struct buffer *input, document_fn *fn, void *user) {
    size_t number = 1;
    for (size_t begin = 0; begin < input->len; number++) {
        const char *text = input->data + begin;
        const char *nul = memchr(text, '\0', input->len - begin);
        size_t n = nul ? (size_t)(nul - text) : input->len - begin;
        struct error err = {0};
        if (!fn(user, text, n, &err)) return cli_fail("document %zu: %s", number, err.text);
        begin += n + 1;
    }
    return EXIT_GOOD;
}
