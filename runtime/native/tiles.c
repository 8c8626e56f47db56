/* Repacked weights kept in a file beside the bundle, so that the next opening only reads them.
 *
 * The file is 256 bytes of header, then the arena. The header names the layout's version, the size, a key that the
 * caller makes of everything the tiles follow from (the hash of the weights, the table of tensors, the configuration),
 * and a checksum of the arena: another model's file, an older layout's or a damaged one is packed anew. That holds
 * against accidents and mixed-up files, not against someone who forges a file, for whom changing the bundle is as easy.
 *
 * Nothing but a regular file is opened: a link is not followed, a FIFO or device neither read nor replaced. A writer
 * fills NAME.partial under its lock and renames it, so that readers see whole files; a second writer goes without, and
 * what a killed one left is filled by the next. Where the file cannot be written, nothing is kept.
 */
#define _GNU_SOURCE
#include "core.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEADER 256
#define PIECE (1 << 20)   /* bytes read, and summed while they are in the cache */

static void add_to_sum(uint64_t sum[8], const uint8_t *p, size_t bytes) {    /* bytes: a multiple of 64 */
    for (size_t i = 0; i < bytes; i += 64)
        for (int lane = 0; lane < 8; lane++) {
            uint64_t word;
            memcpy(&word, p + i + 8 * lane, 8);
            word = (sum[lane] ^ word) * 0x9e3779b97f4a7c15;
            sum[lane] = word << 29 | word >> 35;
        }
}

static void write_header(char header[HEADER], const char *key, size_t bytes, const uint64_t sum[8]) {
    memset(header, 0, HEADER);
    int n = snprintf(header, HEADER, "edgewright tiles %d, %zu bytes, %.64s, ", EW_TILES_VERSION, bytes, key);
    for (int lane = 0; lane < 8; lane++)
        n += snprintf(header + n, HEADER - n, "%08x", (uint32_t)(sum[lane] ^ sum[lane] >> 32));
}

static int open_regular(const char *path, int flags, struct stat *info) {
    int fd = open(path, flags | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0666);
    if (fd < 0 || (!fstat(fd, info) && S_ISREG(info->st_mode))) return fd;
    close(fd);
    return -1;
}

int tiles_read(const char *path, const char *key, uint8_t *arena, size_t bytes) {
    char found[HEADER], expected[HEADER];
    uint64_t sum[8] = {0};
    struct stat info;
    int fd = open_regular(path, O_RDONLY, &info);
    if (fd < 0) return 0;
    int whole = (size_t)info.st_size == HEADER + bytes && read(fd, found, HEADER) == HEADER;
    for (size_t done = 0; whole && done < bytes;) {
        size_t wanted = bytes - done < PIECE ? bytes - done : PIECE, n = 0;
        for (ssize_t got = 1; got > 0 && n < wanted; n += got > 0 ? got : 0)
            got = read(fd, arena + done + n, wanted - n);
        whole = n == wanted;
        add_to_sum(sum, arena + done, n / 64 * 64);
        done += n;
    }
    close(fd);
    write_header(expected, key, bytes, sum);
    return whole && !memcmp(found, expected, HEADER);
}

static int write_all(int fd, const void *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = write(fd, (const char *)data + done, bytes - done);
        if (n <= 0 && !(n < 0 && errno == EINTR)) return -1;
        done += n > 0 ? n : 0;
    }
    return 0;
}

void tiles_write(const char *path, const char *key, const uint8_t *arena, size_t bytes) {
    char header[HEADER], partial[4096];
    uint64_t sum[8] = {0};
    struct stat info, there;
    if (snprintf(partial, sizeof partial, "%s.partial", path) >= (int)sizeof partial) return;
    if (!lstat(path, &there) && !S_ISREG(there.st_mode)) return;
    int fd = open_regular(partial, O_RDWR | O_CREAT, &info);
    if (fd < 0) return;
    if (!flock(fd, LOCK_EX | LOCK_NB) && !lstat(partial, &there) && there.st_ino == info.st_ino
        && there.st_dev == info.st_dev && there.st_nlink == 1) {     /* not what another writer has just renamed */
        add_to_sum(sum, arena, bytes);
        write_header(header, key, bytes, sum);
        if (ftruncate(fd, 0) || write_all(fd, header, HEADER) || write_all(fd, arena, bytes) || rename(partial, path))
            unlink(partial);
    }
    close(fd);
}
