/* Types shared by the files of the native core, and the seam between them.
 *
 * native.h is the interface that Python calls. model.c opens a weights file, plan.c says what each layer needs of it,
 * tensors.c finds and checks that, layout.c repacks the matrices once, tiles.c keeps them so in a file, cache.c has the
 * KV caches. step.c is one pass of the network, pass.h what its blocks share: attention.c, conv.c, delta.c and mamba.c
 * (over recurrent.c) mix tokens, mlp.c and experts.c widen them, per_layer.c adds inputs of a layer's own. threads.c
 * has the threads that carry a pass, decode.c chooses among its logits. choose.c chooses for the CPU among the kernels:
 * kernels.h, attention.h and recurrence.h (and amx.h), which each isa_*.c compiles for one instruction set.
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
#define AHEAD (16 << 10)  /* bytes fetched ahead of what is read: memory answers late, tiles of few bits are short */
#define CHUNK 128         /* cache slots whose softmax is computed together (see attention.h) */
#define MAX_THREADS 64

/* How a matrix holds its numbers: 2..8 bits a code, or whole floats. */
enum { KIND_F16 = 16, KIND_BF16 = 17, KIND_F32 = 32 };

/* Output rows x inputs, as tiles of 16 rows. Tile t is `tile_bytes` at data + t * tile_bytes:
 *   codes:  scales fp16 [groups][16], (zeros uint8 [groups][16],) then per block of 32 inputs `bits` lines of 64 bytes,
 *           each part aligned to 64 bytes. See layout.c for the bits inside a line. Narrow scales: fp16 [16] of rows,
 *           then int8 [groups][16] to be multiplied by it. With levels (2 to 4 bits), a code stands for one of them.
 *   floats: [inputs][16]. */
typedef struct {
    int rows, inputs, tiles, blocks, kind, group_blocks, groups, asymmetric, narrow, levels;
    uint8_t level[16];                               /* [2^kind]: level + 128, with levels */
    size_t tile_bytes, scales_at, zeros_at, codes_at;
    uint8_t *data;                                   /* [tiles][tile_bytes] */
    float *bias;                                     /* [rows], or NULL */
} matrix;

/* Rows of activations as the matrix kernels read them; inputs are padded with zeros to whole blocks. Without q they are
 * floats. The order of q, scale and sum is in kernels.h; amx.h has its own, of bfloat16. */
typedef struct {
    int blocks;                                      /* of 32 inputs */
    float *f;                                        /* [rows][blocks * 32] */
    int8_t *q;                                       /* [rows * blocks][32]: value = q * scale; or NULL */
    float *scale;                                    /* [rows * blocks] */
    int32_t *sum;                                    /* [rows * blocks]: -8 times the sum of q, for the zero point */
} activations;

typedef struct { float *weight, *bias; int parts; } norm;    /* [n]; NULL: none; parts are normalized by themselves */

typedef struct {
    matrix gate, up;                                 /* width x hidden; gate is absent (rows 0) in a plain MLP */
    matrix down;                                     /* hidden x width */
} mlp;

typedef struct {
    float *cos, *sin;                                /* [max_context][half] */
    float *query;                                    /* [max_context] that queries are multiplied by, or NULL */
    int half;
} rope;

typedef struct {
    ew_layer is;
    norm mixer_norm, mixer_post, mlp_norm, mlp_post; /* before and after each block, hidden wide */
    union {
        struct { matrix q, k, v, gate; };            /* attention: rows of its heads; gate may be absent */
        struct { matrix b, c, x; };                  /* convolution */
        struct { matrix convolved, z, numbers[2]; }; /* delta rule: qkv, z, beta and alpha; Mamba-2: xbc, z, dt */
    };
    matrix out;                                      /* hidden x what the mixer gives */

    const rope *rope;                                /* attention. NULL: no positions */
    float *q_norm, *k_norm;                          /* [head_dim] or [heads * head_dim], with qk_norm */
    float scale;                                     /* of its queries */
    int padded;                                      /* head_dim as a multiple of 16 */
    int source;                                      /* the layer whose cache it reads */

    int channels, blocks;                            /* recurrent: of the convolution; of 32 state columns of a head */
    float *conv_weight, *conv_bias;                  /* [kernel][channels], [channels] or NULL */
    float *decay, *dt_bias, *skip;                   /* [heads], of states; skip: Mamba-2 */
    norm state_norm;                                 /* of a head's output (delta), of a group's (Mamba-2) */
    size_t conv_at, state_at;                        /* floats before them in a row's states: [kernel - 1][channels], */
                                                     /* [heads][blocks][key][32], key the inner dimension */
    mlp mlp, shared, *experts;                       /* experts [is.experts], with shared (down.rows 0: none), or mlp */
    matrix router;                                   /* experts x hidden */
    float *router_bias;                              /* [experts] or NULL */

    matrix per_layer_gate, per_layer_proj;           /* per_layer x hidden, hidden x per_layer */
    norm per_layer_norm;                             /* hidden wide */
    float scalar;                                    /* of the stream after the layer, 1 without */
} layer;

/* One layer of a cache. element: float, half or int8, of which each slot of each head has a scale. */
typedef struct {
    uint8_t *k;                                      /* element [rows][kv_heads][capacity / 16][dim][16] */
    uint8_t *v;                                      /* element [rows][kv_heads][capacity][padded] */
    float *k_scale, *v_scale;                        /* [rows][kv_heads][capacity], int8 only */
    int kind, capacity, kv_heads, dim, padded;       /* padded: dim as a multiple of 16 */
} cache_layer;

struct ew_cache {
    int rows, capacity, kind;                        /* capacity: of 32 slots each; EW_FLOAT32, EW_FLOAT16 or EW_INT8 */
    uint8_t *data;                                   /* of all layers */
    cache_layer layer[];                             /* [layers] */
};

/* Attention of `queries` vectors of one kv head of one row, over the chunk of slots that starts at `start`.
 * Query i sees slots low[i] <= slot < high[i]. Its state is float [2 + padded]: maximum, sum, accumulator. */
typedef struct {
    const cache_layer *cache;
    int row, head, queries, many;                    /* many: of a pass that may be rounded to bfloat16 */
    const float *const *query;                       /* [queries] of [dim], already scaled by 1/sqrt(dim) */
    const int *low, *high;                           /* [queries] */
    float softcap;                                   /* scores become cap * tanh(scores / cap); 0: as they are */
    const uint8_t *ahead;                            /* the keys that are read next, to be fetched meanwhile, */
    int ahead_slots;                                 /* of so many slots; 0: none */
} attention_job;

/* A row's tokens through the state of one head [blocks][keys][32]: S = decay S + k d, output = query_scale S^T q, where
 * d is strength v, or (corrected) strength (v - key_scale S^T k) with the decayed S; k is multiplied by key_scale. */
typedef struct {
    int tokens, keys, values, corrected;             /* keys, values: sizes of k and of v */
    const float *k, *q, *v; size_t stride;           /* from token to token, of all three */
    const float *decay, *strength, *key_scale, *query_scale;         /* [tokens] */
    const float *from; float *to;                    /* from NULL: zeros; may be the same */
    float *out; size_t out_stride;                   /* [tokens][values] */
} recurrence_job;

/* What an instruction set provides. */
typedef struct {
    const char *name;
    void (*multiply)(const matrix *, const activations *, int rows, float *y, size_t y_stride, int tile0, int tile1);
    void (*quantize)(activations *, int rows, int first, int last);
    void (*normalize)(const float *x, const float *weight, const float *bias, float eps, int layer, float *y, int n);
    void (*activate)(const float *gate, const float *up, float *y, int n, int kind);
    void (*attend)(const attention_job *, int start, float *state, size_t state_stride);
    void (*merge)(float *into, const float *from, int padded);
    void (*rotate)(float *x, const float *cos, const float *sin, int half);
    void (*append)(const cache_layer *, int row, int head, int slot, const float *x, int value);
    float (*peak)(const float *x, int n);
    void (*recur)(const recurrence_job *);
} kernels;
enum { EW_CHOSEN_MOST = 64 };                        /* experts of a token */
enum { KERNEL_SIGMOID = EW_GELU_TANH + 1 };          /* of activate, besides EW_SILU.. */

/* choose.c. name: NULL or "" for the best that this CPU runs. NULL where it cannot run them. */
const kernels *choose_kernels(const char *name);

/* threads.c: a pool whose workers run `work(context, thread, threads)` together with the caller, who has entered it. */
typedef struct pool pool;
pool *pool_new(int threads);
void pool_free(pool *);                              /* nobody may be in it */
int pool_enter(pool *);                              /* waits for a turn; 1 where a fork may have cut off a run */
void pool_leave(pool *);
void pool_run(pool *, void (*work)(void *, int, int), void *context);
void pool_barrier(pool *, int threads);              /* all threads of the present run meet */

/* layout.c. A tensor of codes with its scales and zeros, or of floats; by_input: [inputs][stride] rather than
 * [rows][inputs], scales and zeros alike. The matrix begins at its row `row0`. */
typedef struct {
    const uint8_t *codes, *zeros;
    const void *scales;                              /* uint16_t, or int8_t times row_scales, one an output */
    const uint16_t *row_scales;
    int dtype, by_input, stride, row0;
    const ew_tensor *tensor;
} source;
/* Returns bytes. */
size_t matrix_shape(matrix *, int rows, int inputs, int kind, int group, int asymmetric, int narrow);
void matrix_levels(matrix *, const int8_t *levels);                        /* [2^kind]: what its codes stand for */
void matrix_pack(matrix *, const source *, int tile);
int matrix_sound(const matrix *, int tile);          /* whether weights or scales are finite, none 0 if narrow */
void matrix_read_row(const matrix *, int row, float *out);                 /* dequantized, out [inputs] */
/* Elements first..first+n-1 of row `row` of what a matrix of this shape would be packed from, which is not by_input. */
void source_read(const matrix *, const source *, int row, int first, int n, float *out);
float float_at(const void *floats, int kind, size_t index);                /* of KIND_F32, KIND_F16 or KIND_BF16 */
int dtype_bits(int dtype);                                                 /* of one element; 0: unknown */

/* tiles.c: the arena in a file. Reading gives 1 where it was all there and is what `key` stands for. bytes: a multiple
 * of 64. */
int tiles_read(const char *path, const char *key, uint8_t *arena, size_t bytes);
void tiles_write(const char *path, const char *key, const uint8_t *arena, size_t bytes);

struct ew_model {
    ew_config config;                                /* without its layers */
    const kernels *kernels;
    pool *pool;
    int threads, fp32;
    int widest;                                      /* largest padded input or output of any matrix of a layer */
    int narrow;                                      /* largest count of heads or experts, twice, padded */
    int gates, experts;                              /* whether layers need a gate's buffer; experts' */
    int tail;                                        /* first of the last layers, which add nothing to a cache */
    size_t attention_floats;                         /* states of the queries of a kv head, at most */
    size_t state_floats;                             /* of a row */
    layer *layers;                                   /* [config.layers] */
    rope *ropes;                                     /* as many as layers name */
    float *ones;                                     /* [largest head_dim] */
    matrix embed, head;                              /* vocab x hidden; the head is absent where it is tied */
    matrix positions;                                /* positions x hidden, if learned */
    const matrix *head_matrix;                       /* head, or embed */
    norm final_norm;
    matrix per_layer_embed; source per_layer_source; /* vocab x [layers * per_layer]: its shape; it stays in the file */
    matrix per_layer_projection;                     /* [layers * per_layer] x hidden */
    float *per_layer_norm;                           /* [per_layer] */
    uint8_t *file; size_t file_bytes;                /* mapped while the model is opened, or for the table */
    uint8_t *arena; size_t arena_bytes;              /* the data of all matrices */
    void *kept;                                      /* chain of what keep() gave */
    struct scratch *scratch;                         /* pass.h */
    double seconds[EW_PARTS];                        /* since the last ew_profile */
    int profile;
};

int scratch_new(ew_model *);                         /* pass.c: 0, or -1 where memory lacks */
void scratch_free(ew_model *);

/* tensors.c: zeroed memory, of 64 bytes more than asked, that lives as long as the model; or NULL. */
void *keep(ew_model *, size_t bytes);

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
/* Unsigned codes are packed row by row, each row in whole bytes, with their scales; signed ones as one run. */
static inline int is_stream(int dtype) { return dtype == EW_UINT8 || dtype >= EW_UINT4; }
static inline int tile_rows(const matrix *m, int t) { return m->rows - t * TILE < TILE ? m->rows - t * TILE : TILE; }
static inline size_t element_bytes(int kind) { return kind == EW_FLOAT32 ? 4 : kind == EW_FLOAT16 ? 2 : 1; }
static inline size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

#endif
