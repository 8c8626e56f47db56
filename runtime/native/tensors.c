/* The table of tensors of a weights file: every one is checked against the file and its shape against what is asked,
 * before anything large is allocated. Vectors are read; matrices become jobs of matrix_pack().
 */
#include "tensors.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

int fail(opening *o, const char *format, ...) {
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

void *keep_or_fail(opening *o, size_t bytes) {
    void *p = keep(o->model, bytes);
    if (!p) fail(o, EW_LACK "out of memory");
    return p;
}

/* The slot of a name: where 1 + its index stands, or 0 if it has none yet. */
static int *slot_of(const opening *o, const char *name) {
    uint32_t i = 2166136261u;                        /* FNV-1a */
    for (const char *c = name; *c; c++) i = (i ^ (uint8_t)*c) * 16777619u;
    for (;; i++) {
        int *slot = &o->slots[i & (o->slot_count - 1)];
        if (!*slot || !strcmp(o->table[*slot - 1].name, name)) return slot;
    }
}

const ew_tensor *find(const opening *o, const char *prefix, const char *suffix) {
    char name[128];
    if (snprintf(name, sizeof name, "%s%s", prefix, suffix) >= (int)sizeof name) return NULL;
    const int slot = *slot_of(o, name);
    return slot ? &o->table[slot - 1] : NULL;
}

int has_linear(const opening *o, const char *name) {
    return find(o, name, ".codes") || find(o, name, ".weight");
}

static int float_kind(int dtype) {
    return dtype == EW_FLOAT32 ? KIND_F32 : dtype == EW_FLOAT16 ? KIND_F16 : KIND_BF16;
}

int check_table(opening *o) {
    const size_t file_bytes = o->model->file_bytes;
    for (o->slot_count = 16; o->slot_count < 2 * o->tensors;) o->slot_count *= 2;
    if (!(o->slots = keep_or_fail(o, o->slot_count * sizeof(int)))) return -1;
    for (int i = o->tensors - 1; i >= 0; i--) {      /* of two with one name, the first is found */
        const ew_tensor *t = &o->table[i];
        const int64_t rows = t->shape[0], columns = t->shape[1], most = 1 << 28;
        const int bits = dtype_bits(t->dtype);
        if (!bits || t->dims < 1 || t->dims > 2 || rows < 1 || columns < 1 || rows > most || columns > most)
            return fail(o, "tensor %.80s has a type or shape that the native core does not have", t->name);
        int64_t bytes = is_stream(t->dtype) ? rows * ((columns * bits + 7) / 8) : (rows * columns * bits + 7) / 8;
        if (t->bytes != bytes)
            return fail(o, "tensor %.80s takes %lld bytes in the table, its shape %lld", t->name, (long long)t->bytes,
                        (long long)bytes);
        if (t->offset < 0 || t->offset % (bits >= 8 ? bits / 8 : 1) || (uint64_t)t->offset + t->bytes > file_bytes)
            return fail(o, "tensor %.80s lies beyond the end of the weights file (%zu bytes) or is not aligned",
                        t->name, file_bytes);
        *slot_of(o, t->name) = i + 1;
    }
    return 0;
}

int floats(opening *o, float **to, const char *prefix, const char *suffix, int64_t n, int64_t columns,
                  int optional) {
    const ew_tensor *t = find(o, prefix, suffix);
    *to = NULL;
    if (!t) return optional ? 0 : fail(o, "tensor %.80s%s is missing", prefix, suffix);
    if (t->dtype > EW_BFLOAT16 || t->shape[0] < n || t->shape[1] != columns || (columns == 1 && t->shape[0] != n))
        return fail(o, "tensor %.80s should hold %lld x %lld floats", t->name, (long long)n, (long long)columns);
    if (!(*to = keep_or_fail(o, n * columns * sizeof(float)))) return -1;
    const uint8_t *from = o->model->file + t->offset;
    if (t->dtype == EW_FLOAT32) memcpy(*to, from, n * columns * sizeof(float));
    else for (int64_t i = 0; i < n * columns; i++) (*to)[i] = float_at(from, float_kind(t->dtype), i);
    for (int64_t i = 0; i < n * columns; i++)
        if (!isfinite((*to)[i])) return fail(o, "tensor %.80s holds a value that is not a finite number", t->name);
    return 0;
}

static int of_shape(const ew_tensor *t, int dtype, int64_t rows, int64_t columns) {
    return t && t->dtype == dtype && t->dims == 2 && t->shape[0] == rows && t->shape[1] == columns;
}

int describe(opening *o, matrix *m, source *s, const char *name, int rows, int inputs, int row0, int total,
                    int by_input) {
    const uint8_t *file = o->model->file;
    const ew_tensor *codes = find(o, name, ".codes"), *zeros = find(o, name, ".zeros");
    const ew_tensor *row_scales = find(o, name, ".row_scales"), *levels = find(o, name, ".levels");
    const ew_tensor *t = codes ? codes : find(o, name, ".weight");
    if (!t) return fail(o, "tensor %.80s.weight or .codes is missing", name);
    *s = (source){.codes = file + t->offset, .dtype = t->dtype, .by_input = by_input, .stride = total, .row0 = row0};
    if (codes && is_stream(t->dtype)) s->by_input = 0;
    if (t->dims != 2 || t->shape[!s->by_input] != inputs || t->shape[s->by_input] != total)
        return fail(o, "tensor %.80s has shape [%lld, %lld] where the model needs %d inputs and %d outputs", t->name,
                    (long long)t->shape[0], (long long)t->shape[1], inputs, total);
    int kind = dtype_bits(t->dtype), group = 0, narrow = 0;
    if (!codes) {
        if (t->dtype > EW_BFLOAT16) return fail(o, "tensor %.80s should be float32, float16 or bfloat16", t->name);
        kind = float_kind(t->dtype);
    } else {
        const ew_tensor *scales = find(o, name, ".scales");
        if (kind > 8) return fail(o, "tensor %.80s should hold integer codes", t->name);
        if (!scales || (scales->dtype != EW_FLOAT16 && scales->dtype != EW_INT8))
            return fail(o, "tensor %.80s.scales is missing or neither float16 nor int8", name);
        narrow = scales->dtype == EW_INT8;
        const int64_t across = scales->shape[scales->dims == 1 ? 0 : s->by_input];
        const int64_t groups = scales->dims == 1 ? 1 : scales->shape[!s->by_input];
        if (across != total || inputs % groups)
            return fail(o, "tensor %.80s does not have one scale for every output and group", scales->name);
        group = groups > 1 ? inputs / groups : 0;
        if (group % BLOCK)
            return fail(o, EW_LACK "tensor %.80s has groups of %d; the native core has multiples of 32, and one per "
                        "output", name, group);
        s->scales = file + scales->offset;
        if (narrow && !of_shape(row_scales, EW_FLOAT16, total, 1))
            return fail(o, "tensor %.80s.row_scales is missing or not float16 [%d, 1]", name, total);
        if (narrow) s->row_scales = (const uint16_t *)(file + row_scales->offset);
        if (zeros) {
            if (zeros->dtype != (is_stream(t->dtype) ? EW_UINT8 : t->dtype) || zeros->dims != scales->dims ||
                zeros->shape[0] != scales->shape[0] || zeros->shape[1] != scales->shape[1])
                return fail(o, "tensor %.80s does not match its scales and codes", zeros->name);
            s->zeros = file + zeros->offset;
        }
    }
    s->tensor = t;
    matrix_shape(m, rows, inputs, kind, group, zeros != NULL, narrow);
    if (codes && levels) {
        const int8_t *level = (const int8_t *)(file + levels->offset);
        int rising = kind <= 4 && !zeros && of_shape(levels, EW_INT8, 1, 1 << kind) && level[0] >= -127;
        for (int c = 1; rising && c < 1 << kind; c++) rising = level[c] > level[c - 1];
        if (!rising)
            return fail(o, "tensor %.80s should hold the int8 levels of %d bits, strictly rising from -127 on, without "
                        "zero points", levels->name, kind);
        matrix_levels(m, level);
    }
    if (floats(o, &m->bias, name, ".bias", total, 1, 1)) return -1;
    if (m->bias) m->bias += row0;
    return 0;
}

int plan_matrix(opening *o, matrix *m, const char *name, int rows, int inputs, int row0, int total, int by_input) {
    source s;
    if (describe(o, m, &s, name, rows, inputs, row0, total, by_input)) return -1;
    if (o->jobs == o->room) {
        packing *more = realloc(o->job, (o->room = 2 * o->room + 64) * sizeof *more);
        if (!more) return fail(o, EW_LACK "out of memory");
        o->job = more;
    }
    o->job[o->jobs++] = (packing){m, s};
    o->arena_bytes += m->tile_bytes * m->tiles;
    if (m->blocks * BLOCK > o->model->widest) o->model->widest = m->blocks * BLOCK;
    return 0;
}

