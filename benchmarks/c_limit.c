// The training step with plain sampling in C: what this CPU can do, for `python -m benchmarks.training_step`.
//
// The rule of fasttower's kernels without the shuffle, the item bias, L2 and the exclusion of known positives:
// negative k of the positive at batch position b of step t is the word in lane k % 4 of Philox(key; b, k / 4, t, 0)
// times I >> 32; the loss is 1/B * sum_b [softplus(-x_b+) + sum_k softplus(x_bk)]; dense Adam follows.
// D (dimensions) and N (negatives) are macros. Positives are handled in tiles, so that all but the rows vectorises.
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef D
#define D 64
#endif
#ifndef N
#define N 10
#endif
enum { TILE = 64, QUADS = (N + 3) / 4 };

static void draw(uint32_t items[][TILE], uint32_t first, uint32_t k0, uint32_t k1, uint32_t step, uint64_t num_items) {
    for (uint32_t quad = 0; quad < QUADS; quad++)
        for (int w = 0; w < TILE; w++) {
            uint32_t c0 = first + w, c1 = quad, c2 = step, c3 = 0, key0 = k0, key1 = k1;
            for (int round = 0; round < 10; round++) {
                uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
                c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
                c1 = (uint32_t)p1;
                c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
                c3 = (uint32_t)p0;
                key0 += 0x9E3779B9u;
                key1 += 0xBB67AE85u;
            }
            items[1 + 4 * quad][w] = (c0 * num_items) >> 32;
            items[2 + 4 * quad][w] = (c1 * num_items) >> 32;
            items[3 + 4 * quad][w] = (c2 * num_items) >> 32;
            items[4 + 4 * quad][w] = (c3 * num_items) >> 32;
        }
}

// Cephes' expf for x <= 0.
static inline float exp_negative(float x) {
    x = x < -87 ? -87 : x;
    float z = floorf(x * 1.44269504f + .5f);
    x = x - z * 0.693359375f + z * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1;
    union { int32_t bits; float value; } power = {((int32_t)z + 127) << 23};
    return p * power.value;
}

static double batch(const float *restrict users, const float *restrict items, float *restrict user_gradient,
                    float *restrict item_gradient, const int32_t *user_index, const int32_t *item_index,
                    int64_t size, uint64_t num_items, uint32_t k0, uint32_t k1, uint32_t step) {
    uint32_t drawn[1 + 4 * QUADS][TILE] = {0};
    float x[1 + N][TILE] = {0}, product[TILE], linear[TILE];
    float scale = 1.0f / size;
    double loss = 0;
    for (int64_t first = 0; first < size; first += TILE) {
        int count = size - first < TILE ? (int)(size - first) : TILE;
        for (int w = 0; w < count; w++) drawn[0][w] = item_index[first + w];
        draw(drawn, first, k0, k1, step, num_items);
        for (int w = 0; w < count; w++) {
            const float *u = users + (int64_t)user_index[first + w] * D;
            for (int k = 0; k <= N; k++) {
                const float *v = items + (int64_t)drawn[k][w] * D;
                float sum = 0;
                for (int c = 0; c < D; c++) sum += u[c] * v[c];
                x[k][w] = sum;
            }
        }
        for (int w = 0; w < TILE; w++) {
            product[w] = 1;
            linear[w] = 0;
            x[0][w] = -x[0][w];
        }
        for (int k = 0; k <= N; k++)
            for (int w = 0; w < TILE; w++) {
                float z = x[k][w], e = exp_negative(-fabsf(z));
                product[w] *= 1 + e;
                linear[w] += z > 0 ? z : 0;
                float r = scale / (1 + e);
                x[k][w] = z >= 0 ? r : e * r;
            }
        for (int w = 0; w < count; w++) loss += linear[w] + logf(product[w]);
        for (int w = 0; w < TILE; w++) x[0][w] = -x[0][w];
        for (int w = 0; w < count; w++) {
            const float *u = users + (int64_t)user_index[first + w] * D;
            float *gu = user_gradient + (int64_t)user_index[first + w] * D;
            float row[D], sum[D];
            for (int c = 0; c < D; c++) {
                sum[c] = 0;
                row[c] = u[c];
            }
            for (int k = 0; k <= N; k++) {
                float g = x[k][w];
                const float *v = items + (int64_t)drawn[k][w] * D;
                float *gv = item_gradient + (int64_t)drawn[k][w] * D;
                for (int c = 0; c < D; c++) {
                    sum[c] += g * v[c];
                    gv[c] += g * row[c];
                }
            }
            for (int c = 0; c < D; c++) gu[c] += sum[c];
        }
    }
    return loss;
}

static void adam(float *restrict p, float *restrict g, float *restrict m, float *restrict v, int64_t n,
                 float step_size, float inverse_root) {
    for (int64_t i = 0; i < n; i++) {
        float gradient = g[i];
        float first = 0.9f * m[i] + 0.1f * gradient, second = 0.999f * v[i] + 0.001f * gradient * gradient;
        m[i] = first;
        v[i] = second;
        g[i] = 0;
        p[i] -= step_size * first / (sqrtf(second) * inverse_root + 1e-8f);
    }
}

// Tables, their gradients, first and second moments: users, then items. Rows in the order that they lie in.
double run_steps(float *const tables[8], const int64_t rows[2], const int32_t *user_index, const int32_t *item_index,
                 int64_t num_rows, int64_t batch_size, uint32_t k0, uint32_t k1, double learning_rate,
                 int64_t first_step, int64_t num_steps) {
    double loss = 0;
    int64_t per_epoch = (num_rows + batch_size - 1) / batch_size;
    for (int64_t t = first_step; t < first_step + num_steps; t++) {
        int64_t begin = t % per_epoch * batch_size;
        int64_t size = num_rows - begin < batch_size ? num_rows - begin : batch_size;
        loss += batch(tables[0], tables[1], tables[2], tables[3], user_index + begin, item_index + begin, size,
                      rows[1], k0, k1, (uint32_t)t);
        for (int i = 0; i < 2; i++)
            adam(tables[i], tables[2 + i], tables[4 + i], tables[6 + i], rows[i] * D,
                 (float)(learning_rate / (1 - pow(0.9, t + 1))), (float)(1 / sqrt(1 - pow(0.999, t + 1))));
    }
    return loss;
}
