/* Opening a weights file: every tensor of the table is checked against the file and the configuration before anything
 * is allocated, then repacked by all threads into one arena. The file stays as it is and is closed afterwards.
 */
#define _GNU_SOURCE
#include "core.h"
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { matrix *to; source from; const ew_tensor *tensor; } packing;

typedef struct {
    ew_model *model;
    const ew_tensor *table;                          /* [tensors] */
    int tensors, jobs, packed, bad;                  /* packed: the arena is; bad: 1 + a job of no finite numbers */
    uint8_t *file;                                   /* [file_bytes], mapped */
    size_t file_bytes, arena_bytes;
    packing *job;                                    /* [jobs], of 7 * layers + 3 at most */
    char *error;                                     /* [256]; the first sentence stays */
} opening;

static int fail(opening *o, const char *format, ...) {
    va_list list;
    va_start(list, format);
    if (!o->error[0]) vsnprintf(o->error, 256, format, list);
    va_end(list);
    return -1;
}

void *keep(ew_model *m, size_t bytes) {
    void **p = calloc(1, bytes + 128);
    if (!p) return NULL;
    *p = m->kept, m->kept = p;
    return (char *)p + 64;
}

/* The tensor called prefix + suffix, or NULL. */
static const ew_tensor *find(const opening *o, const char *prefix, const char *suffix) {
    size_t n = strlen(prefix);
    for (int i = 0; i < o->tensors; i++)
        if (!strncmp(o->table[i].name, prefix, n) && !strcmp(o->table[i].name + n, suffix)) return &o->table[i];
    return NULL;
}

static int has_linear(const opening *o, const char *name) {
    return find(o, name, ".codes") || find(o, name, ".weight");
}

static int float_kind(int dtype) {
    return dtype == EW_FLOAT32 ? KIND_F32 : dtype == EW_FLOAT16 ? KIND_F16 : KIND_BF16;
}

static int check_table(opening *o) {
    for (int i = 0; i < o->tensors; i++) {
        const ew_tensor *t = &o->table[i];
        const int64_t rows = t->shape[0], columns = t->shape[1], most = 1 << 28;
        const int bits = dtype_bits(t->dtype);
        if (!bits || t->dims < 1 || t->dims > 2 || rows < 1 || columns < 1 || rows > most || columns > most)
            return fail(o, "tensor %.80s has a type or shape that the native core does not have", t->name);
        int64_t bytes = is_stream(t->dtype) ? rows * ((columns * bits + 7) / 8) : (rows * columns * bits + 7) / 8;
        if (t->bytes != bytes)
            return fail(o, "tensor %.80s takes %lld bytes in the table, its shape %lld", t->name, (long long)t->bytes,
                        (long long)bytes);
        if (t->offset < 0 || t->offset % (bits >= 8 ? bits / 8 : 1) || (uint64_t)t->offset + t->bytes > o->file_bytes)
            return fail(o, "tensor %.80s lies beyond the end of the weights file (%zu bytes) or is not aligned",
                        t->name, o->file_bytes);
    }
    return 0;
}

/* A vector [n] or table (at least [n][columns]) of floats, kept as float32 [n][columns]. Absent: NULL if `optional`. */
static int floats(opening *o, float **to, const char *prefix, const char *suffix, int64_t n, int64_t columns,
                  int optional) {
    const ew_tensor *t = find(o, prefix, suffix);
    *to = NULL;
    if (!t) return optional ? 0 : fail(o, "tensor %.80s%s is missing", prefix, suffix);
    if (t->dtype > EW_BFLOAT16 || t->shape[0] < n || t->shape[1] != columns || (columns == 1 && t->shape[0] != n))
        return fail(o, "tensor %.80s should hold %lld x %lld floats", t->name, (long long)n, (long long)columns);
    if (!(*to = keep(o->model, n * columns * sizeof(float)))) return fail(o, EW_LACK "out of memory");
    if (t->dtype == EW_FLOAT32) memcpy(*to, o->file + t->offset, n * columns * sizeof(float));
    else for (int64_t i = 0; i < n * columns; i++) (*to)[i] = float_at(o->file + t->offset, float_kind(t->dtype), i);
    for (int64_t i = 0; i < n * columns; i++)
        if (!isfinite((*to)[i])) return fail(o, "tensor %.80s holds a value that is not a finite number", t->name);
    return 0;
}

/* Rows row0 .. row0 + rows of a linear (or table, by_input 0) of `total` rows become a matrix. */
static int plan(opening *o, matrix *m, const char *name, int rows, int inputs, int row0, int total, int by_input) {
    const ew_tensor *codes = find(o, name, ".codes"), *zeros = find(o, name, ".zeros");
    const ew_tensor *t = codes ? codes : find(o, name, ".weight");
    if (!t) return fail(o, "tensor %.80s.weight or .codes is missing", name);
    source s = {.codes = o->file + t->offset, .dtype = t->dtype, .by_input = by_input, .stride = total, .row0 = row0};
    if (codes && is_stream(t->dtype)) s.by_input = 0;
    if (t->dims != 2 || t->shape[!s.by_input] != inputs || t->shape[s.by_input] != total)
        return fail(o, "tensor %.80s has shape [%lld, %lld] where the model needs %d inputs and %d outputs", t->name,
                    (long long)t->shape[0], (long long)t->shape[1], inputs, total);
    int kind = dtype_bits(t->dtype), group = 0;
    if (!codes) {
        if (t->dtype > EW_BFLOAT16) return fail(o, "tensor %.80s should be float32, float16 or bfloat16", t->name);
        kind = float_kind(t->dtype);
    } else {
        const ew_tensor *scales = find(o, name, ".scales");
        if (kind > 8) return fail(o, "tensor %.80s should hold integer codes", t->name);
        if (!scales || scales->dtype != EW_FLOAT16)
            return fail(o, "tensor %.80s.scales is missing or not float16", name);
        const int64_t across = scales->shape[scales->dims == 1 ? 0 : s.by_input];
        const int64_t groups = scales->dims == 1 ? 1 : scales->shape[!s.by_input];
        if (across != total || inputs % groups)
            return fail(o, "tensor %.80s does not have one scale for every output and group", scales->name);
        group = groups > 1 ? inputs / groups : 0;
        if (group % BLOCK)
            return fail(o, EW_LACK "tensor %.80s has groups of %d; the native core has multiples of 32, and one per "
                        "output", name, group);
        s.scales = (const uint16_t *)(o->file + scales->offset);
        if (zeros) {
            if (zeros->dtype != (is_stream(t->dtype) ? EW_UINT8 : t->dtype) || zeros->dims != scales->dims ||
                zeros->shape[0] != scales->shape[0] || zeros->shape[1] != scales->shape[1])
                return fail(o, "tensor %.80s does not match its scales and codes", zeros->name);
            s.zeros = o->file + zeros->offset;
        } else if (t->dtype == EW_UINT4 || t->dtype == EW_UINT8)
            return fail(o, "unsigned tensor %.80s has no zero points", t->name);
    }
    o->arena_bytes += matrix_shape(m, rows, inputs, kind, group, zeros != NULL);
    if (m->blocks * BLOCK > o->model->widest) o->model->widest = m->blocks * BLOCK;
    if (floats(o, &m->bias, name, ".bias", total, 1, 1)) return -1;
    if (m->bias) m->bias += row0;
    o->job[o->jobs++] = (packing){m, s, t};
    return 0;
}

static int plan_layer(opening *o, int number) {
    const ew_config *c = &o->model->config;
    layer *l = &o->model->layers[number];
    const int dim = c->head_dim, q = l->heads * dim, kv = l->kv_heads * dim, all = q + 2 * kv;
    const struct { matrix *m; const char *own, *fused; int rows, inputs, row0, total; } linear[] = {
        {&l->q, "q", "qkv", q, c->hidden, 0, all},
        {&l->k, "k", "qkv", kv, c->hidden, q, all},
        {&l->v, "v", "qkv", kv, c->hidden, q + kv, all},
        {&l->o, "o", NULL, c->hidden, q, 0, c->hidden},
        {&l->gate, "gate", "gate_up", l->mlp, c->hidden, 0, 2 * l->mlp},
        {&l->up, "up", "gate_up", l->mlp, c->hidden, l->mlp, 2 * l->mlp},
        {&l->down, "down", NULL, c->hidden, l->mlp, 0, c->hidden}};
    char name[64];
    for (int i = 0; i < 7; i++) {
        snprintf(name, sizeof name, "layers.%d.%s", number, linear[i].own);
        int row0 = 0, total = linear[i].rows;
        if (linear[i].fused && !has_linear(o, name)) {
            snprintf(name, sizeof name, "layers.%d.%s", number, linear[i].fused);
            row0 = linear[i].row0, total = linear[i].total;
            if (linear[i].m == &l->gate && !has_linear(o, name)) continue;       /* a plain MLP */
        }
        if (plan(o, linear[i].m, name, linear[i].rows, linear[i].inputs, row0, total, 1)) return -1;
    }
    snprintf(name, sizeof name, "layers.%d.", number);
    return floats(o, &l->attn_norm, name, "attn_norm.weight", c->hidden, 1, 0)
        || floats(o, &l->attn_norm_bias, name, "attn_norm.bias", c->hidden, 1, 1)
        || floats(o, &l->mlp_norm, name, "mlp_norm.weight", c->hidden, 1, 0)
        || floats(o, &l->mlp_norm_bias, name, "mlp_norm.bias", c->hidden, 1, 1)
        || floats(o, &l->q_norm, name, "q_norm.weight", dim, 1, !c->qk_norm)
        || floats(o, &l->k_norm, name, "k_norm.weight", dim, 1, !c->qk_norm) ? -1 : 0;
}

static int plan_model(opening *o) {
    ew_model *m = o->model;
    ew_config *c = &m->config;
    if (plan(o, &m->embed, "embed", c->vocab, c->hidden, 0, c->vocab, 0)) return -1;
    m->head_matrix = has_linear(o, "head") ? &m->head : &m->embed;
    if (m->head_matrix == &m->head && plan(o, &m->head, "head", c->vocab, c->hidden, 0, c->vocab, 1)) return -1;
    if (c->learned_positions) {
        const ew_tensor *t = find(o, "position_embed", ".weight");
        int rows = t ? (int)t->shape[0] : c->max_context;
        if (rows < c->max_context)
            return fail(o, "position_embed.weight has %d positions, the context %d", rows, c->max_context);
        if (plan(o, &m->positions, "position_embed", rows, c->hidden, 0, rows, 0)) return -1;
    } else if (floats(o, &m->cos, "rope.", "cos", c->max_context, c->head_dim / 2, 0) ||
               floats(o, &m->sin, "rope.", "sin", c->max_context, c->head_dim / 2, 0)) return -1;
    if (floats(o, &m->final_norm, "final_norm", ".weight", c->hidden, 1, 0) ||
        floats(o, &m->final_norm_bias, "final_norm", ".bias", c->hidden, 1, 1)) return -1;
    for (int l = 0; l < c->layers; l++) if (plan_layer(o, l)) return -1;
    return 0;
}

/* Every thread packs (or, of tiles read from a file, only checks) its part of each matrix. */
static void pack_work(void *context, int thread, int threads) {
    opening *o = context;
    const size_t page = sysconf(_SC_PAGESIZE);
    for (int i = 0; i < o->jobs; i++) {
        packing *job = &o->job[i];
        const int64_t tiles = job->to->tiles, from = tiles * thread / threads, to = tiles * (thread + 1) / threads;
        for (int64_t t = from; t < to; t++) {
            if (!o->packed) matrix_pack(job->to, &job->from, t);
            if (!matrix_finite(job->to, t)) __atomic_store_n(&o->bad, i + 1, __ATOMIC_RELAXED);
        }
        if (o->packed || (i + 1 < o->jobs && o->job[i + 1].tensor == job->tensor)) continue;
        const size_t start = job->tensor->offset / page * page;  /* pages read would count as this process's memory */
        madvise(o->file + start, job->tensor->offset + job->tensor->bytes - start, MADV_DONTNEED);
    }
}

static int load(opening *o, const char *path, const char *repacked, const char *key) {
    ew_model *m = o->model;
    int fd = open(path, O_RDONLY | O_CLOEXEC), result = -1;
    struct stat info;
    if (fd < 0 || fstat(fd, &info) || info.st_size == 0) {
        if (fd >= 0) close(fd);
        return fail(o, "the weights file %.150s cannot be read", path);
    }
    o->file_bytes = info.st_size;
    o->file = mmap(NULL, o->file_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (o->file == MAP_FAILED) return fail(o, EW_LACK "the weights file %.150s cannot be mapped: out of memory", path);
    if (check_table(o) || plan_model(o)) goto done;
    m->arena_bytes = (o->arena_bytes + (2 << 20) - 1) >> 21 << 21;
    m->arena = mmap(NULL, m->arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m->arena == MAP_FAILED) {
        m->arena = NULL;
        fail(o, EW_LACK "out of memory: repacking the weights takes %zu MB", m->arena_bytes >> 20);
        goto done;
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
        fail(o, "tensor %.80s holds a value or scale that is not a finite number", o->job[o->bad - 1].tensor->name);
        goto done;
    }
    if (repacked && !o->packed) tiles_write(repacked, key, m->arena, m->arena_bytes);
    result = 0;
done:
    munmap(o->file, o->file_bytes);
    return result;
}

static int within(int value, int low, int high) { return value >= low && value <= high; }

ew_model *ew_open(const char *path, const ew_config *c, const ew_tensor *table, int tensors, int threads, int fp32,
                  const char *isa, const char *repacked, const char *key, char *error) {
    ew_model *m = calloc(1, sizeof *m);
    opening o = {.model = m, .table = table, .tensors = tensors, .error = error};
    error[0] = 0;
    if (!m) { fail(&o, EW_LACK "out of memory"); return NULL; }
    m->config = *c, m->threads = threads, m->fp32 = fp32, m->kernels = choose_kernels(isa);
    int sane = within(c->vocab, 1, 1 << 24) && within(c->hidden, 1, 1 << 18) && within(c->layers, 1, 1 << 12)
            && within(c->head_dim, 1, 1024) && (c->learned_positions || c->head_dim % 2 == 0)
            && within(c->max_context, 1, 1 << 23) && within(c->sliding_window, 0, 1 << 30)
            && within(c->activation, EW_SILU, EW_GELU_TANH) && within(threads, 1, MAX_THREADS) && tensors >= 0;
    for (int l = 0; sane && l < c->layers; l++)
        sane = within(c->kv_heads[l], 1, 1 << 12) && within(c->heads[l], c->kv_heads[l], 1 << 12)
            && c->heads[l] % c->kv_heads[l] == 0 && within(c->mlp[l], 1, 1 << 20);
    if (!m->kernels) fail(&o, "this CPU cannot run the kernels %.40s", isa);
    else if (!sane) fail(&o, EW_LACK "the model's configuration has a value that the native core does not have");
    else if (!(m->layers = keep(m, c->layers * sizeof(layer))) || !(m->pool = pool_new(threads))
             || !(o.job = calloc(7 * (size_t)c->layers + 3, sizeof(packing)))) fail(&o, EW_LACK "out of memory");
    else {
        m->padded_dim = ceil_div(c->head_dim, TILE) * TILE;
        for (int l = 0; l < c->layers; l++) {
            layer *y = &m->layers[l];
            y->heads = c->heads[l], y->kv_heads = c->kv_heads[l], y->mlp = c->mlp[l];
            if (y->heads / y->kv_heads > m->most_queries) m->most_queries = y->heads / y->kv_heads;
            int widest = ceil_div(y->heads * c->head_dim, BLOCK) * BLOCK;
            if (widest > m->widest) m->widest = widest;
        }
        if (!load(&o, path, repacked, key) && scratch_new(m)) fail(&o, EW_LACK "out of memory");
    }
    m->config.heads = m->config.kv_heads = m->config.mlp = NULL;
    free(o.job);
    if (error[0]) { ew_close(m); return NULL; }
    return m;
}

void ew_close(ew_model *m) {
    if (!m) return;
    pool_free(m->pool);
    scratch_free(m);
    if (m->arena) munmap(m->arena, m->arena_bytes);
    for (void **p = m->kept, **next; p; p = next) { next = *p; free(p); }
    free(m);
}

const char *ew_isa(const ew_model *m) { return (m ? m->kernels : choose_kernels(NULL))->name; }
