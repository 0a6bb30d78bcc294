// chat.c: a conversation through the library. Each line of stdin is a turn; the reply goes to stdout.
//   cc chat.c $(pkg-config --cflags --libs tandem) -o chat && ./chat MODEL
// Messages become JSON without escapes here, so a turn must not contain " or \; a real program asks a JSON library.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tandem.h>

static bool print_token(void *user, const tandem_token *token, const char *bytes, size_t n_bytes) {
    (void)user, (void)token;
    fwrite(bytes, 1, n_bytes, stdout);
    return fflush(stdout) == 0;
}

// Puts one turn behind the session's ids and prints the reply. The ids of earlier turns stay as they are.
static int turn(tandem_engine *engine, tandem_session *session, const char *text, bool first, char *err, size_t size) {
    char json[8192];
    int n = snprintf(json, sizeof json, "[{\"role\": \"user\", \"content\": \"%s\"}]", text);
    if (n < 0 || (size_t)n >= sizeof json) {
        snprintf(err, size, "turn too long");
        return TANDEM_ERROR;
    }
    int32_t *ids = NULL;
    size_t n_ids = 0;
    // The end token closed the last reply; the template wants a newline behind it.
    if (!first) {
        if (tandem_tokenize(engine, "\n", 1, false, &ids, &n_ids, err, size) < 0) return TANDEM_ERROR;
        int status = tandem_session_append(session, ids, n_ids, err, size);
        tandem_free(ids);
        if (status < 0) return status;
    }
    if (tandem_apply_template(engine, json, (size_t)n, 0, &ids, &n_ids, err, size) < 0) return TANDEM_ERROR;
    int status = tandem_session_append(session, ids, n_ids, err, size);
    tandem_free(ids);
    if (status < 0) return status;
    status = tandem_session_generate(session, 256, print_token, NULL, err, size);
    putchar('\n');
    return status;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: chat MODEL\n");
        return 2;
    }
    char err[512] = "", line[4096];
    tandem_options options = {.model = argv[1]};
    tandem_engine *engine = tandem_open(&options, err, sizeof err);
    if (!engine) {
        fprintf(stderr, "chat: %s\n", err);
        return 1;
    }
    tandem_sampling sampling = tandem_sampling_default(engine, false);
    sampling.temperature = 0; // greedy: the same reply every time
    tandem_session *session = tandem_session_new(engine, &sampling, err, sizeof err);
    int status = session ? TANDEM_OK : TANDEM_ERROR;
    for (bool first = true; status >= 0 && fgets(line, sizeof line, stdin); first = false) {
        line[strcspn(line, "\n")] = '\0';
        status = turn(engine, session, line, first, err, sizeof err);
    }
    if (status < 0) fprintf(stderr, "chat: %s\n", err);
    tandem_session_free(session);
    tandem_close(engine);
    return status < 0 ? 1 : 0;
}
