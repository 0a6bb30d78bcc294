// log.c: see log.h.
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static void emit(const struct log *log, enum log_level level, const char *format, va_list args) {
    if (!log || !log->message) return;
    char text[1024];
    vsnprintf(text, sizeof text, format, args);
    log->message(log->user, level, text);
}

void log_info(const struct log *log, const char *format, ...) {
    va_list args;
    va_start(args, format);
    emit(log, LOG_INFO, format, args);
    va_end(args);
}

void log_warn(const struct log *log, const char *format, ...) {
    va_list args;
    va_start(args, format);
    emit(log, LOG_WARN, format, args);
    va_end(args);
}

void log_progress(const struct log *log, const char *what, size_t done, size_t total) {
    if (log && log->progress) log->progress(log->user, what, total ? (double)done / (double)total : 1.0);
}
