// memory.c: see memory.h.
#include "base/memory.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { PATH_SIZE = 4096 };

// The number behind `key` at the beginning of a line ("": the first line's number); false: there is none.
static bool read_number(const char *path, const char *key, uint64_t *out) {
    char line[256];
    size_t n = strlen(key);
    bool found = false;
    FILE *f = fopen(path, "re");
    if (!f) return false;
    while (!found && fgets(line, sizeof line, f))
        found = strncmp(line, key, n) == 0 && sscanf(line + n, "%" SCNu64, out) == 1;
    fclose(f);
    return found;
}

// What one group leaves: its limit, less what it holds, and caches of files, which it gives back; UINT64_MAX: no limit.
static uint64_t group_leaves(const char *folder) {
    char path[PATH_SIZE + 32];
    uint64_t limit, used, files = 0;
    snprintf(path, sizeof path, "%s/memory.max", folder);
    if (!read_number(path, "", &limit)) return UINT64_MAX; // "max", or no such file
    snprintf(path, sizeof path, "%s/memory.current", folder);
    if (!read_number(path, "", &used)) return limit;
    snprintf(path, sizeof path, "%s/memory.stat", folder);
    if (!read_number(path, "file ", &files)) files = 0;
    uint64_t held = used > files ? used - files : 0;
    return limit > held ? limit - held : 0;
}

size_t memory_available_from(const char *meminfo, const char *groups, const char *mount) {
    uint64_t least = UINT64_MAX, kb;
    char line[PATH_SIZE], folder[2 * PATH_SIZE];
    if (read_number(meminfo, "MemAvailable:", &kb)) least = kb * 1024;
    // In a container the process sees its own group as the root, so that the path may lead nowhere: the root counts.
    uint64_t leaves = group_leaves(mount);
    if (leaves < least) least = leaves;
    FILE *f = fopen(groups, "re");
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = '\0';
        if (strncmp(line, "0::", 3) != 0 || strlen(line) + strlen(mount) >= PATH_SIZE) continue;
        snprintf(folder, sizeof folder, "%s%s", mount, line + 3);
        for (size_t root = strlen(mount); strlen(folder) > root;) {
            leaves = group_leaves(folder);
            if (leaves < least) least = leaves;
            char *slash = strrchr(folder, '/');
            if (!slash) break;
            *slash = '\0';
        }
    }
    if (f) fclose(f);
    return least > SIZE_MAX ? SIZE_MAX : (size_t)least;
}

size_t memory_available(void) {
    return memory_available_from("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup");
}
