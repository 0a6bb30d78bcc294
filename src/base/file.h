// file.h: reading files that may be hostile. Only regular files are opened (a FIFO or a device never blocks us), sizes
// are bounded, and a mapped file that shrinks under us becomes an error instead of a SIGBUS.
#ifndef TANDEM_BASE_FILE_H
#define TANDEM_BASE_FILE_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>

// A read-only mapping of a whole file. All zero is "not open".
struct file_map {
    const unsigned char *data; // [size]; NULL when the file is empty
    size_t size;
};

bool file_map_open(struct file_map *map, const char *path, struct error *err);
void file_map_close(struct file_map *map);
// Gives back the memory of n bytes at `at` inside a mapped file, as far as they are whole pages: who reads them again
// reads the file. Nothing for addresses that are not the mapping's. Not for file_map_memory's.
void file_map_forget(const struct file_map *map, const void *at, size_t n);

// Memory of no file, cleared and writable through `*writable`, that is closed like a mapping. Backed by huge pages
// where the system gives them.
bool file_map_memory(struct file_map *map, size_t size, unsigned char **writable, struct error *err);

// Reads a whole file of at most `max_bytes` into `out` (appended). Errors: missing, not a regular file, too large, I/O.
bool file_read(const char *path, size_t max_bytes, struct buffer *out, struct error *err);

// A file that is written piece by piece. The pieces go to a temporary neighbour, which takes the file's place when all
// is written: a crash or a full disk leaves what was there before. What a symbolic link leads to is replaced, not the
// link; a device or a pipe (/dev/stdout) is written as it is.
struct file_output {
    int fd;
    bool open;
    struct buffer path, temporary; // temporary is empty: written in place
    int slot;                      // of the list for file_remove_temporaries; -1: none
};
bool file_output_open(struct file_output *f, const char *path, struct error *err);
bool file_output_write(struct file_output *f, const void *bytes, size_t n, struct error *err);
bool file_output_finish(struct file_output *f, struct error *err); // the bytes are on the disk when it returns
void file_output_close(struct file_output *f); // removes what is unfinished; always called; all zero is fine

// Removes every temporary that this process has begun; for a signal handler that is about to end the process.
void file_remove_temporaries(void);

// The same for bytes that are there already, one piece or several.
bool file_write(const char *path, const void *bytes, size_t n, struct error *err);
struct file_part {
    const void *bytes; // [n]
    size_t n;
};
bool file_write_parts(const char *path, const struct file_part *parts, size_t n_parts, struct error *err);

bool file_exists(const char *path); // anything at all is there
bool file_is_folder(const char *path);
bool file_is_broken_link(const char *path); // a symbolic link to nothing

// Installs a SIGBUS handler (programs call this once; the library does so only when asked): a read past the end of a
// mapped file that was truncated meanwhile then yields zeros and sets a flag, in place of killing the process. SIGBUS
// from anywhere else keeps its default action.
void file_guard_install(void);
bool file_guard_tripped(void); // did that happen since the process started?

#endif
