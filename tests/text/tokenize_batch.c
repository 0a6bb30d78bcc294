// tokenize_batch.c: the tokenizer's test driver. tokenize_batch FOLDER [special] reads documents, each a decimal
// length, a newline and that many bytes, and prints a line of ids for each.
#include "base/clock.h"
#include "text/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
    struct error err;
    if (argc < 2) return 2;
    double begin = clock_seconds();
    struct tokenizer *tok = tokenizer_open_folder(argv[1], &err);
    if (!tok) {
        fprintf(stderr, "tokenize_batch: %s\n", err.text);
        return 1;
    }
    fprintf(stderr, "opened in %.3f s: %s\n", clock_seconds() - begin, tokenizer_describe(tok));
    bool special = argc > 2 && strcmp(argv[2], "special") == 0;
    struct token_ids ids = {0};
    char *text = NULL;
    size_t n;
    int status = 0;
    begin = clock_seconds();
    double encoding = 0;
    while (status == 0 && scanf("%zu", &n) == 1) {
        char *grown = realloc(text, n + 1);
        if (!grown || getchar() != '\n' || fread(grown, 1, n, stdin) != n) status = 1;
        if (grown) text = grown;
        if (status) break;
        ids.n = 0;
        begin = clock_seconds();
        if (!tokenizer_encode(tok, text, n, special, &ids, &err)) {
            fprintf(stderr, "tokenize_batch: %s\n", err.text);
            status = 1;
        }
        encoding += clock_seconds() - begin;
        for (size_t i = 0; i < ids.n; i++) printf("%s%d", i ? " " : "", ids.ids[i]);
        putchar('\n');
    }
    fprintf(stderr, "encoded in %.3f s\n", encoding);
    free(text);
    token_ids_free(&ids);
    tokenizer_free(tok);
    return status;
}
