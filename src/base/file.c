// file.c: see file.h.
#include "base/file.h"

#include "base/size.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// The mappings that the SIGBUS handler knows. A signal handler can reach only global state; slots are claimed and
// released with atomics so that it may look at them at any time.
enum { MAX_GUARDED = 1024 };
static struct { _Atomic uintptr_t begin, end; } guarded[MAX_GUARDED];
static atomic_bool guard_tripped;

static void guard_add(const void *data, size_t size) {
    for (int i = 0; i < MAX_GUARDED; i++) {
        uintptr_t free_slot = 0;
        if (atomic_compare_exchange_strong(&guarded[i].begin, &free_slot, (uintptr_t)data)) {
            atomic_store(&guarded[i].end, (uintptr_t)data + size);
            return;
        }
    }
}

static void guard_remove(const void *data) {
    for (int i = 0; i < MAX_GUARDED; i++) {
        if (atomic_load(&guarded[i].begin) == (uintptr_t)data) {
            atomic_store(&guarded[i].end, 0);
            atomic_store(&guarded[i].begin, 0);
            return;
        }
    }
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context) {
    (void)context;
    uintptr_t address = (uintptr_t)info->si_addr;
    for (int i = 0; i < MAX_GUARDED; i++) {
        if (address >= atomic_load(&guarded[i].begin) && address < atomic_load(&guarded[i].end)) {
            uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
            void *start = (void *)(address & ~(page - 1)); // NOLINT(performance-no-int-to-ptr)
            if (mmap(start, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
                atomic_store(&guard_tripped, true);
                return;
            }
        }
    }
    signal(signal_number, SIG_DFL); // not ours: the faulting access repeats and the default action follows
}

void file_guard_install(void) {
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
}

bool file_guard_tripped(void) {
    return atomic_load(&guard_tripped);
}

// Opens a regular file for reading and tells its size; -1 with `err` filled otherwise.
static int open_regular(const char *path, size_t *size, struct error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) {
        error_set(err, "cannot open %s: %s", path, strerror(errno));
        return -1;
    }
    struct stat st;
    if (fstat(fd, &st) != 0) {
        error_set(err, "cannot read the size of %s: %s", path, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        error_set(err, "%s is not a regular file", path);
    } else if (!size_from_u64((uint64_t)st.st_size, size)) {
        error_set(err, "%s is too large for this machine's address space", path);
    } else {
        return fd;
    }
    close(fd);
    return -1;
}

bool file_map_open(struct file_map *map, const char *path, struct error *err) {
    *map = (struct file_map){0};
    size_t size;
    int fd = open_regular(path, &size, err);
    if (fd < 0) return false;
    if (size == 0) {
        close(fd);
        return true;
    }
    void *data = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    int map_errno = errno;
    close(fd);
    if (data == MAP_FAILED) return error_set(err, "cannot map %s (%zu bytes): %s", path, size, strerror(map_errno));
    *map = (struct file_map){.data = data, .size = size};
    guard_add(data, size);
    return true;
}

bool file_map_memory(struct file_map *map, size_t size, unsigned char **writable, struct error *err) {
    *map = (struct file_map){0};
    void *data = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return error_set(err, "out of memory: cannot map %zu bytes: %s", size, strerror(errno));
    madvise(data, size, MADV_HUGEPAGE); // refused where there are none: then pages are small
    *map = (struct file_map){.data = data, .size = size ? size : 1};
    *writable = data;
    return true;
}

void file_map_close(struct file_map *map) {
    if (map->data) {
        guard_remove(map->data);
        munmap((void *)(uintptr_t)map->data, map->size);
    }
    *map = (struct file_map){0};
}

void file_map_forget(const struct file_map *map, const void *at, size_t n) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)at, end = begin + n;
    uintptr_t first = (uintptr_t)map->data, last = first + map->size;
    if (!map->data || begin < first || end > last || end < begin) return;
    begin = (begin + page - 1) / page * page;
    end = end / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED); // NOLINT(performance-no-int-to-ptr)
}

bool file_read(const char *path, size_t max_bytes, struct buffer *out, struct error *err) {
    size_t size;
    int fd = open_regular(path, &size, err);
    if (fd < 0) return false;
    bool ok = false;
    size_t old_len = out->len;
    if (size > max_bytes) {
        error_set(err, "%s has %zu bytes, more than the limit of %zu", path, size, max_bytes);
        goto done;
    }
    if (!buffer_reserve(out, size)) {
        error_set(err, "out of memory reading %s (%zu bytes)", path, size);
        goto done;
    }
    while (out->len - old_len < size) {
        ssize_t n = read(fd, out->data + out->len, size - (out->len - old_len));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            error_set(err, "cannot read %s: %s", path, strerror(errno));
            goto done;
        }
        if (n == 0) break; // shrunk meanwhile: what there is
        out->len += (size_t)n;
    }
    out->data[out->len] = '\0';
    ok = true;
done:
    close(fd);
    if (!ok && out->data) {
        out->len = old_len;
        out->data[old_len] = '\0';
    }
    return ok;
}

// ---- Writing ------------------------------------------------------------------------------------------------------

// The temporaries that a signal handler removes: it can reach only global state. A slot is claimed and left with
// atomics.
enum { MAX_TEMPORARIES = 8 };
static _Atomic(const char *) temporaries[MAX_TEMPORARIES];

static int note_temporary(const char *path) {
    for (int i = 0; i < MAX_TEMPORARIES; i++) {
        const char *none = NULL;
        if (atomic_compare_exchange_strong(&temporaries[i], &none, path)) return i;
    }
    return -1;
}

void file_remove_temporaries(void) {
    for (int i = 0; i < MAX_TEMPORARIES; i++) {
        const char *path = atomic_load(&temporaries[i]);
        if (path) unlink(path);
    }
}

static bool cannot_write(const struct file_output *f, struct error *err) {
    return error_set(err, "cannot write %s: %s", f->path.data, strerror(errno));
}

static bool open_temporary(struct file_output *f, struct error *err) {
    if (!buffer_printf(&f->temporary, "%s.XXXXXX", f->path.data)) return error_set(err, "out of memory");
    f->slot = note_temporary(f->temporary.data); // before the file is there: mkostemp writes its name into this text
    f->fd = mkostemp(f->temporary.data, O_CLOEXEC);
    f->open = f->fd >= 0;
    if (!f->open) {
        cannot_write(f, err);
        buffer_clear(&f->temporary); // nothing to remove
        return false;
    }
    mode_t mask = umask(0);
    umask(mask);
    return fchmod(f->fd, 0666 & ~mask) == 0 || cannot_write(f, err);
}

bool file_output_open(struct file_output *f, const char *path, struct error *err) {
    *f = (struct file_output){.slot = -1};
    struct stat st;
    bool there = stat(path, &st) == 0;
    char *real = there && S_ISREG(st.st_mode) ? realpath(path, NULL) : NULL;
    bool ok = buffer_append_text(&f->path, real ? real : path) || error_set(err, "out of memory");
    free(real);
    if (ok && there && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) {
        f->fd = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
        f->open = f->fd >= 0;
        ok = f->open || cannot_write(f, err);
    } else if (ok && there && S_ISDIR(st.st_mode)) {
        errno = EISDIR;
        ok = cannot_write(f, err);
    } else if (ok) {
        ok = open_temporary(f, err);
    }
    if (!ok) file_output_close(f);
    return ok;
}

bool file_output_write(struct file_output *f, const void *bytes, size_t n, struct error *err) {
    for (const char *at = bytes; n > 0;) {
        ssize_t done = write(f->fd, at, n);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return cannot_write(f, err);
        at += done;
        n -= (size_t)done;
    }
    return true;
}

bool file_output_finish(struct file_output *f, struct error *err) {
    bool in_place = f->temporary.len == 0;
    bool ok = in_place || fsync(f->fd) == 0 || errno == EINVAL || errno == ENOTSUP;
    ok = close(f->fd) == 0 && ok;
    f->open = false;
    ok = ok && (in_place || rename(f->temporary.data, f->path.data) == 0);
    if (!ok) cannot_write(f, err);
    else buffer_clear(&f->temporary); // there is nothing to remove
    return ok;
}

void file_output_close(struct file_output *f) {
    if (f->open) close(f->fd);
    if (f->temporary.len) unlink(f->temporary.data);
    if (f->temporary.data && f->slot >= 0) atomic_store(&temporaries[f->slot], NULL);
    buffer_free(&f->path);
    buffer_free(&f->temporary);
    *f = (struct file_output){.slot = -1};
}

bool file_write(const char *path, const void *bytes, size_t n, struct error *err) {
    return file_write_parts(path, &(struct file_part){.bytes = bytes, .n = n}, 1, err);
}

bool file_write_parts(const char *path, const struct file_part *parts, size_t n_parts, struct error *err) {
    struct file_output f;
    if (!file_output_open(&f, path, err)) return false;
    bool ok = true;
    for (size_t i = 0; ok && i < n_parts; i++) ok = file_output_write(&f, parts[i].bytes, parts[i].n, err);
    ok = ok && file_output_finish(&f, err);
    file_output_close(&f);
    return ok;
}

bool file_exists(const char *path) {
    return access(path, F_OK) == 0;
}

bool file_is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

bool file_is_broken_link(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0 && S_ISLNK(st.st_mode) && stat(path, &st) != 0;
}
