/* Opening a weights file: once the plan is made, all threads repack its matrices into one arena. The file stays as it
 * is, and is closed afterwards, but for a table whose rows are read from it as tokens come.
 */
#define _GNU_SOURCE
#include "tensors.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { RELEASE = 4 << 20 };                          /* bytes that a thread packs before it lets the file's pages go */

/* Every thread packs (or, of tiles read from a file, only checks) its part of each matrix. Pages of the file that were
 * read would count as this process's memory; those that another thread still reads come back from the page cache. */
static void pack_work(void *context, int thread, int threads) {
    opening *o = context;
    size_t packed = 0;
    for (int i = 0; i < o->jobs; i++) {
        const packing *job = &o->job[i];
        const int64_t tiles = job->to->tiles, from = tiles * thread / threads, to = tiles * (thread + 1) / threads;
        for (int64_t t = from; t < to; t++) {
            if (!o->packed) matrix_pack(job->to, &job->from, t);
            if (!matrix_sound(job->to, t)) __atomic_store_n(&o->bad, i + 1, __ATOMIC_RELAXED);
            if (o->packed || (packed += job->to->tile_bytes) < RELEASE) continue;
            madvise(o->model->file, o->model->file_bytes, MADV_DONTNEED);
            packed = 0;
        }
    }
}

static void unmap(ew_model *m) {
    if (m->file) munmap(m->file, m->file_bytes);
    m->file = NULL;
}

static int load(opening *o, const char *path, const char *repacked, const char *key) {
    ew_model *m = o->model;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) || info.st_size == 0) {
        if (fd >= 0) close(fd);
        return fail(o, "the weights file %.150s cannot be read", path);
    }
    m->file_bytes = info.st_size;
    m->file = mmap(NULL, m->file_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (m->file == MAP_FAILED) {
        m->file = NULL;
        return fail(o, EW_LACK "the weights file %.150s cannot be mapped: out of memory", path);
    }
    if (plan_model(o)) return -1;
    m->arena_bytes = (o->arena_bytes + (2 << 20) - 1) >> 21 << 21;
    m->arena = mmap(NULL, m->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m->arena == MAP_FAILED) {
        m->arena = NULL;
        return fail(o, EW_LACK "out of memory: repacking the weights takes %zu MB", m->arena_bytes >> 20);
    }
#ifdef MADV_HUGEPAGE
    madvise(m->arena, m->arena_bytes, MADV_HUGEPAGE);        /* fewer misses of the TLB */
#endif
    size_t at = 0;
    for (int i = 0; i < o->jobs; i++) {
        matrix *to = o->job[i].to;
        to->data = m->arena + at;
        at += to->tile_bytes * to->tiles;
    }
    o->packed = repacked && tiles_read(repacked, key, m->arena, m->arena_bytes);
    if (repacked && !o->packed) memset(m->arena + at, 0, m->arena_bytes - at);   /* what a refused file left there */
    pool_run(m->pool, pack_work, o);
    if (o->bad) {
        const packing *job = &o->job[o->bad - 1];
        return fail(o, "tensor %.80s holds a %s", job->from.tensor->name,
                    job->to->narrow ? "scale of 0 or -128, or one of a row that is not a positive finite number"
                                    : "value or scale that is not a finite number");
    }
    if (repacked && !o->packed) tiles_write(repacked, key, m->arena, m->arena_bytes);
    if (m->per_layer_embed.rows) madvise(m->file, m->file_bytes, MADV_RANDOM);
    else unmap(m);
    return 0;
}

ew_model *ew_open(const char *path, const ew_config *c, const ew_tensor *table, int tensors, int threads, int fp32,
                  const char *isa, const char *repacked, const char *key, char *error) {
    ew_model *m = calloc(1, sizeof *m);
    opening o = {.model = m, .table = table, .tensors = tensors, .error = error};
    error[0] = 0;
    if (!m) { fail(&o, EW_LACK "out of memory"); return NULL; }
    m->threads = threads, m->fp32 = fp32, m->kernels = choose_kernels(isa);
    if (!m->kernels) fail(&o, "this CPU cannot run the kernels %.40s", isa);
    else if (threads < 1 || threads > MAX_THREADS) fail(&o, EW_LACK "%d threads; the native core has 1 to 64", threads);
    else if (!check_config(&o, c) && !(m->pool = pool_new(threads))) fail(&o, EW_LACK "out of memory");
    if (!error[0] && !load(&o, path, repacked, key) && scratch_new(m)) fail(&o, EW_LACK "out of memory");
    free(o.job);
    if (error[0]) { ew_close(m); return NULL; }
    return m;
}

void ew_close(ew_model *m) {
    if (!m) return;
    pool_free(m->pool);
    scratch_free(m);
    unmap(m);
    if (m->arena) munmap(m->arena, m->arena_bytes);
    for (void **p = m->kept, **next; p; p = next) { next = *p; free(p); }
    free(m);
}

const char *ew_isa(const ew_model *m) { return (m ? m->kernels : choose_kernels(NULL))->name; }
int64_t ew_state_floats(const ew_model *m) { return m->state_floats; }
