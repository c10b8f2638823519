/* Preloaded: fails chosen calls on files below a folder, in all processes that share a control file.

   IO_FAULTS names the control file, a `struct control` that every process maps. The call number
   `nth` of kind `kind` (counted from 1 over all processes) fails with `error`; with `persistent`
   so do all later ones of that kind. kind = NONE only counts. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { OPEN, CREATE, READ, WRITE, FSYNC, RENAME, UNLINK, MKDIR, LIST, NUM_KINDS, NONE = -1 };

struct control {
    char root[1024];
    int kind, nth, error, persistent;
    atomic_int counts[NUM_KINDS];
    atomic_int injected;
    char first[1024]; /* path of the first call that failed */
};

static struct control *control;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("IO_FAULTS");
    if (!path) return;
    int fd = REAL(open)(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) control = map;
}

static int is_below(const char *path) {
    size_t length = strlen(control->root);
    return length && !strncmp(path, control->root, length) && (path[length] == '/' || !path[length]);
}

/* Whether the call is to fail; errno is set then. */
static int fails(int kind, const char *path) {
    if (!control || !path || !control->root[0]) return 0;
    char full[PATH_MAX];
    if (path[0] != '/') {
        if (!getcwd(full, sizeof full)) return 0;
        size_t length = strlen(full);
        snprintf(full + length, sizeof full - length, "/%s", path);
        path = full;
    }
    if (!is_below(path)) return 0;
    int number = atomic_fetch_add(&control->counts[kind], 1) + 1;
    if (kind != control->kind) return 0;
    if (number != control->nth && !(control->persistent && number > control->nth)) return 0;
    if (atomic_fetch_add(&control->injected, 1) == 0)
        snprintf(control->first, sizeof control->first, "%.1023s", path);
    errno = control->error;
    return 1;
}

static int fd_fails(int kind, int fd) {
    if (!control || !control->root[0]) return 0;
    char link[64], path[PATH_MAX];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(kind, path);
}

static int open_kind(int flags) { return flags & O_CREAT ? CREATE : OPEN; }

#define MODE(flags)                                                        \
    mode_t mode = 0;                                                       \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                 \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        mode = va_arg(rest, mode_t);                                       \
        va_end(rest);                                                      \
    }

int open(const char *path, int flags, ...) {
    MODE(flags)
    return fails(open_kind(flags), path) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return fails(open_kind(flags), path) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
    MODE(flags)
    if (dir == AT_FDCWD || path[0] == '/' ? fails(open_kind(flags), path)
                                          : fd_fails(open_kind(flags), dir))
        return -1;
    return REAL(openat)(dir, path, flags, mode);
}
ssize_t read(int fd, void *buffer, size_t size) {
    return fd_fails(READ, fd) ? -1 : REAL(read)(fd, buffer, size);
}
ssize_t pread(int fd, void *buffer, size_t size, off_t at) {
    return fd_fails(READ, fd) ? -1 : REAL(pread)(fd, buffer, size, at);
}
ssize_t pread64(int fd, void *buffer, size_t size, off64_t at) {
    return fd_fails(READ, fd) ? -1 : REAL(pread64)(fd, buffer, size, at);
}
ssize_t write(int fd, const void *buffer, size_t size) {
    return fd_fails(WRITE, fd) ? -1 : REAL(write)(fd, buffer, size);
}
ssize_t pwrite(int fd, const void *buffer, size_t size, off_t at) {
    return fd_fails(WRITE, fd) ? -1 : REAL(pwrite)(fd, buffer, size, at);
}
ssize_t pwrite64(int fd, const void *buffer, size_t size, off64_t at) {
    return fd_fails(WRITE, fd) ? -1 : REAL(pwrite64)(fd, buffer, size, at);
}
int fsync(int fd) { return fd_fails(FSYNC, fd) ? -1 : REAL(fsync)(fd); }
int rename(const char *from, const char *to) {
    return fails(RENAME, from) ? -1 : REAL(rename)(from, to);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return fails(RENAME, from) ? -1 : REAL(renameat)(from_dir, from, to_dir, to);
}
int unlink(const char *path) { return fails(UNLINK, path) ? -1 : REAL(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) {
    if (dir == AT_FDCWD ? fails(UNLINK, path) : fd_fails(UNLINK, dir)) return -1;
    return REAL(unlinkat)(dir, path, flags);
}
int rmdir(const char *path) { return fails(UNLINK, path) ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) {
    return fails(MKDIR, path) ? -1 : REAL(mkdir)(path, mode);
}
DIR *opendir(const char *path) { return fails(LIST, path) ? NULL : REAL(opendir)(path); }
DIR *fdopendir(int fd) { return fd_fails(LIST, fd) ? NULL : REAL(fdopendir)(fd); }
