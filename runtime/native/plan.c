/* What the layers of a configuration need of a weights file, and the sizes that follow from them. */
#include "tensors.h"
#include <math.h>
#include <stdio.h>

typedef struct { matrix *m; const char *name; int rows; } part;

/* Linears of one input whose names begin with `where`: one tensor called `fused` (NULL: never), or one each. */
static int plan_parts(opening *o, const char *where, const char *fused, int inputs, const part *parts, int count) {
    int total = 0, row0 = 0;
    char name[96];
    for (int i = 0; i < count; i++) total += parts[i].rows;
    for (int i = 0; i < count; row0 += parts[i++].rows) {
        snprintf(name, sizeof name, "%s%s", where, parts[i].name);
        const int whole = fused && !has_linear(o, name), padded = ceil_div(parts[i].rows, BLOCK) * BLOCK;
        if (whole) snprintf(name, sizeof name, "%s%s", where, fused);
        if (plan_matrix(o, parts[i].m, name, parts[i].rows, inputs, whole ? row0 : 0, whole ? total : parts[i].rows, 1))
            return -1;
        if (padded > o->model->widest) o->model->widest = padded;
    }
    return 0;
}
static int plan_one(opening *o, const char *where, const char *name, int rows, int inputs, matrix *m) {
    return plan_parts(o, where, NULL, inputs, &(part){m, name, rows}, 1);
}

static int plan_norm(opening *o, const char *where, const char *name, int n, norm *to) {
    char weight[48], bias[48];
    snprintf(weight, sizeof weight, "%s.weight", name);
    snprintf(bias, sizeof bias, "%s.bias", name);
    to->parts = 1;
    return floats(o, &to->weight, where, weight, n, 1, 0) || floats(o, &to->bias, where, bias, n, 1, 1) ? -1 : 0;
}

static int plan_mlp(opening *o, const char *where, const char *kind, int width, mlp *to) {
    char name[96];
    const int hidden = o->model->config.hidden;
    const part parts[] = {{&to->gate, "gate", width}, {&to->up, "up", width}};
    snprintf(name, sizeof name, "%s%s", where, kind);
    char gate[128], fused[128];
    snprintf(gate, sizeof gate, "%sgate", name);
    snprintf(fused, sizeof fused, "%sgate_up", name);
    const int plain = !has_linear(o, gate) && !has_linear(o, fused);
    return plan_parts(o, name, plain ? NULL : "gate_up", hidden, parts + plain, 2 - plain)
        || plan_one(o, name, "down", hidden, width, &to->down) ? -1 : 0;
}

static int plan_attention(opening *o, const char *where, layer *l) {
    ew_model *m = o->model;
    const ew_config *c = &m->config;
    const int dim = l->is.head_dim, own = l->is.cache_source < 0, all = c->qk_norm == EW_ALL_HEADS;
    const int q = l->is.heads * dim, kv = l->is.kv_heads * dim;
    const part parts[] = {{&l->q, "q", q}, {&l->k, "k", kv}, {&l->v, "v", kv}};
    if (plan_parts(o, where, own ? "qkv" : NULL, c->hidden, parts, own ? 3 : 1)
        || plan_one(o, where, "o", c->hidden, q, &l->out)
        || (c->attention_gate && plan_one(o, where, "attn_gate", q, c->hidden, &l->gate))
        || floats(o, &l->q_norm, where, "q_norm.weight", all ? q : dim, 1, !c->qk_norm)
        || (own && floats(o, &l->k_norm, where, "k_norm.weight", all ? kv : dim, 1, !c->qk_norm))) return -1;
    if (l->is.rope < 0) return 0;
    rope *r = &m->ropes[l->is.rope];
    l->rope = r;
    if (r->cos) return r->half == dim / 2 ? 0 : fail(o, EW_LACK "layers of different head_dim share a table of RoPE");
    char name[32] = "rope.";
    if (l->is.rope) snprintf(name, sizeof name, "rope.%d.", l->is.rope);
    r->half = dim / 2;
    return floats(o, &r->cos, name, "cos", c->max_context, r->half, 0)
        || floats(o, &r->sin, name, "sin", c->max_context, r->half, 0)
        || floats(o, &r->query, name, "query", c->max_context, 1, 1) ? -1 : 0;
}

/* The convolution of a recurrent layer, its weight turned to [kernel][channels], and the place of its state. */
static int plan_convolution(opening *o, const char *where, layer *l) {
    const int taps = l->is.kernel, channels = l->channels;
    float *stored;
    if (floats(o, &stored, where, "conv.weight", channels, taps, 0)
        || floats(o, &l->conv_bias, where, "conv.bias", channels, 1, 1)) return -1;
    if (!(l->conv_weight = keep_or_fail(o, (size_t)taps * channels * sizeof(float)))) return -1;
    for (int c = 0; c < channels; c++)
        for (int t = 0; t < taps; t++) l->conv_weight[(size_t)t * channels + c] = stored[(size_t)c * taps + t];
    return 0;
}

static int plan_conv(opening *o, const char *where, layer *l) {
    const int hidden = o->model->config.hidden;
    const part parts[] = {{&l->b, "conv_b", hidden}, {&l->c, "conv_c", hidden}, {&l->x, "conv_x", hidden}};
    return plan_parts(o, where, "conv_in", hidden, parts, 3) || plan_convolution(o, where, l)
        || plan_one(o, where, "conv_out", hidden, hidden, &l->out) ? -1 : 0;
}

/* The delta rule and Mamba-2. */
static int plan_state(opening *o, const char *where, layer *l) {
    const ew_layer *is = &l->is;
    const int hidden = o->model->config.hidden, heads = is->heads, delta = is->mixer == EW_DELTA;
    const int values = heads * (delta ? is->state_dim : is->head_dim);
    const part qkv = {&l->convolved, delta ? "delta_qkv" : "mamba_xbc", l->channels};
    const part z = {&l->z, delta ? "delta_z" : "mamba_z", values}, parts[] = {delta ? qkv : z, delta ? z : qkv};
    if (plan_parts(o, where, delta ? "delta_in" : "mamba_in", hidden, parts, 2) || plan_convolution(o, where, l)
        || plan_one(o, where, delta ? "delta_b" : "mamba_dt", heads, hidden, &l->numbers[0])
        || (delta && plan_one(o, where, "delta_a", heads, hidden, &l->numbers[1]))
        || floats(o, &l->decay, where, "decay", heads, 1, 0) || floats(o, &l->dt_bias, where, "dt_bias", heads, 1, 0)
        || (!delta && floats(o, &l->skip, where, "skip", heads, 1, 0))
        || plan_norm(o, where, "state_norm", delta ? is->state_dim : values, &l->state_norm)
        || plan_one(o, where, delta ? "delta_out" : "mamba_out", hidden, values, &l->out)) return -1;
    if (!delta) l->state_norm.parts = is->kv_heads;
    return 0;
}

static int plan_layer(opening *o, int number) {
    static int (*const mixer[])(opening *, const char *, layer *) = {plan_attention, plan_conv, plan_state, plan_state};
    const ew_config *c = &o->model->config;
    layer *l = &o->model->layers[number];
    const int before = c->norm_order != EW_POST, after = c->norm_order != EW_PRE, own = c->per_layer;
    char where[32], expert[32];
    float *scalar = NULL;
    snprintf(where, sizeof where, "layers.%d.", number);
    if (mixer[l->is.mixer](o, where, l)
        || (before && plan_norm(o, where, "attn_norm", c->hidden, &l->mixer_norm))
        || (before && plan_norm(o, where, "mlp_norm", c->hidden, &l->mlp_norm))
        || (after && plan_norm(o, where, "attn_post_norm", c->hidden, &l->mixer_post))
        || (after && plan_norm(o, where, "mlp_post_norm", c->hidden, &l->mlp_post))
        || (own && plan_one(o, where, "per_layer_gate", own, c->hidden, &l->per_layer_gate))
        || (own && plan_one(o, where, "per_layer_proj", c->hidden, own, &l->per_layer_proj))
        || (own && plan_norm(o, where, "per_layer_norm", c->hidden, &l->per_layer_norm))
        || (c->layer_scalar && floats(o, &scalar, where, "scalar", 1, 1, 0))) return -1;
    l->scalar = scalar ? *scalar : 1;
    if (!l->is.experts) return plan_mlp(o, where, "", l->is.mlp, &l->mlp);
    if (plan_one(o, where, "router", l->is.experts, c->hidden, &l->router)
        || (c->router_bias && floats(o, &l->router_bias, where, "router_bias", l->is.experts, 1, 0))
        || (l->is.shared && plan_mlp(o, where, "shared.", l->is.shared, &l->shared))
        || !(l->experts = keep_or_fail(o, l->is.experts * sizeof(mlp)))) return -1;
    for (int e = 0; e < l->is.experts; e++) {
        snprintf(expert, sizeof expert, "experts.%d.", e);
        if (plan_mlp(o, where, expert, l->is.mlp, &l->experts[e])) return -1;
    }
    return 0;
}

int plan_model(opening *o) {
    ew_model *m = o->model;
    const ew_config *c = &m->config;
    if (check_table(o) || plan_matrix(o, &m->embed, "embed", c->vocab, c->hidden, 0, c->vocab, 0)) return -1;
    m->head_matrix = has_linear(o, "head") ? &m->head : &m->embed;
    if (m->head_matrix == &m->head && plan_matrix(o, &m->head, "head", c->vocab, c->hidden, 0, c->vocab, 1)) return -1;
    if (c->learned_positions) {
        const ew_tensor *t = find(o, "position_embed", ".weight");
        int rows = t ? (int)t->shape[0] : c->max_context;
        if (rows < c->max_context)
            return fail(o, "position_embed.weight has %d positions, the context %d", rows, c->max_context);
        if (plan_matrix(o, &m->positions, "position_embed", rows, c->hidden, 0, rows, 0)) return -1;
    }
    if (plan_norm(o, "", "final_norm", c->hidden, &m->final_norm)) return -1;
    for (int l = 0; l < c->layers; l++) if (plan_layer(o, l)) return -1;
    const int own = c->layers * c->per_layer, v = c->vocab;
    return own && (describe(o, &m->per_layer_embed, &m->per_layer_source, "per_layer_embed", v, own, 0, v, 0)
        || plan_matrix(o, &m->per_layer_projection, "per_layer_projection", own, c->hidden, 0, own, 1)
        || floats(o, &m->per_layer_norm, "per_layer_norm", ".weight", c->per_layer, 1, 0)) ? -1 : 0;
}

static int within(int value, int low, int high) { return value >= low && value <= high; }

static int check_attention(const ew_config *c, int number) {
    const ew_layer *l = &c->layer[number], *source = l->cache_source < 0 ? l : &c->layer[l->cache_source];
    return within(l->kv_heads, 1, 1 << 12) && within(l->heads, l->kv_heads, 1 << 12) && l->heads % l->kv_heads == 0
        && within(l->head_dim, 1, 1024) && (l->rope < 0 || l->head_dim % 2 == 0) && within(l->rope, -1, 64)
        && within(l->window, 0, 1 << 30) && within(l->cache_source, -1, number - 1)
        && source->mixer == EW_ATTENTION && source->kv_heads == l->kv_heads && source->head_dim == l->head_dim
        && (source == l || source->cache_source < 0);
}

static int check_recurrent(const ew_layer *l) {
    return within(l->kernel, 1, 64) && (l->mixer == EW_CONV || (
        within(l->kv_heads, 1, 1 << 12) && within(l->heads, l->kv_heads, 1 << 12) && l->heads % l->kv_heads == 0
        && within(l->head_dim, 1, 1024) && within(l->state_dim, 1, 1024)
        && l->heads * (l->head_dim + l->state_dim) < 1 << 20));
}

/* Sizes of layer `number`, which go into the model's. */
static void measure(ew_model *m, int number) {
    layer *l = &m->layers[number];
    const ew_layer *is = &l->is;
    const int padded_heads = 2 * ceil_div(is->heads, TILE) * TILE, padded_experts = ceil_div(is->experts, TILE) * TILE;
    l->padded = ceil_div(is->head_dim, TILE) * TILE;
    l->source = is->cache_source < 0 ? number : is->cache_source;
    l->scale = m->config.attention_scale ? m->config.attention_scale : 1 / sqrtf(is->head_dim);
    if (is->mixer != EW_ATTENTION || is->cache_source < 0) m->tail = number + 1;
    if (is->experts) m->experts = 1;
    if (padded_experts > m->narrow) m->narrow = padded_experts;
    if (is->mixer == EW_ATTENTION) {
        const size_t floats = (size_t)(is->heads / is->kv_heads) * (2 + l->padded);
        if (floats > m->attention_floats) m->attention_floats = floats;
        return;
    }
    const int delta = is->mixer == EW_DELTA, key = delta ? is->head_dim : is->state_dim;
    const int value = delta ? is->state_dim : is->head_dim;
    l->channels = is->mixer == EW_CONV ? m->config.hidden : is->heads * value + 2 * is->kv_heads * key;
    l->blocks = ceil_div(value, BLOCK);
    l->conv_at = m->state_floats;
    l->state_at = l->conv_at + (size_t)(is->kernel - 1) * l->channels;
    m->state_floats = l->state_at + (is->mixer == EW_CONV ? 0 : (size_t)is->heads * l->blocks * key * BLOCK);
    if (padded_heads > m->narrow) m->narrow = padded_heads;
}

int check_config(opening *o, const ew_config *c) {
    ew_model *m = o->model;
    int sane = within(c->vocab, 1, 1 << 24) && within(c->hidden, 1, 1 << 18) && within(c->layers, 1, 1 << 12)
            && within(c->max_context, 1, 1 << 23) && within(c->activation, EW_SILU, EW_GELU_TANH)
            && within(c->norm_order, EW_PRE, EW_BOTH) && within(c->qk_norm, EW_NO_NORM, EW_ALL_HEADS)
            && within(c->router, EW_SOFTMAX, EW_SIGMOID) && within(c->per_layer, 0, 1 << 13) && c->per_layer % TILE == 0
            && c->layers * (int64_t)c->per_layer < 1 << 24 && o->tensors >= 0 && o->tensors < 1 << 24;
    const float scales[] = {c->attention_scale, c->attention_softcap, c->logits_softcap};
    for (int i = 0; i < 3; i++) sane = sane && scales[i] >= 0 && scales[i] < INFINITY;
    int ropes = 0, widest = 0;
    for (int i = 0; sane && i < c->layers; i++) {
        const ew_layer *l = &c->layer[i];
        sane = within(l->mixer, EW_ATTENTION, EW_MAMBA) && within(l->mlp, 1, 1 << 20) && within(l->shared, 0, 1 << 20)
            && within(l->experts, 0, 1 << 10) && within(l->experts_per_token, !!l->experts, EW_CHOSEN_MOST)
            && l->experts_per_token <= l->experts
            && (l->mixer == EW_ATTENTION ? check_attention(c, i) : check_recurrent(l));
        if (sane && l->mixer == EW_ATTENTION && l->rope >= ropes) ropes = l->rope + 1;
        if (l->head_dim > widest) widest = l->head_dim;
    }
    if (!sane) return fail(o, EW_LACK "the model's configuration has a value that the native core does not have");
    m->config = *c, m->config.layer = NULL, m->gates = c->attention_gate;
    if (!(m->layers = keep_or_fail(o, c->layers * sizeof(layer))) || !(m->ropes = keep_or_fail(o, ropes * sizeof(rope)))
        || !(m->ones = keep_or_fail(o, widest * sizeof(float)))) return -1;
    for (int i = 0; i < widest; i++) m->ones[i] = 1;
    for (int i = 0; i < c->layers; i++) {
        m->layers[i].is = c->layer[i];
        measure(m, i);
    }
    return 0;
}
