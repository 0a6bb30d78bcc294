// test_sandbox.c: what the sandbox refuses and what it lets through, each tried in a child process of its own.
#include "server/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cmocka.h>

static int sockets[2]; // a connected pair that is open before

// Each returns 0 when the kernel let it through, else errno.
static int result(long status) {
    return status < 0 ? errno : 0;
}

static int try_execve(void) {
    char *none[] = {NULL};
    return result(execve("/bin/true", none, none));
}
static int try_fork(void) {
    pid_t child = fork();
    if (child == 0) _exit(0);
    return result(child);
}
static void *idle(void *unused) {
    return unused;
}
static int try_thread(void) {
    pthread_t thread;
    return pthread_create(&thread, NULL, idle, NULL);
}
static int try_ptrace(void) {
    return result(ptrace(PTRACE_TRACEME, 0, NULL, NULL));
}
static int try_other_memory(void) {
    char from = 0, to;
    struct iovec a = {&to, 1}, b = {&from, 1};
    return result(process_vm_readv(getppid(), &a, 1, &b, 1, 0));
}
static int try_socket(void) {
    return result(socket(AF_INET, SOCK_STREAM, 0));
}
static int try_socketpair(void) {
    int pair[2];
    return result(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
}
static int try_connect(void) {
    struct sockaddr_un to = {.sun_family = AF_UNIX, .sun_path = "/nowhere"};
    return result(connect(sockets[0], (struct sockaddr *)&to, sizeof to));
}
static int try_bind(void) {
    struct sockaddr_un to = {.sun_family = AF_UNIX, .sun_path = ""};
    return result(bind(sockets[0], (struct sockaddr *)&to, sizeof to));
}
static int try_write_file(void) {
    return result(open("/dev/null", O_WRONLY));
}
static int try_create_file(void) {
    return result(open("/tmp/tandem-sandbox-test", O_RDONLY | O_CREAT, 0600));
}
static int try_truncate_file(void) {
    return result(open("/dev/null", O_RDONLY | O_TRUNC));
}
static int try_unlink(void) {
    return result(unlink("/nowhere/file"));
}
static int try_rename(void) {
    return result(rename("/nowhere/a", "/nowhere/b"));
}
static int try_mkdir(void) {
    return result(mkdirat(AT_FDCWD, "/nowhere/folder", 0700));
}
static int try_chmod(void) {
    return result(syscall(SYS_fchmodat, AT_FDCWD, "/nowhere/file", 0777));
}
static int try_setuid(void) {
    return result(syscall(SYS_setuid, getuid()));
}
static int try_kill(void) {
    return result(kill(getppid(), 0));
}
static int try_signal_another(void) {
    return result(syscall(SYS_tgkill, getppid(), getppid(), 0));
}
static int try_terminal(void) {
    return result(ioctl(0, TIOCSTI, "x"));
}
static int try_code(void) {
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? errno : 0;
}
static int try_make_code(void) {
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? -1 : result(mprotect(p, 4096, PROT_READ | PROT_EXEC));
}
static int try_rlimit(void) {
    struct rlimit none = {0, 0};
    return result(setrlimit(RLIMIT_CPU, &none));
}
static int try_io_uring(void) {
    return result(syscall(425, 1, NULL));
}
#ifdef __x86_64__
static int try_x32(void) {
    return result(syscall(0x40000000 | 39)); // getpid of the x32 table
}
#endif

static int try_read_file(void) {
    char byte;
    int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0) return errno;
    int status = read(fd, &byte, 1) == 1 ? 0 : -1;
    close(fd);
    return status;
}
static int try_talk(void) {
    char byte = 'x';
    if (send(sockets[0], &byte, 1, MSG_NOSIGNAL) != 1) return errno;
    return recv(sockets[1], &byte, 1, 0) == 1 ? 0 : errno;
}
static int try_memory(void) {
    char *p = malloc((size_t)64 << 20);
    if (!p) return ENOMEM;
    memset(p, 1, (size_t)64 << 20);
    p = realloc(p, (size_t)96 << 20);
    free(p);
    return p ? 0 : ENOMEM;
}

// The status of one attempt in a child that is in the sandbox; -100: no sandbox.
static int in_child(int (*attempt)(void), bool reads_files) {
    int back[2], got = -1;
    assert_int_equal(pipe(back), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct error err = {0};
        int status = -100;
        if (sandbox_enter(reads_files, &err)) status = attempt();
        _exit(write(back[1], &status, sizeof status) == (ssize_t)sizeof status ? 0 : 1);
    }
    close(back[1]);
    if (read(back[0], &got, sizeof got) != (ssize_t)sizeof got) got = -200;
    close(back[0]);
    int status;
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status));
    return got;
}

static bool available(void) {
    static int known = -1;
    if (known < 0) known = in_child(try_memory, false) != -100;
    if (!known) print_message("no sandbox here: skipped\n");
    return known;
}

static void test_refused(void **state) {
    (void)state;
    if (!available()) skip();
    static int (*const refused[])(void) = {
        try_execve,    try_fork,   try_thread,     try_ptrace,      try_other_memory,   try_socket,   try_socketpair,
        try_connect,   try_bind,   try_write_file, try_create_file, try_truncate_file,  try_unlink,   try_rename,
        try_mkdir,     try_chmod,  try_setuid,     try_kill,        try_signal_another, try_terminal, try_code,
        try_make_code, try_rlimit, try_io_uring,
#ifdef __x86_64__
        try_x32,
#endif
    };
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        int got = in_child(refused[i], true);
        if (got != EPERM) print_message("attempt %zu: errno %d\n", i, got);
        assert_int_equal(got, EPERM);
    }
}

static void test_let_through(void **state) {
    (void)state;
    if (!available()) skip();
    assert_int_equal(in_child(try_read_file, true), 0);
    assert_int_equal(in_child(try_read_file, false), EPERM); // no key file: nothing is opened
    assert_int_equal(in_child(try_talk, false), 0);
    assert_int_equal(in_child(try_memory, false), 0);
}

static atomic_int from_thread = -1, go;

static void *attempt_later(void *unused) {
    while (!atomic_load(&go)) usleep(1000);
    atomic_store(&from_thread, try_socket());
    return unused;
}

// A thread that was there before is in the sandbox too.
static int try_in_older_thread(void) {
    atomic_store(&go, 1);
    while (atomic_load(&from_thread) == -1) usleep(1000);
    return atomic_load(&from_thread);
}

static void test_every_thread(void **state) {
    (void)state;
    if (!available()) skip();
    int back[2], got = -1, status = -100;
    assert_int_equal(pipe(back), 0);
    pid_t child = fork();
    if (child == 0) {
        struct error err = {0};
        pthread_t thread;
        if (pthread_create(&thread, NULL, attempt_later, NULL) != 0) _exit(1);
        if (sandbox_enter(false, &err)) status = try_in_older_thread();
        _exit(write(back[1], &status, sizeof status) == (ssize_t)sizeof status ? 0 : 1);
    }
    close(back[1]);
    assert_int_equal(read(back[0], &got, sizeof got), sizeof got);
    close(back[0]);
    waitpid(child, &status, 0);
    assert_int_equal(got, EPERM);
}

int main(void) {
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_let_through),
        cmocka_unit_test(test_every_thread),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
