/* Counts file operations below one folder and makes the Nth fail, write half, or kill the process.
 *
 * Preloaded (LD_PRELOAD) before the interpreter starts; a child of a fork arms it with `faults_arm`. Covered are the calls of libc
 * through which Python, pyarrow (C++) and safetensors (Rust) reach the disk: open, read, write, sync, rename, unlink, mkdir, truncate,
 * link, chmod, mmap, and opening of folders. Removing is no writing: a full disk allows it. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FAIL, CUT, KILL };
#define FILES 65536

static char root[PATH_MAX];
static int mode, code, forever, only_writes;
static long at;
static atomic_long count, writing;
static atomic_char below[FILES];
static atomic_int fired;
static char fired_at[PATH_MAX + 64];

void faults_arm(const char *folder, int how, int error, long number, int sticky, int writes) {
    strncpy(root, folder, sizeof root - 1);
    mode = how, code = error, at = number, forever = sticky, only_writes = writes;
    atomic_store(&count, 0), atomic_store(&writing, 0), atomic_store(&fired, 0), fired_at[0] = 0;
}
long faults_count(int writes) { return atomic_load(writes ? &writing : &count); }
int faults_fired(void) { return atomic_load(&fired); }
const char *faults_where(void) { return fired_at; }

static int inside(int folder, const char *path) {
    char whole[PATH_MAX * 2], link[64];
    if (!root[0] || !path) return 0;
    if (path[0] != '/') {
        char start[PATH_MAX];
        ssize_t length;
        if (folder == AT_FDCWD) {
            if (!getcwd(start, sizeof start)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            length = readlink(link, start, sizeof start - 1);
            if (length < 0) return 0;
            start[length] = 0;
        }
        snprintf(whole, sizeof whole, "%s/%s", start, path);
        path = whole;
    }
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}
static int mine(int fd) { return root[0] && fd >= 0 && fd < FILES && atomic_load(&below[fd]); }

/* Whether this operation is the one: 0 goes on, 1 fails, 2 writes half. */
static int step(const char *what, const char *path, int writes) {
    long number = atomic_fetch_add(&count, 1) + 1, written = writes ? atomic_fetch_add(&writing, 1) + 1 : 0;
    if (only_writes && !(number = written)) return 0;
    if (!mode || !at || !(number == at || (forever && number > at))) return 0;
    if (!atomic_exchange(&fired, 1)) snprintf(fired_at, sizeof fired_at, "%s %s", what, path ? path : "");
    if (mode == KILL) kill(getpid(), SIGKILL), pause();
    if (mode == CUT && strcmp(what, "write") == 0 && number == at) return 2;
    errno = code;
    return 1;
}

#define REAL(type, name, ...)                                  \
    static type (*real)(__VA_ARGS__);                          \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)
#define NAMED(fd) char named[64]; snprintf(named, sizeof named, "fd %d", fd)

static int opened(int fd, int ours) {
    if (fd >= 0 && fd < FILES) atomic_store(&below[fd], ours);
    return fd;
}
#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...) {                                       \
        REAL(int, name, const char *, int, ...);                                       \
        va_list rest; va_start(rest, flags);                                           \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;        \
        va_end(rest);                                                                  \
        int ours = inside(AT_FDCWD, path);                                             \
        if (ours && step("open", path, flags & (O_CREAT | O_WRONLY | O_RDWR))) return -1; \
        return opened(real(path, flags, bits), ours);                                  \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                                   \
    int name(int folder, const char *path, int flags, ...) {                           \
        REAL(int, name, int, const char *, int, ...);                                  \
        va_list rest; va_start(rest, flags);                                           \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;        \
        va_end(rest);                                                                  \
        int ours = inside(folder, path);                                               \
        if (ours && step("open", path, flags & (O_CREAT | O_WRONLY | O_RDWR))) return -1; \
        return opened(real(folder, path, flags, bits), ours);                          \
    }
OPENAT(openat)
OPENAT(openat64)
int close(int fd) {
    REAL(int, close, int);
    if (fd >= 0 && fd < FILES) atomic_store(&below[fd], 0);
    return real(fd);
}
int dup(int fd) {
    REAL(int, dup, int);
    int copy = real(fd);
    return opened(copy, mine(fd));
}
int fcntl64(int fd, int command, ...) {
    REAL(int, fcntl64, int, int, ...);
    va_list rest; va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    int result = real(fd, command, argument);
    if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) opened(result, mine(fd));
    return result;
}

#define WRITE(name, before, after, length)                                             \
    ssize_t name before {                                                              \
        REAL(ssize_t, name, PARAMETERS);                                               \
        if (mine(fd)) {                                                                \
            NAMED(fd);                                                                 \
            int fault = step("write", named, 1);                                       \
            if (fault == 1) return -1;                                                 \
            if (fault == 2 && length > 1) { length /= 2; at++; }                       \
        }                                                                              \
        return real after;                                                             \
    }
#define PARAMETERS int, const void *, size_t
WRITE(write, (int fd, const void *data, size_t size), (fd, data, size), size)
#undef PARAMETERS
#define PARAMETERS int, const void *, size_t, off_t
WRITE(pwrite, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place), size)
WRITE(pwrite64, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place), size)
#undef PARAMETERS

#define ON_FILE(type, name, what, writes, before, after, failed, ...)                  \
    type name before {                                                                 \
        REAL(type, name, __VA_ARGS__);                                                 \
        if (mine(fd)) {                                                                \
            NAMED(fd);                                                                 \
            if (step(what, named, writes)) return failed;                              \
        }                                                                              \
        return real after;                                                             \
    }
ON_FILE(ssize_t, writev, "writev", 1, (int fd, const struct iovec *parts, int n), (fd, parts, n), -1, int, const struct iovec *, int)
ON_FILE(ssize_t, read, "read", 0, (int fd, void *data, size_t size), (fd, data, size), -1, int, void *, size_t)
ON_FILE(ssize_t, pread, "read", 0, (int fd, void *data, size_t size, off_t place), (fd, data, size, place), -1, int, void *, size_t, off_t)
ON_FILE(ssize_t, pread64, "read", 0, (int fd, void *data, size_t size, off_t place), (fd, data, size, place), -1, int, void *, size_t, off_t)
ON_FILE(int, fsync, "sync", 1, (int fd), (fd), -1, int)
ON_FILE(int, fdatasync, "sync", 1, (int fd), (fd), -1, int)
ON_FILE(int, ftruncate, "truncate", 1, (int fd, off_t size), (fd, size), -1, int, off_t)
ON_FILE(int, ftruncate64, "truncate", 1, (int fd, off_t size), (fd, size), -1, int, off_t)
ON_FILE(int, posix_fallocate, "truncate", 1, (int fd, off_t from, off_t size), (fd, from, size), code, int, off_t, off_t)
ON_FILE(DIR *, fdopendir, "list", 0, (int fd), (fd), NULL, int)
void *mmap(void *place, size_t size, int access, int flags, int fd, off_t from) {
    REAL(void *, mmap, void *, size_t, int, int, int, off_t);
    if (mine(fd)) {
        NAMED(fd);
        if (step("map", named, 0)) return MAP_FAILED;
    }
    return real(place, size, access, flags, fd, from);
}
void *mmap64(void *place, size_t size, int access, int flags, int fd, off_t from) { return mmap(place, size, access, flags, fd, from); }

#define ON_PATH(type, name, what, writes, before, after, folder, path, failed, ...)    \
    type name before {                                                                 \
        REAL(type, name, __VA_ARGS__);                                                 \
        if (inside(folder, path) && step(what, path, writes)) return failed;           \
        return real after;                                                             \
    }
ON_PATH(int, rename, "rename", 1, (const char *from, const char *to), (from, to), AT_FDCWD, to, -1, const char *, const char *)
ON_PATH(int, renameat, "rename", 1, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to, -1, int, const char *, int, const char *)
ON_PATH(int, renameat2, "rename", 1, (int a, const char *from, int b, const char *to, unsigned f), (a, from, b, to, f), b, to, -1, int, const char *, int, const char *, unsigned)
ON_PATH(int, link, "link", 1, (const char *from, const char *to), (from, to), AT_FDCWD, to, -1, const char *, const char *)
ON_PATH(int, linkat, "link", 1, (int a, const char *from, int b, const char *to, int f), (a, from, b, to, f), b, to, -1, int, const char *, int, const char *, int)
ON_PATH(int, unlink, "remove", 0, (const char *path), (path), AT_FDCWD, path, -1, const char *)
ON_PATH(int, unlinkat, "remove", 0, (int folder, const char *path, int f), (folder, path, f), folder, path, -1, int, const char *, int)
ON_PATH(int, rmdir, "remove", 0, (const char *path), (path), AT_FDCWD, path, -1, const char *)
ON_PATH(int, mkdir, "mkdir", 1, (const char *path, mode_t bits), (path, bits), AT_FDCWD, path, -1, const char *, mode_t)
ON_PATH(int, mkdirat, "mkdir", 1, (int folder, const char *path, mode_t bits), (folder, path, bits), folder, path, -1, int, const char *, mode_t)
ON_PATH(int, chmod, "chmod", 1, (const char *path, mode_t bits), (path, bits), AT_FDCWD, path, -1, const char *, mode_t)
ON_PATH(int, fchmodat, "chmod", 1, (int folder, const char *path, mode_t bits, int f), (folder, path, bits, f), folder, path, -1, int, const char *, mode_t, int)
ON_PATH(int, truncate64, "truncate", 1, (const char *path, off_t size), (path, size), AT_FDCWD, path, -1, const char *, off_t)
ON_PATH(DIR *, opendir, "list", 0, (const char *path), (path), AT_FDCWD, path, NULL, const char *)
