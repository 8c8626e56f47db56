/* Types shared by the files of the native core, and the seam between them.
 *
 * A model is a set of matrices repacked once at load (layout.c) and run by kernels chosen for the CPU (isa_*.c, which
 * compile kernels.h and attention.h for one instruction set each). One step of the network is in step.c, the threads that
 * carry it in threads.c, opening and checking a weights file in model.c. The interface that Python calls is native.h.
 */
#ifndef EDGEWRIGHT_CORE_H
#define EDGEWRIGHT_CORE_H

#include "native.h"
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)                 /* GCC 11, clang 12 */
#define HAVE_AMX
#endif
#endif

#define TILE 16           /* output rows of a tile: one AVX-512 register of floats */
#define BLOCK 32          /* inputs that share one activation scale */
#define CHUNK 128         /* cache slots whose softmax is computed together (see attention.h) */
#define MAX_THREADS 64

/* How a matrix holds its numbers: 2..8 bits a code, or whole floats. */
enum { KIND_F16 = 16, KIND_BF16 = 17, KIND_F32 = 32 };

/* Output rows x inputs, as tiles of 16 rows. Tile t is `tile_bytes` at data + t * tile_bytes:
 *   codes:  scales fp16 [groups][16], (zeros uint8 [groups][16],) then per block of 32 inputs `bits` lines of 64 bytes,
 *           each part aligned to 64 bytes. See layout.c for the bits inside a line.
 *   floats: [inputs][16]. */
typedef struct {
    int rows, inputs, tiles, blocks, kind, group_blocks, groups, asymmetric;
    size_t tile_bytes, zeros_at, codes_at;
    uint8_t *data;
    float *bias;                                     /* [tiles * 16] or NULL */
} matrix;

/* Rows of activations as the matrix kernels read them. q is NULL in fp32 mode. */
typedef struct {
    int blocks;                                      /* of 32; inputs are padded with zeros to a whole block */
    float *f;                                        /* [rows][blocks * 32] */
    int8_t *q;                                       /* 32 a block and row, value = q * scale; order: kernels.h. Or bfloat16: amx.h */
    float *scale;                                    /* one a block and row */
    int32_t *sum;                                    /* minus the sum of q, which the zero point multiplies */
} activations;

typedef struct {
    matrix q, k, v, o, gate, up, down;               /* gate is absent (rows 0) in a plain MLP */
    float *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *k_norm;
    int heads, kv_heads, mlp;
} layer;

struct ew_cache {
    int rows, capacity, kind;                        /* EW_FLOAT32, EW_FLOAT16 or EW_INT8 */
    size_t bytes, *layer_at;                         /* offset of each layer */
    uint8_t *data;
};

/* One layer of a cache, whose capacity is a multiple of 32: K is [row][kv head][slot / 16][head_dim][16], V is [row][kv head][slot][padded head_dim];
 * int8 caches have a float scale for every slot of every head. */
typedef struct {
    uint8_t *k, *v;
    float *k_scale, *v_scale;
    int kind, capacity, kv_heads, dim, padded;
} cache_layer;

/* Attention of `queries` vectors of one kv head of one row, over the chunk of slots that starts at `start`.
 * Query i sees slots low[i] <= slot < high[i]. Per query a state of 2 + padded floats: maximum, sum, accumulator. */
typedef struct {
    const cache_layer *cache;
    int row, head, queries, many;                    /* many: of a pass that may be rounded to bfloat16 */
    const float *const *query;                       /* already scaled by 1/sqrt(dim) */
    const int *low, *high;
} attention_job;

/* What an instruction set provides. */
typedef struct {
    const char *name;
    void (*multiply)(const matrix *, const activations *, int rows, float *y, size_t y_stride, int tile0, int tile1);
    void (*quantize)(activations *, int rows, int first, int last);
    void (*normalize)(const float *x, const float *weight, const float *bias, float eps, int layer_norm, float *y, int n);
    void (*activate)(const float *gate, const float *up, float *y, int n, int kind);  /* gate NULL: plain */
    void (*attend)(const attention_job *, int start, float *state, size_t state_stride);
    void (*merge)(float *into, const float *from, int dim);
    void (*rotate)(float *x, const float *cos, const float *sin, int half);
    void (*append)(const cache_layer *, int row, int head, int slot, const float *x, int value);
    float (*peak)(const float *x, int n);            /* the largest */
} kernels;

const kernels *choose_kernels(const char *name);     /* NULL or "": the best this CPU runs; NULL if it cannot run `name` */

/* threads.c: a pool whose workers run `work(context, thread, threads)` together with the caller, who has entered it. */
typedef struct pool pool;
pool *pool_new(int threads);
void pool_free(pool *);                               /* nobody may be in it */
int pool_enter(pool *);                               /* waits for its turn; 1 where a run before may have been cut off by a fork */
void pool_leave(pool *);
void pool_run(pool *, void (*work)(void *, int, int), void *context);
void pool_barrier(pool *, int threads);               /* all threads of the present run meet */

/* layout.c */
size_t matrix_shape(matrix *, int rows, int inputs, int kind, int group, int asymmetric);      /* returns bytes */
typedef struct { const uint8_t *codes; const uint16_t *scales; const uint8_t *zeros; int dtype, by_input, stride, row0; } source;
int matrix_pack(matrix *, const source *, int tile0, int tile1);                  /* 0, or -1: a scale or weight is not finite */
int matrix_finite(const matrix *);                                                /* whether all of its scales or weights are */
void matrix_read_row(const matrix *, int row, float *out);                        /* dequantized, inputs floats */
float half_to_float(uint16_t);
int dtype_bits(int dtype);                                                        /* bits of one element; 0: unknown */

/* tiles.c: the arena in a file. Reading gives 1 where it was all there and is what `key` stands for. bytes: a multiple of 64. */
int tiles_read(const char *path, const char *key, uint8_t *arena, size_t bytes);
void tiles_write(const char *path, const char *key, const uint8_t *arena, size_t bytes);

struct ew_model {
    ew_config config;
    const kernels *kernels;
    pool *pool;
    int threads, fp32, padded_dim;
    layer *layers;
    matrix embed, head, positions;
    const matrix *head_matrix;
    float *cos, *sin, *final_norm, *final_norm_bias;
    int widest;                                      /* largest padded input or output of any matrix but the head */
    int most_queries;                                /* heads per kv head, at most */
    uint8_t *arena; size_t arena_bytes;
    void *smalls;                                    /* chain of small allocations */
    struct scratch *scratch;
    double seconds[EW_PARTS];
    int profile;
};

int scratch_new(ew_model *);
void scratch_free(ew_model *);
cache_layer cache_of_layer(const ew_model *, const ew_cache *, int layer);

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline int is_stream(int dtype) { return dtype >= EW_UINT2; }         /* packed row by row; 4 bits as one run */
static inline size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

#endif
