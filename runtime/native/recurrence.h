/* One head's recurrent state through the tokens of a row, compiled by each isa_*.c after kernels.h.
 *
 * The gated delta rule (Yang, Kautz and Hatamizadeh, 2024) and Mamba-2 (Dao and Gu, 2024) differ in whether a value is
 * corrected by what the state already answers to its key. Columns of the state are independent: 32 at a time stay in
 * the nearest cache while all tokens pass, and a lone token reads and writes the state as one run of memory.
 */
enum { ROWS_ABREAST = W == 16 ? 2 : 1 };             /* with two sums a column, so that 8 hide an addition's latency */

/* The rows of 32 columns. write: row = decay row + k d goes to `to`, and out is the sum of q row; ask: answer is the
 * sum of `next` row, the next token's key, for which the state need not be read again. */
INLINE void pass_rows(const int keys, const float *from, float *to, float decay, const float *k, const vf *d,
                      const float *q, const float *next, float *out, float *answer, const int write, const int ask) {
    vf read[ROWS_ABREAST][BLOCK / W], known[ROWS_ABREAST][BLOCK / W];
    EACH(r, ROWS_ABREAST) EACH(c, BLOCK / W) read[r][c] = known[r][c] = splat(0);
    for (int i = 0; i < keys; i += ROWS_ABREAST)
        EACH(r, ROWS_ABREAST) {
            if (ROWS_ABREAST > 1 && i + r >= keys) break;
            const size_t at = (size_t)(i + r) * BLOCK;
            EACH(c, BLOCK / W) {
                vf s = load(from + at + c * W);
                if (write) {
                    s = splat(k[i + r]) * d[c] + s * splat(decay);
                    store(to + at + c * W, s);
                    read[r][c] = s * splat(q[i + r]) + read[r][c];
                }
                if (ask) known[r][c] = s * splat(next[i + r]) + known[r][c];
            }
        }
    EACH(c, BLOCK / W) {
        EACH(r, ROWS_ABREAST - 1) read[0][c] += read[r + 1][c], known[0][c] += known[r + 1][c];
        if (write) store(out + c * W, read[0][c]);
        if (ask) store(answer + c * W, known[0][c]);
    }
}

FUNCTION void recur(const recurrence_job *job) {
    const int keys = job->keys;
    for (int first = 0; first < job->values; first += BLOCK) {
        const size_t block = (size_t)first * keys;
        const int columns = job->values - first < BLOCK ? job->values - first : BLOCK;
        float *to = job->to + block, v[BLOCK] = {0}, answer[BLOCK] = {0};
        const float *from = job->from ? job->from + block : to, *k = job->k, *q = job->q;
        if (!job->from) memset(to, 0, keys * BLOCK * sizeof(float));
        else if (job->corrected) pass_rows(keys, from, NULL, 0, NULL, NULL, NULL, k, NULL, answer, 0, 1);
        for (int i = 0; i < job->tokens; i++, from = to, k += job->stride, q += job->stride) {
            const float decay = job->decay[i], known = job->corrected ? decay * job->key_scale[i] : 0;
            const float strength = job->strength[i] * job->key_scale[i], *next = k + job->stride;
            vf d[BLOCK / W];
            memcpy(v, job->v + i * job->stride + first, columns * sizeof(float));
            EACH(c, BLOCK / W) d[c] = (load(v + c * W) - load(answer + c * W) * known) * strength;
            if (job->corrected && i + 1 < job->tokens)
                pass_rows(keys, from, to, decay, k, d, q, next, v, answer, 1, 1);
            else pass_rows(keys, from, to, decay, k, d, q, NULL, v, NULL, 1, 0);
            float *out = job->out + i * job->out_stride + first;
            for (int c = 0; c < columns; c++) out[c] = v[c] * job->query_scale[i];
        }
    }
}
