/* Preloaded under a writer: journals what reaches the operating system, and can run out of space.

   SHIM_TARGET   files whose path contains this text are watched
   SHIM_JOURNAL  events are appended here: u8 kind, u64 a, u64 b, then b bytes for kind W
                   O file created or opened     W bytes b at offset a     T truncated to a     F file synced
                   D its directory synced       A the writer process acknowledged step a (a write of 8 bytes to fd SHIM_ACK)
   shim_set_space(n): bytes that watched files may still take; the write that passes it is cut short, the next gets
   ENOSPC; negative: no limit
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FDS = 4096 };
static char watched[FDS]; /* 'f' target file, 'd' directory */
static int journal = -1, ack = -1;
static long long space = -1;

void shim_set_space(long long bytes) { space = bytes; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void setup(void) {
  if (journal >= 0 || !getenv("SHIM_JOURNAL")) return;
  journal = REAL(open)(getenv("SHIM_JOURNAL"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (getenv("SHIM_ACK")) ack = atoi(getenv("SHIM_ACK"));
}

static void note(char kind, uint64_t a, uint64_t b, const void* data) {
  char head[17];
  head[0] = kind;
  memcpy(head + 1, &a, 8);
  memcpy(head + 9, &b, 8);
  struct iovec parts[2] = {{head, 17}, {(void*)data, kind == 'W' ? b : 0}};
  if (journal >= 0 && REAL(writev)(journal, parts, 2) < 17) abort();
}

static int opened(int fd, const char* path) {
  setup();
  if (fd < 0 || fd >= FDS) return fd;
  watched[fd] = 0;
  const char* target = getenv("SHIM_TARGET");
  struct stat info;
  if (!target || fstat(fd, &info)) return fd;
  if (S_ISDIR(info.st_mode)) watched[fd] = 'd';
  else if (strstr(path, target)) watched[fd] = 'f', note('O', 0, 0, NULL);
  return fd;
}

#define OPEN(name, signature, call)                        \
  int name signature {                                     \
    mode_t mode = 0;                                       \
    if (flags & (O_CREAT | O_TMPFILE)) {                   \
      va_list more;                                        \
      va_start(more, flags);                               \
      mode = va_arg(more, mode_t);                         \
      va_end(more);                                        \
    }                                                      \
    return opened(REAL(name) call, path);                  \
  }
OPEN(open, (const char* path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char* path, int flags, ...), (path, flags, mode))
OPEN(openat, (int dir, const char* path, int flags, ...), (dir, path, flags, mode))
OPEN(openat64, (int dir, const char* path, int flags, ...), (dir, path, flags, mode))

static int is(int fd, char kind) { return fd >= 0 && fd < FDS && watched[fd] == kind; }

static ssize_t put(int fd, const struct iovec* parts, int count, off_t at, int positioned) {
  setup();
  size_t want = 0;
  for (int i = 0; i < count; ++i) want += parts[i].iov_len;
  if (fd == ack && ack >= 0 && want == 8) {
    uint64_t step;
    memcpy(&step, parts[0].iov_base, 8);
    note('A', step, 0, NULL);
    return 8;
  }
  if (!is(fd, 'f')) return positioned ? REAL(pwritev)(fd, parts, count, at) : REAL(writev)(fd, parts, count);
  size_t take = want;
  if (space >= 0 && (long long)want > space) {
    if (space == 0 && want) return errno = ENOSPC, -1;
    take = (size_t)space;
  }
  char* joined = malloc(take + 1);
  size_t filled = 0;
  for (int i = 0; i < count && filled < take; ++i) {
    size_t part = parts[i].iov_len < take - filled ? parts[i].iov_len : take - filled;
    memcpy(joined + filled, parts[i].iov_base, part);
    filled += part;
  }
  off_t where = positioned ? at : (fcntl(fd, F_GETFL) & O_APPEND) ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
  ssize_t done = positioned ? REAL(pwrite)(fd, joined, take, at) : REAL(write)(fd, joined, take);
  if (done > 0) {
    note('W', (uint64_t)where, (uint64_t)done, joined);
    if (space >= 0) space -= done;
  }
  free(joined);
  return done;
}

static ssize_t put_one(int fd, const void* data, size_t size, off_t at, int positioned) {
  struct iovec part = {(void*)data, size};
  if (!is(fd, 'f') && fd != ack) return positioned ? REAL(pwrite)(fd, data, size, at) : REAL(write)(fd, data, size);
  return put(fd, &part, 1, at, positioned);
}

ssize_t write(int fd, const void* data, size_t size) { return put_one(fd, data, size, 0, 0); }
ssize_t pwrite(int fd, const void* data, size_t size, off_t at) { return put_one(fd, data, size, at, 1); }
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) { return put_one(fd, data, size, at, 1); }
ssize_t writev(int fd, const struct iovec* parts, int count) { return put(fd, parts, count, 0, 0); }
ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t at) { return put(fd, parts, count, at, 1); }
ssize_t pwritev64(int fd, const struct iovec* parts, int count, off64_t at) { return put(fd, parts, count, at, 1); }

static int synced(int fd, int result) {
  if (result == 0 && is(fd, 'f')) note('F', 0, 0, NULL);
  if (result == 0 && is(fd, 'd')) note('D', 0, 0, NULL);
  return result;
}
int fsync(int fd) { return synced(fd, REAL(fsync)(fd)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)(fd)); }

static int truncated(int fd, off_t size, int result) {
  if (result == 0 && is(fd, 'f')) note('T', (uint64_t)size, 0, NULL);
  return result;
}
int ftruncate(int fd, off_t size) { return truncated(fd, size, REAL(ftruncate)(fd, size)); }
int ftruncate64(int fd, off64_t size) { return truncated(fd, size, REAL(ftruncate64)(fd, size)); }
