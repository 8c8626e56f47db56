/* KV caches: one allocation of all layers, zero until used, so memory grows with what is filled. A layer without keys
 * and values of its own has nothing there. */
#include "core.h"
#include <stdio.h>
#include <stdlib.h>

static int rounded(int capacity) { return ceil_div(capacity, 2 * TILE) * 2 * TILE; }

/* Bytes of a layer's keys, values and scales of each (int8), one part after the other. */
typedef struct { size_t keys, values, scales; } parts;
static parts parts_of(const ew_model *m, int l, int rows, int capacity, int kind) {
    const layer *y = &m->layers[l];
    const int own = y->is.mixer == EW_ATTENTION && y->source == l;
    size_t slots = own ? (size_t)rows * y->is.kv_heads * rounded(capacity) : 0, element = dtype_bits(kind) / 8;
    return (parts){align64(slots * y->is.head_dim * element), align64(slots * y->padded * element),
                   kind == EW_INT8 ? align64(slots * sizeof(float)) : 0};
}

int64_t ew_cache_bytes(const ew_model *m, int rows, int capacity, int kind) {
    size_t bytes = 0;
    for (int l = 0; l < m->config.layers; l++) {
        parts p = parts_of(m, l, rows, capacity, kind);
        bytes += p.keys + p.values + 2 * p.scales;
    }
    return bytes;
}

ew_cache *ew_cache_new(const ew_model *m, int rows, int capacity, int kind, char *error) {
    const int known = kind == EW_FLOAT32 || kind == EW_FLOAT16 || kind == EW_INT8, layers = m->config.layers;
    const int sane = rows > 0 && capacity > 0 && capacity <= 1 << 23 && known;
    ew_cache *c = sane ? calloc(1, sizeof *c + layers * sizeof(cache_layer)) : NULL;
    uint8_t *at = c ? c->data = calloc(ew_cache_bytes(m, rows, capacity, kind) + 64, 1) : NULL;
    if (!at) {
        ew_cache_free(c);
        snprintf(error, 256, "a KV cache of %d rows and %d slots cannot be had: out of memory", rows, capacity);
        return NULL;
    }
    c->rows = rows, c->capacity = rounded(capacity), c->kind = kind;
    for (int l = 0; l < layers; l++) {
        parts p = parts_of(m, l, rows, capacity, kind);
        const layer *y = &m->layers[l];
        float *scales = (float *)(at + p.keys + p.values);
        c->layer[l] = (cache_layer){at, at + p.keys, scales, scales + p.scales / sizeof(float), kind, c->capacity,
                                    p.keys ? y->is.kv_heads : 0, y->is.head_dim, y->padded};
        at += p.keys + p.values + 2 * p.scales;
    }
    return c;
}

void ew_cache_free(ew_cache *c) {
    if (!c) return;
    free(c->data);
    free(c);
}

/* Keys go by whole blocks of slots: the slots after `length` are beyond the row's end and mean nothing. */
void ew_cache_copy(const ew_model *m, const ew_cache *source, int from, ew_cache *target, int to, int length) {
    size_t element = dtype_bits(source->kind) / 8;
    for (int l = 0; l < m->config.layers; l++) {
        const cache_layer *a = &source->layer[l], *b = &target->layer[l];
        const size_t key = a->dim * element, value = a->padded * element;
        for (int h = 0; h < a->kv_heads; h++) {
            size_t x = ((size_t)from * a->kv_heads + h) * a->capacity, y = ((size_t)to * b->kv_heads + h) * b->capacity;
            memcpy(b->k + y * key, a->k + x * key, rounded(length) * key);
            memcpy(b->v + y * value, a->v + x * value, length * value);
            if (a->kind != EW_INT8) continue;
            memcpy(b->k_scale + y, a->k_scale + x, length * sizeof(float));
            memcpy(b->v_scale + y, a->v_scale + x, length * sizeof(float));
        }
    }
}

/* n bytes from one to the other, in the direction asked; returns where the run goes on. */
static uint8_t *carry(void *slots, uint8_t *bytes, size_t n, int write) {
    if (!bytes) return bytes;
    if (write) memcpy(slots, bytes, n);
    else memcpy(bytes, slots, n);
    return bytes + n;
}

int64_t ew_cache_slots(const ew_model *m, const ew_cache *c, int row, int first, int count, uint8_t *bytes, int write) {
    const size_t element = dtype_bits(c->kind) / 8;
    int64_t total = 0;
    for (int l = 0; l < m->config.layers; l++) {
        const cache_layer *y = &c->layer[l];
        const size_t key = y->dim * element, value = y->padded * element;
        const size_t scale = y->kind == EW_INT8 ? sizeof(float) : 0;
        total += (int64_t)y->kv_heads * count * (key + value + 2 * scale);
        for (int h = 0; h < y->kv_heads; h++) {
            const size_t at = ((size_t)row * y->kv_heads + h) * y->capacity + first;
            bytes = carry(y->k + at * key, bytes, count * key, write);
            bytes = carry(y->v + at * value, bytes, count * value, write);
            if (!scale) continue;
            bytes = carry(y->k_scale + at, bytes, count * scale, write);
            bytes = carry(y->v_scale + at, bytes, count * scale, write);
        }
    }
    return total;
}
