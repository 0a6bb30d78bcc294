// log.h: where warnings and progress go. The library prints nothing itself: whoever opens an engine passes a `struct
// log`, and the command line's writes to stderr.
#ifndef TANDEM_BASE_LOG_H
#define TANDEM_BASE_LOG_H

#include <stddef.h>

enum log_level { LOG_INFO, LOG_WARN };

// Both functions may be NULL: then nothing is said. They are called on the thread that called the library.
struct log {
    void (*message)(void *user, enum log_level level, const char *text);
    void (*progress)(void *user, const char *what, double fraction); // fraction in [0, 1]; 1 ends the bar
    void *user;
};

// `log` may be NULL in all of these.
void log_info(const struct log *log, const char *format, ...) __attribute__((format(printf, 2, 3)));
void log_warn(const struct log *log, const char *format, ...) __attribute__((format(printf, 2, 3)));
void log_progress(const struct log *log, const char *what, size_t done, size_t total);

#endif
