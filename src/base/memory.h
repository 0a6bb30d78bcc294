// memory.h: how much memory this process may still take.
#ifndef TANDEM_BASE_MEMORY_H
#define TANDEM_BASE_MEMORY_H

#include <stddef.h>

// Bytes that can be had without swapping: what the system calls available, and no more than what the process's control
// groups (version 2) leave, caches of files counted as free. SIZE_MAX: nobody says.
size_t memory_available(void);

// The same from other files, for the test: in the formats of /proc/meminfo and /proc/self/cgroup, and the folder under
// which the groups stand.
size_t memory_available_from(const char *meminfo, const char *groups, const char *mount);

#endif
