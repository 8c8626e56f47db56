/* KV caches: one allocation of all layers, zero until used, so memory grows with what is filled. */
#include "core.h"
#include <stdio.h>
#include <stdlib.h>

static size_t layer_bytes(const ew_model *m, int l, int rows, int capacity, int kind) {
    size_t slots = (size_t)rows * m->layers[l].kv_heads * capacity, element = dtype_bits(kind) / 8;
    return align64(slots * m->config.head_dim * element) + align64(slots * m->padded_dim * element)
         + (kind == EW_INT8 ? 2 * align64(slots * sizeof(float)) : 0);
}

static int rounded(int capacity) { return ceil_div(capacity, 2 * TILE) * 2 * TILE; }

int64_t ew_cache_bytes(const ew_model *m, int rows, int capacity, int kind) {
    size_t bytes = 0;
    for (int l = 0; l < m->config.layers; l++) bytes += layer_bytes(m, l, rows, rounded(capacity), kind);
    return bytes;
}

ew_cache *ew_cache_new(const ew_model *m, int rows, int capacity, int kind, char *error) {
    int known = kind == EW_FLOAT32 || kind == EW_FLOAT16 || kind == EW_INT8;
    ew_cache *c = rows > 0 && capacity > 0 && capacity <= 1 << 23 && known ? calloc(1, sizeof *c) : NULL;
    if (c) {
        *c = (ew_cache){rows, rounded(capacity), kind, 0, calloc(m->config.layers, sizeof(size_t)), NULL};
        for (int l = 0; l < m->config.layers && c->layer_at; l++) {
            c->layer_at[l] = c->bytes;
            c->bytes += layer_bytes(m, l, rows, c->capacity, kind);
        }
        if (c->layer_at && (c->data = calloc(c->bytes + 64, 1))) return c;
        ew_cache_free(c);
    }
    snprintf(error, 256, "a KV cache of %d rows and %d slots cannot be had: out of memory", rows, capacity);
    return NULL;
}

void ew_cache_free(ew_cache *c) {
    if (!c) return;
    free(c->data);
    free(c->layer_at);
    free(c);
}

cache_layer cache_of_layer(const ew_model *m, const ew_cache *c, int l) {
    size_t slots = (size_t)c->rows * m->layers[l].kv_heads * c->capacity, element = dtype_bits(c->kind) / 8;
    cache_layer y = {.kind = c->kind, .capacity = c->capacity, .kv_heads = m->layers[l].kv_heads, .dim = m->config.head_dim, .padded = m->padded_dim};
    y.k = c->data + c->layer_at[l];
    y.v = y.k + align64(slots * y.dim * element);
    y.k_scale = (float *)(y.v + align64(slots * y.padded * element));
    y.v_scale = y.k_scale + align64(slots * sizeof(float)) / sizeof(float);
    return y;
}

/* Keys go by whole blocks of slots: the slots after `length` are beyond the row's end and mean nothing. */
void ew_cache_copy(const ew_model *m, const ew_cache *source, int from, ew_cache *target, int to, int length) {
    size_t element = dtype_bits(source->kind) / 8;
    for (int l = 0; l < m->config.layers; l++) {
        cache_layer a = cache_of_layer(m, source, l), b = cache_of_layer(m, target, l);
        for (int h = 0; h < a.kv_heads; h++) {
            size_t x = ((size_t)from * a.kv_heads + h) * a.capacity, y = ((size_t)to * b.kv_heads + h) * b.capacity;
            memcpy(b.k + y * b.dim * element, a.k + x * a.dim * element, (size_t)rounded(length) * a.dim * element);
            memcpy(b.v + y * b.padded * element, a.v + x * a.padded * element, (size_t)length * a.padded * element);
            if (a.kind != EW_INT8) continue;
            memcpy(b.k_scale + y, a.k_scale + x, length * sizeof(float));
            memcpy(b.v_scale + y, a.v_scale + x, length * sizeof(float));
        }
    }
}
