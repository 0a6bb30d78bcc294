// file_cache.h: a file that one process makes and many map: built in place, and given its name when it is whole. Who is
// not the first to build it is told so at once; what a crash leaves is taken over by the next builder. It owns no
// contents: those who read such a file check what is in it.
#ifndef TANDEM_BASE_FILE_CACHE_H
#define TANDEM_BASE_FILE_CACHE_H

#include "base/buffer.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>

struct file_cache {
    unsigned char *data; // [size] cleared, writable; its pages are the file's
    size_t size;
    int fd;
    struct buffer path, temporary;
};

// Begins `path`, whose folder is made if it is missing. False: another process is building it, the disk has not twice
// `size` free, or the system refuses.
bool file_cache_begin(struct file_cache *f, const char *path, size_t size, struct error *err);
// Gives the file its name, in place of what had it; then all is as after file_cache_abandon.
bool file_cache_publish(struct file_cache *f, struct error *err);
void file_cache_abandon(struct file_cache *f); // all zero is fine

#endif
