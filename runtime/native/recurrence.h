/* One head's recurrent state through the tokens of a row, compiled by each isa_*.c after kernels.h.
 *
 * The gated delta rule (Yang, Kautz and Hatamizadeh, 2024) and Mamba-2 (Dao and Gu, 2024) differ in whether a value is
 * corrected by what the state already answers to its key. Columns of the state are independent: 32 at a time stay in
 * the nearest cache while all tokens pass, and a lone token reads and writes the state as one run of memory.
 */
enum { ROWS_ABREAST = W == 16 ? 4 : W == 8 ? 2 : 1 };        /* so that 8 sums hide an addition's latency */

/* to (or sums alone where `to` is NULL) of `keys` rows of 32 columns: row = decay row + k d; gives the sum of q row. */
INLINE void pass_rows(int keys, const float *from, float *to, float decay, const float *k, const vf *d, const float *q,
                      float *out) {
    vf sum[ROWS_ABREAST][BLOCK / W];
    EACH(r, ROWS_ABREAST) EACH(c, BLOCK / W) sum[r][c] = splat(0);
    for (int i = 0; i < keys; i += ROWS_ABREAST)
        EACH(r, ROWS_ABREAST) {
            if (i + r >= keys) break;
            const size_t at = (size_t)(i + r) * BLOCK;
            EACH(c, BLOCK / W) {
                vf s = load(from + at + c * W);
                if (to) {
                    s = s * splat(decay) + splat(k[i + r]) * d[c];
                    store(to + at + c * W, s);
                }
                sum[r][c] = s * splat(q[i + r]) + sum[r][c];
            }
        }
    EACH(c, BLOCK / W) {
        EACH(r, ROWS_ABREAST - 1) sum[0][c] += sum[r + 1][c];
        store(out + c * W, sum[0][c]);
    }
}

FUNCTION void recur(const recurrence_job *job) {
    for (int first = 0; first < job->values; first += BLOCK) {
        const size_t block = (size_t)first * job->keys;
        const int columns = job->values - first < BLOCK ? job->values - first : BLOCK;
        float *to = job->to + block, v[BLOCK] = {0}, answer[BLOCK] = {0};
        const float *from = job->from ? job->from + block : to;
        if (!job->from) memset(to, 0, job->keys * BLOCK * sizeof(float));
        for (int i = 0; i < job->tokens; i++, from = to) {
            const float *k = job->k + i * job->stride, *q = job->q + i * job->stride;
            const float decay = job->decay[i], known = job->corrected ? decay * job->key_scale[i] : 0;
            vf d[BLOCK / W];
            memcpy(v, job->v + i * job->stride + first, columns * sizeof(float));
            if (job->corrected) pass_rows(job->keys, from, NULL, 1, k, NULL, k, answer);
            EACH(c, BLOCK / W)
                d[c] = (load(v + c * W) - load(answer + c * W) * known) * (job->strength[i] * job->key_scale[i]);
            pass_rows(job->keys, from, to, decay, k, d, q, v);
            for (int c = 0; c < columns; c++) job->out[i * job->out_stride + first + c] = v[c] * job->query_scale[i];
        }
    }
}
