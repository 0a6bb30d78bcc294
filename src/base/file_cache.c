// file_cache.c: see file_cache.h.
#include "base/file_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static bool make_folders(const char *path, struct error *err) {
    struct buffer part = {0};
    bool ok = buffer_append_text(&part, path) || error_set(err, "out of memory");
    for (char *slash = ok ? strchr(part.data + 1, '/') : NULL; ok && slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        if (mkdir(part.data, 0700) != 0 && errno != EEXIST)
            ok = error_set(err, "cannot make the folder %s: %s", part.data, strerror(errno));
        *slash = '/';
    }
    buffer_free(&part);
    return ok;
}

// Opens and locks the temporary. The lock is the process's, and ends with it. Between opening and locking, whoever had
// the lock may have given the file its name: then it is not ours to change.
static bool lock_temporary(struct file_cache *f, struct error *err) {
    const char *path = f->temporary.data;
    struct stat opened, named;
    f->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (f->fd < 0) return error_set(err, "cannot write %s: %s", path, strerror(errno));
    bool ours = flock(f->fd, LOCK_EX | LOCK_NB) == 0 && fstat(f->fd, &opened) == 0 && stat(path, &named) == 0 &&
                S_ISREG(opened.st_mode) && opened.st_dev == named.st_dev && opened.st_ino == named.st_ino;
    if (ours) return true;
    buffer_clear(&f->temporary); // another's: not to be removed
    return error_set(err, "another process is writing %s", f->path.data);
}

static bool reserve(struct file_cache *f, size_t size, struct error *err) {
    struct statvfs disk;
    if (fstatvfs(f->fd, &disk) == 0 && disk.f_bavail * disk.f_frsize / 2 < size)
        return error_set(err, "the disk of %s has less than %zu MB free", f->path.data, 2 * (size / 1000000));
    int code = ftruncate(f->fd, 0) == 0 ? posix_fallocate(f->fd, 0, (off_t)size) : errno;
    if (code) return error_set(err, "cannot write %zu bytes to %s: %s", size, f->path.data, strerror(code));
    void *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, f->fd, 0);
    if (data == MAP_FAILED) return error_set(err, "cannot map %s: %s", f->path.data, strerror(errno));
    f->data = data;
    f->size = size;
    return true;
}

bool file_cache_begin(struct file_cache *f, const char *path, size_t size, struct error *err) {
    *f = (struct file_cache){.fd = -1};
    bool ok = buffer_append_text(&f->path, path) && buffer_printf(&f->temporary, "%s.tmp", path);
    if (!ok) error_set(err, "out of memory");
    if (ok && size == 0) ok = error_set(err, "%s: nothing to write", path);
    ok = ok && make_folders(path, err) && lock_temporary(f, err) && reserve(f, size, err);
    if (!ok) file_cache_abandon(f);
    return ok;
}

bool file_cache_publish(struct file_cache *f, struct error *err) {
    bool ok = rename(f->temporary.data, f->path.data) == 0 ||
              error_set(err, "cannot write %s: %s", f->path.data, strerror(errno));
    if (ok) buffer_clear(&f->temporary); // there is nothing to remove
    file_cache_abandon(f);
    return ok;
}

void file_cache_abandon(struct file_cache *f) {
    if (f->data) munmap(f->data, f->size);
    if (f->temporary.len) unlink(f->temporary.data); // before the lock goes
    if (f->path.data && f->fd >= 0) close(f->fd);
    buffer_free(&f->path);
    buffer_free(&f->temporary);
    *f = (struct file_cache){.fd = -1};
}
