// sandbox.c: see sandbox.h. A seccomp filter in classic BPF, built from a table of the system calls that a running
// server makes. The calls and their arguments are those of Linux' man pages seccomp(2) and syscalls(2).
#include "server/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined __x86_64__
#define NATIVE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define NATIVE AUDIT_ARCH_AARCH64
#endif

#if defined NATIVE && !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__

enum { MAX_FILTER = 512, X32_BIT = 0x40000000 };

// Allowed with any arguments. Some exist on one architecture only; several are glibc's ways to one function.
static const int allowed[] = {
    // memory and threads that exist (a thread that just began registers itself)
    __NR_brk,
    __NR_munmap,
    __NR_mremap,
    __NR_madvise,
    __NR_futex,
    __NR_sched_yield,
    __NR_sched_getaffinity,
    __NR_set_robust_list,
    __NR_rseq,
    __NR_getpid,
    __NR_gettid,
    __NR_getrusage,
    __NR_sysinfo,
    __NR_getcpu,
    __NR_exit,
    __NR_exit_group,
    // signals of our own handlers
    __NR_rt_sigaction,
    __NR_rt_sigprocmask,
    __NR_rt_sigreturn,
    __NR_sigaltstack,
    __NR_restart_syscall,
    // time and chance
    __NR_clock_gettime,
    __NR_clock_getres,
    __NR_clock_nanosleep,
    __NR_nanosleep,
    __NR_gettimeofday,
    __NR_getrandom,
    // descriptors that are open
    __NR_read,
    __NR_write,
    __NR_readv,
    __NR_writev,
    __NR_pread64,
    __NR_lseek,
    __NR_close,
    __NR_fstat,
    __NR_newfstatat,
    __NR_ppoll,
    __NR_pselect6,
    __NR_epoll_ctl,
    __NR_epoll_pwait,
    // connections that come
    __NR_accept,
    __NR_accept4,
    __NR_recvfrom,
    __NR_recvmsg,
    __NR_sendto,
    __NR_sendmsg,
    __NR_sendfile,
    __NR_shutdown,
    __NR_getsockopt,
    __NR_getsockname,
    __NR_getpeername,
#ifdef __NR_poll
    __NR_poll,
    __NR_select,
    __NR_epoll_wait,
    __NR_time,
#endif
#ifdef __NR_epoll_pwait2
    __NR_epoll_pwait2,
#endif
};

struct filter {
    struct sock_filter code[MAX_FILTER];
    unsigned short n;
};

static void put(struct filter *f, unsigned code, unsigned if_true, unsigned if_false, uint32_t k) {
    if (f->n < MAX_FILTER) f->code[f->n] = (struct sock_filter){(uint16_t)code, (uint8_t)if_true, (uint8_t)if_false, k};
    f->n++; // one too many is noticed at the end
}

static void load(struct filter *f, size_t offset) {
    put(f, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)offset);
}

static void answer(struct filter *f, bool yes) {
    put(f, BPF_RET | BPF_K, 0, 0, yes ? SECCOMP_RET_ALLOW : SECCOMP_RET_ERRNO | EPERM);
}

// The accumulator holds the call's number between rules: a rule that looks at an argument always answers.
static void allow(struct filter *f, int call) {
    put(f, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (uint32_t)call);
    answer(f, true);
}

// Arguments have 64 bits; what is compared here (flags, commands, process ids) stands in the low 32.
static void load_argument(struct filter *f, int i) {
    load(f, offsetof(struct seccomp_data, args) + 8 * (size_t)i);
}

// Allowed if argument `i` has none of these bits.
static void allow_without(struct filter *f, int call, int i, uint32_t bits) {
    put(f, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, (uint32_t)call);
    load_argument(f, i);
    put(f, BPF_JMP | BPF_JSET | BPF_K, 1, 0, bits);
    answer(f, true);
    answer(f, false);
}

// Allowed if argument `i` is one of these values.
static void allow_with(struct filter *f, int call, int i, const uint32_t *values, unsigned n) {
    put(f, BPF_JMP | BPF_JEQ | BPF_K, 0, 1 + 2 * n + 1, (uint32_t)call);
    load_argument(f, i);
    for (unsigned k = 0; k < n; k++) {
        put(f, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, values[k]);
        answer(f, true);
    }
    answer(f, false);
}

#define ALLOW_WITH(f, call, i, ...)                                                                                    \
    allow_with(f, call, i, (const uint32_t[]){__VA_ARGS__},                                                            \
               (unsigned)(sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t)))

static void build(struct filter *f, bool reads_files) {
    load(f, offsetof(struct seccomp_data, arch));
    put(f, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, NATIVE);
    put(f, BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS); // a call by another architecture's table: no bug does that
    load(f, offsetof(struct seccomp_data, nr));
    put(f, BPF_JMP | BPF_JGE | BPF_K, 0, 1, X32_BIT);
    answer(f, false);
    for (size_t i = 0; i < sizeof allowed / sizeof allowed[0]; i++) allow(f, allowed[i]);
    // No memory becomes code.
    allow_without(f, __NR_mmap, 2, PROT_EXEC);
    allow_without(f, __NR_mprotect, 2, PROT_EXEC);
    ALLOW_WITH(f, __NR_ioctl, 1, FIONREAD, FIONBIO);
    ALLOW_WITH(f, __NR_fcntl, 1, F_GETFD, F_SETFD, F_GETFL, F_SETFL);
    ALLOW_WITH(f, __NR_setsockopt, 1, SOL_SOCKET, IPPROTO_TCP);
    ALLOW_WITH(f, __NR_tgkill, 0, (uint32_t)getpid()); // abort()
    const uint32_t reading = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_LARGEFILE;
    if (reads_files) allow_without(f, __NR_openat, 2, ~reading);
    answer(f, false);
}

bool sandbox_enter(bool reads_files, struct error *err) {
    struct filter f = {.n = 0};
    build(&f, reads_files);
    if (f.n > MAX_FILTER) return error_set(err, "the filter has %u instructions, %d fit", f.n, MAX_FILTER);
    struct sock_fprog program = {.len = f.n, .filter = f.code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return error_set(err, "no_new_privs: %s", strerror(errno));
    long status = syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
    if (status > 0) return error_set(err, "seccomp: thread %ld has another filter", status);
    return status == 0 || error_set(err, "seccomp: %s", strerror(errno));
}

#else

bool sandbox_enter(bool reads_files, struct error *err) {
    (void)reads_files;
#ifdef NATIVE
    return error_set(err, "a sanitizer needs what it forbids");
#else
    return error_set(err, "this architecture has no list of system calls yet");
#endif
}

#endif
