// cpus.c: how many CPUs this process may use: its affinity mask, and the CPU quotas of its cgroup and of the groups
// above it. The pool itself is pool.c's.
#include "base/pool.h"

#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CPUS = 1024, PATH_SIZE = 4096 };

// The first `n` numbers of a one-line file; false when it does not exist or says something else ("max").
static bool read_numbers(const char *path, long *numbers, int n) {
    char line[128];
    FILE *f = fopen(path, "re");
    if (!f) return false;
    char *at = fgets(line, sizeof line, f);
    fclose(f);
    for (int i = 0; at && i < n; i++) {
        char *end;
        numbers[i] = strtol(at, &end, 10);
        at = end == at ? NULL : end;
    }
    return at != NULL;
}

// Whole CPUs that a quota of microseconds in a period comes to, rounded up.
static int whole_cpus(long quota, long period) {
    if (quota <= 0 || period <= 0) return INT_MAX;
    long cpus = quota / period + (quota % period != 0);
    return cpus > MAX_CPUS ? INT_MAX : (int)cpus;
}

// The quota of one group's folder, version 2 or 1; INT_MAX: none.
static int group_cpus(const char *folder, bool v2) {
    char path[PATH_SIZE + 32];
    long v[2] = {0, 0};
    if (v2) {
        snprintf(path, sizeof path, "%s/cpu.max", folder);
        return read_numbers(path, v, 2) ? whole_cpus(v[0], v[1]) : INT_MAX;
    }
    snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
    if (!read_numbers(path, &v[0], 1)) return INT_MAX;
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
    return read_numbers(path, &v[1], 1) ? whole_cpus(v[0], v[1]) : INT_MAX;
}

// The smallest quota of `mount`/`group` and every group above it. In a container the process sees its own group as the
// root, so that the path may lead nowhere: the root counts in any case.
static int smallest_quota(const char *mount, const char *group, bool v2) {
    char folder[PATH_SIZE];
    size_t root = strlen(mount);
    int n = snprintf(folder, sizeof folder, "%s%s", mount, group);
    int least = group_cpus(mount, v2);
    if (n < 0 || (size_t)n >= sizeof folder) return least;
    while (strlen(folder) > root) {
        int cpus = group_cpus(folder, v2);
        if (cpus < least) least = cpus;
        char *slash = strrchr(folder, '/');
        if (!slash) break;
        *slash = '\0';
    }
    return least;
}

// Lines are "ID:CONTROLLERS:PATH": no controllers for version 2, a list with "cpu" in it for version 1.
int pool_cgroup_cpus(const char *list, const char *mount) {
    char line[PATH_SIZE], v1[PATH_SIZE];
    FILE *f = fopen(list, "re");
    if (!f) return 0;
    int least = INT_MAX;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path++ = '\0';
        bool v2 = controllers[1] == '\0', cpu = false;
        for (char *save = NULL, *c = strtok_r(controllers + 1, ",", &save); c; c = strtok_r(NULL, ",", &save))
            cpu = cpu || strcmp(c, "cpu") == 0;
        if (!v2 && !cpu) continue;
        snprintf(v1, sizeof v1, "%.4000s/cpu", mount);
        int cpus = smallest_quota(v2 ? mount : v1, path, v2);
        if (cpus < least) least = cpus;
    }
    fclose(f);
    return least == INT_MAX ? 0 : least;
}

int pool_usable_cpus(void) {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    int quota = pool_cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
    if (quota > 0 && quota < n) n = quota;
    return n < 1 ? 1 : n > MAX_CPUS ? MAX_CPUS : n;
}
