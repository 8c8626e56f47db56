/* The C interface of the native core. Every function that can fail returns NULL or -1 and writes one sentence to
 * `error` (256 bytes); EW_LACK before it says that the input is sound and the core, or the machine, lacks something.
 * A model may be used from several threads (calls take turns), each with caches of its own, and in the child after a
 * fork, whatever other threads did meanwhile. It is closed when no call is running; its caches may be freed after it,
 * not used. */
#ifndef EDGEWRIGHT_NATIVE_H
#define EDGEWRIGHT_NATIVE_H

#include <stdint.h>

#define EW_LACK "\1"
#define EW_TILES_VERSION 2                           /* of the layout in layout.c, for repacked files */
#define EW_PASS 128       /* tokens of one ew_forward at most */
#define EW_MANY 32        /* tokens from which the kernels avx512-amx round weights and activations to bfloat16 */
enum { EW_FLOAT32, EW_FLOAT16, EW_BFLOAT16, EW_INT8, EW_UINT8, EW_INT4, EW_UINT4, EW_UINT2, EW_UINT3, EW_UINT5,
       EW_UINT6 };
enum { EW_SILU, EW_GELU, EW_GELU_TANH };
enum { EW_ATTENTION, EW_CONV, EW_DELTA, EW_MAMBA };  /* a layer's mixer */
enum { EW_PRE, EW_POST, EW_BOTH };                   /* norms of a block: x + f(norm(x)), x + norm(f(x)), or both */
enum { EW_NO_NORM, EW_EACH_HEAD, EW_ALL_HEADS };     /* of queries and keys: over head_dim, over all heads together */
enum { EW_SOFTMAX, EW_CHOSEN, EW_SIGMOID };          /* how a router weighs: see experts.c */
enum { EW_PART_QKV, EW_PART_ATTENTION, EW_PART_OUTPUT, EW_PART_GATE_UP, EW_PART_DOWN, EW_PART_HEAD, EW_PART_OTHER,
       EW_PARTS };

typedef struct ew_model ew_model;
typedef struct ew_cache ew_cache;

/* heads, kv_heads, head_dim and state_dim: of attention, query heads, key heads and their size; of the delta rule,
 * value heads, key heads, sizes of a key and a value; of Mamba-2, heads, groups, sizes of a head and its state. */
typedef struct {
    int32_t mixer, heads, kv_heads, head_dim, state_dim;
    int32_t kernel;                                  /* taps of the convolution; not of attention */
    int32_t window;                                  /* 0: none */
    int32_t rope;                                    /* the number of its table; -1: none */
    int32_t cache_source;                            /* the layer whose keys and values it reads; -1: its own */
    int32_t mlp, experts, experts_per_token;         /* width of the MLP, or of each expert; how many, if any */
    int32_t shared;                                  /* width of an MLP beside the experts, or 0 */
} ew_layer;

typedef struct {
    int32_t vocab, hidden, layers, max_context, layer_norm, learned_positions, activation, norm_order;
    int32_t qk_norm, qk_norm_last, v_norm, attention_gate, router, router_normalized, router_bias;
    int32_t per_layer, layer_scalar;                 /* width of a token's own input to each layer, or 0 */
    float norm_eps, attention_scale;                 /* scale 0: 1 / sqrt(head_dim) */
    float attention_softcap, logits_softcap;         /* 0: none */
    const ew_layer *layer;                           /* [layers]; copied */
} ew_config;

typedef struct {                                     /* one row of the manifest's table of tensors */
    const char *name;
    int32_t dtype, dims;
    int64_t shape[2], offset, bytes;                 /* dims 1: shape[1] is 1 */
} ew_tensor;

/* Opens a weights file. isa: NULL for the best of this CPU. fp32: do not quantize activations. repacked: NULL, or a
 * file that keeps the tiles (which are the same for every isa), read if it is there and fits, else written; key: 64
 * characters that tell one model's tiles from all others (tiles.c). */
ew_model *ew_open(const char *path, const ew_config *, const ew_tensor *, int tensors, int threads, int fp32,
                  const char *isa, const char *repacked, const char *key, char *error);
void ew_close(ew_model *);
const char *ew_isa(const ew_model *);                /* model NULL: the best of this CPU */

/* Caches of `rows` sequences; kind EW_FLOAT32, EW_FLOAT16 or EW_INT8. ew_cache_copy copies row `from` of `source` over
 * row `to` of `target` (another cache of the model, or the same one): the first `length` slots. */
int64_t ew_cache_bytes(const ew_model *, int rows, int capacity, int kind);
ew_cache *ew_cache_new(const ew_model *, int rows, int capacity, int kind, char *error);
void ew_cache_free(ew_cache *);
void ew_cache_copy(const ew_model *, const ew_cache *source, int from, ew_cache *target, int to, int length);
/* Slots first..first+count-1 of a row, multiples of 16, to bytes, or (write) from there. Returns how many bytes they
 * are, the same for every cache of a model and a kind; bytes NULL: no more than that. */
int64_t ew_cache_slots(const ew_model *, const ew_cache *, int row, int first, int count, uint8_t *bytes, int write);

/* Recurrent states that the caller keeps: float [2][rows][ew_state_floats], two copies of a row of the cache. A row's
 * tokens of a pass go on from copy `from` (-1: zeros) and leave the state in copy `to` (which may be the same). */
int64_t ew_state_floats(const ew_model *);           /* of a row; 0: no layer is recurrent */
typedef struct {
    float *data;
    const int32_t *from, *to;                        /* [tokens]; those of a row's first token in the pass count */
} ew_states;

/* What is sought in a row of logits: the k largest (penalized in place, if asked) in order, ties to the lower index. */
typedef struct {
    int32_t k;                                       /* at most vocab; 0: nothing */
    int32_t *index; float *value;                    /* [k] */
    float repetition, presence, frequency;           /* as in runtime/sampling.py */
    const int32_t *counts;                           /* [vocab]: times in the reply; NULL: nothing is penalized */
    const uint8_t *seen;                             /* [vocab]: in the prompt or the reply */
} ew_choice;

/* One pass: token i of sequence row[i] at slot[i], which is its position. Tokens of one row come in order, after those
 * of its earlier slots, and with recurrent layers one after the other. The bits of a token's result do not depend on
 * the other tokens of the pass, nor on the threads; with the kernels avx512-amx alone, on whether they are EW_MANY or
 * more (and logits, and layers that only they need, on whether as many are wanted). Logits of the tokens listed in
 * `wanted` go to logits [n_wanted][vocab]; choices: NULL, or what is sought in each. states: may be NULL without
 * recurrent layers. */
int ew_forward(ew_model *, ew_cache *, const ew_states *, int tokens, const int32_t *token, const int32_t *row,
               const int32_t *slot, int n_wanted, const int32_t *wanted, ew_choice *choices, float *logits,
               char *error);

/* Microseconds spent in each part since the last call (threads work together; this is the caller's clock). */
void ew_profile(ew_model *, int on, double *microseconds);

#endif
