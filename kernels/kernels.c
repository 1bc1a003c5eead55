/* A ViT block's attention, LayerNorm and tanh-GELU, and a coupling's affine map, in float32, for kernels.py.
 *
 * Compilers turn the vectors below into whatever the CPU has (AVX-512, AVX2, NEON, ...). Rows are split
 * over the threads in fixed parts, so results do not depend on timing. NaN in gives NaN out. Widths of
 * rows are multiples of 16, those of heads need not be. `sums` (threads, width) get column sums added,
 * each thread its own row. All functions return 0, or 1 when memory ran out.
 */
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define WIDE 4 /* vectors per row of a tile of C: 4 x 4 accumulators fit the registers */
#else
#define LANES 8
#define WIDE 2
#endif
#define INLINE static inline __attribute__((always_inline))
#define ROUND_UP(n) (((n) + LANES - 1) / LANES * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* By halves: shorter than one after the other. */
INLINE float sum(vec v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE float maximum(vec v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] = part[i + width] > part[i] ? part[i + width] : part[i];
    return part[0];
}

/* exp to about one unit in the last place, for x cut to [-87.3, 88.3]: x = k ln 2 + r, Cephes' polynomial
 * in r, and k added to the exponent. Adding 1.5 * 2^23 rounds to an integer in the low bits. */
INLINE vec exponential(vec x) {
    const vec zero = {}, low = zero - 87.3f, high = zero + 88.3f;
    x = choose(x < low, low, x);
    x = choose(x > high, high, x);
    vec shifted = x * 1.44269504f + 12582912.f, k = shifted - 12582912.f;
    vec r = x - k * 0.693359375f + k * 2.12194440e-4f; /* ln 2 in two parts */
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    return p * (vec)(((ivec)shifted + (127 - 0x4B400000)) << 23);
}

INLINE vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }

/* C[rows x vectors*LANES] = alpha A B; A[i, k] = a[i * row + k * column]. rows and vectors are constants. */
INLINE void tile(int rows, int vectors, int depth, float alpha, const float *a, long row, long column,
                 const float *b, long b_row, float *c, long c_row) {
    vec total[8][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) total[i][j] = (vec){};
    for (int k = 0; k < depth; k++) {
        vec line[WIDE];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) line[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            float value = a[i * row + k * column];
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) total[i][j] += value * line[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) store(c + i * c_row + j * LANES, alpha * total[i][j]);
}

INLINE void stripe(int rows, int vectors, int m, int depth, float alpha, const float *a, long row, long column,
                   const float *b, long b_row, float *c, long c_row) {
    int i = 0;
    for (; i + rows <= m; i += rows)
        tile(rows, vectors, depth, alpha, a + i * row, row, column, b, b_row, c + i * c_row, c_row);
    for (; i < m; i++)
        tile(1, vectors, depth, alpha, a + i * row, row, column, b, b_row, c + i * c_row, c_row);
}

/* C[m x n] = alpha A B, n a multiple of LANES, everything in the cache. */
static void multiply(int m, int n, int depth, float alpha, const float *a, long row, long column,
                     const float *b, long b_row, float *c, long c_row) {
    int j = 0;
    for (; j + WIDE * LANES <= n; j += WIDE * LANES)
        stripe(4, WIDE, m, depth, alpha, a, row, column, b + j, b_row, c + j, c_row);
    for (; j < n; j += LANES) stripe(8, 1, m, depth, alpha, a, row, column, b + j, b_row, c + j, c_row);
}

/* Rows of s (n values, then padding up to n_pad) become probabilities, the padding 0. */
static void softmax(float *s, int n, int n_pad) {
    for (int i = 0; i < n; i++, s += n_pad) {
        for (int j = n; j < n_pad; j++) s[j] = -INFINITY;
        vec largest = load(s), total = {};
        for (int j = LANES; j < n_pad; j += LANES) largest = choose(load(s + j) > largest, load(s + j), largest);
        const float top = maximum(largest);
        for (int j = 0; j < n_pad; j += LANES) store(s + j, exponential(load(s + j) - top));
        for (int j = n; j < n_pad; j++) s[j] = 0;
        for (int j = 0; j < n_pad; j += LANES) total += load(s + j);
        float inverse = 1 / sum(total);
        for (int j = 0; j < n_pad; j += LANES) store(s + j, load(s + j) * inverse);
    }
}

/* C[n x d] = alpha A B into rows of a larger array; through room[n x d_pad] where d is no multiple of LANES. */
static void multiply_into(float *c, long c_row, int n, int d, int d_pad, float alpha, const float *a, long row,
                          long column, const float *b, float *room) {
    if (d == d_pad) {
        multiply(n, d, n, alpha, a, row, column, b, d_pad, c, c_row);
        return;
    }
    multiply(n, d_pad, n, alpha, a, row, column, b, d_pad, room, d_pad);
    for (int i = 0; i < n; i++) memcpy(c + i * c_row, room + (long)i * d_pad, sizeof(float) * d);
}

/* Zeros, aligned with cache lines; NULL when memory ran out. */
static float *zeros(long count) {
    const size_t bytes = (sizeof(float) * count + 63) / 64 * 64;
    void *memory = aligned_alloc(64, bytes);
    return memory ? memset(memory, 0, bytes) : NULL;
}

typedef struct { /* where one head of one image lies in the arrays */
    long width, in_row, input, output;
} Head;

static Head locate(long pair, int n, int heads, int d) {
    const long width = (long)heads * d, image = pair / heads, head = pair % heads;
    return (Head){width, 3 * width, image * n * 3 * width + head * d, image * n * width + head * d};
}

/* One of q, k, v (part 0, 1, 2) of a head, with its bias, times scale: rows to copy[n x d_pad], columns to
 * transposed[d x n_pad]; either may be NULL. */
static void gather(const float *qkv, const float *bias, Head at, int part, int n, int d, float scale,
                   float *copy, float *transposed) {
    const float *token = qkv + at.input + part * at.width, *b = bias + at.input % at.in_row + part * at.width;
    for (int i = 0; i < n; i++, token += at.in_row) {
        if (copy)
            for (int c = 0; c < d; c++) copy[(long)i * ROUND_UP(d) + c] = scale * (token[c] + b[c]);
        if (transposed)
            for (int c = 0; c < d; c++) transposed[(long)c * ROUND_UP(n) + i] = scale * (token[c] + b[c]);
    }
}

/* Fetch a head's share of the next image's rows: a head's own values lie scattered, which CPUs do not foresee. */
static void prefetch_share(const float *next, long size, int share, int shares) {
    for (long i = size * share / shares; i < size * (share + 1) / shares; i += 64 / sizeof(float))
        __builtin_prefetch(next + i);
}

/* out[b, i, h, :] = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j; qkv (batch, n, 3, heads, d) without its bias
 * (3, heads, d), out (batch, n, heads, d). */
int attention_forward(const float *qkv, const float *bias, float *out, long batch, int n, int heads, int d,
                      int threads) {
    const int n_pad = ROUND_UP(n), d_pad = ROUND_UP(d);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const long keys = (long)d * n_pad, values = (long)n * d_pad, scores = (long)n * n_pad;
        float *k_transposed = zeros(keys + 3 * values + scores), *q = k_transposed + keys,
              *v = q + values, *room = v + values, *p = room + values;
        failed = !k_transposed;
#pragma omp for schedule(static)
        for (long pair = 0; pair < batch * heads; pair++) {
            if (failed) continue;
            const Head at = locate(pair, n, heads, d);
            gather(qkv, bias, at, 0, n, d, 1 / sqrtf(d), q, NULL);
            gather(qkv, bias, at, 1, n, d, 1, NULL, k_transposed);
            gather(qkv, bias, at, 2, n, d, 1, v, NULL);
            multiply(n, n_pad, d, 1, q, d_pad, 1, k_transposed, n_pad, p, n_pad);
            softmax(p, n, n_pad);
            multiply_into(out + at.output, at.width, n, d, d_pad, 1, p, n_pad, 1, v, room);
        }
        free(k_transposed);
    }
    return failed;
}

/* grad_qkv from grad_out, and its column sums, the bias's gradient; the probabilities are computed again. */
int attention_backward(const float *qkv, const float *bias, const float *grad_out, float *grad_qkv, float *sums,
                       long batch, int n, int heads, int d, int threads) {
    const int n_pad = ROUND_UP(n), d_pad = ROUND_UP(d);
    const float scale = 1 / sqrtf(d);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const long keys = (long)d * n_pad, values = (long)n * d_pad, scores = (long)n * n_pad;
        float *k_transposed = zeros(2 * keys + 4 * values + 2 * scores),
              *v_transposed = k_transposed + keys, *q = v_transposed + keys, *k = q + values, *g = k + values,
              *room = g + values, *p = room + values, *ds = p + scores;
        failed = !k_transposed;
#pragma omp for schedule(static)
        for (long pair = 0; pair < batch * heads; pair++) {
            if (failed) continue;
            const Head at = locate(pair, n, heads, d);
            float *grad = grad_qkv + at.input;
            const long image = pair / heads, head = pair % heads;
            if (image + 1 < batch) {
                prefetch_share(qkv + (image + 1) * n * at.in_row, n * at.in_row, head, heads);
                prefetch_share(grad_out + (image + 1) * n * at.width, n * at.width, head, heads);
            }
            gather(qkv, bias, at, 0, n, d, scale, q, NULL);
            gather(qkv, bias, at, 1, n, d, 1, k, k_transposed);
            gather(qkv, bias, at, 2, n, d, 1, NULL, v_transposed);
            for (int i = 0; i < n; i++)
                memcpy(g + (long)i * d_pad, grad_out + at.output + i * at.width, sizeof(float) * d);
            multiply(n, n_pad, d, 1, q, d_pad, 1, k_transposed, n_pad, p, n_pad);
            softmax(p, n, n_pad);
            multiply(n, n_pad, d, 1, g, d_pad, 1, v_transposed, n_pad, ds, n_pad); /* dL/dp */
            multiply_into(grad + 2 * at.width, at.in_row, n, d, d_pad, 1, p, 1, n_pad, g, room);
            for (int i = 0; i < n; i++) {
                const float *p_row = p + (long)i * n_pad;
                float *ds_row = ds + (long)i * n_pad;
                vec dot = {};
                for (int j = 0; j < n_pad; j += LANES) dot += load(p_row + j) * load(ds_row + j);
                const float mean = sum(dot);
                for (int j = 0; j < n_pad; j += LANES)
                    store(ds_row + j, load(p_row + j) * (load(ds_row + j) - mean));
            }
            multiply_into(grad, at.in_row, n, d, d_pad, scale, ds, n_pad, 1, k, room);
            multiply_into(grad + at.width, at.in_row, n, d, d_pad, 1, ds, 1, n_pad, q, room); /* q has the scale */
            float *total = sums + omp_get_thread_num() * at.in_row + at.input % at.in_row;
            for (int part = 0; part < 3; part++)
                for (int i = 0; i < n; i++)
                    for (int c = 0; c < d; c++)
                        total[part * at.width + c] += grad[i * at.in_row + part * at.width + c];
        }
        free(k_transposed);
    }
    return failed;
}

/* Mean and 1 / deviation of a row. */
INLINE void moments(const float *x, int width, float eps, float *mean, float *rstd) {
    vec total = {}, squares = {};
    for (int j = 0; j < width; j += LANES) total += load(x + j);
    *mean = sum(total) / width;
    for (int j = 0; j < width; j += LANES) {
        vec centred = load(x + j) - *mean;
        squares += centred * centred;
    }
    *rstd = 1 / sqrtf(sum(squares) / width + eps);
}

INLINE void norm_row(const float *x, const float *weight, const float *bias, float *out, int width, float eps) {
    float mean, rstd;
    moments(x, width, eps, &mean, &rstd);
    for (int j = 0; j < width; j += LANES)
        store(out + j, (load(x + j) - mean) * rstd * load(weight + j) + load(bias + j));
}

/* out = LayerNorm(x), both (rows, width). */
int norm_forward(const float *x, const float *weight, const float *bias, float *out, long rows, int width, float eps,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) norm_row(x + i * width, weight, bias, out + i * width, width, eps);
    return 0;
}

/* x += add_bias + residual, and out = LayerNorm(x) unless out is NULL. */
int add_and_norm(float *x, const float *add_bias, const float *residual, const float *weight, const float *bias,
                 float *out, long rows, int width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) {
        float *row = x + i * width;
        for (int j = 0; j < width; j += LANES)
            store(row + j, load(row + j) + load(add_bias + j) + load(residual + i * width + j));
        if (out) norm_row(row, weight, bias, out + i * width, width, eps);
    }
    return 0;
}

/* grad_x = d LayerNorm(x)^T grad, plus residual unless it is NULL. sums (threads, 3, width): for weight, bias,
 * and of grad_x. */
int norm_backward(const float *x, const float *weight, const float *grad, const float *residual, float *grad_x,
                  float *sums, long rows, int width, float eps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *total = sums + omp_get_thread_num() * 3L * width;
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i++) {
            const float *row = x + i * width, *g = grad + i * width;
            float mean, rstd;
            moments(row, width, eps, &mean, &rstd);
            vec plain = {}, scaled = {};
            for (int j = 0; j < width; j += LANES) {
                vec gw = load(g + j) * load(weight + j);
                plain += gw;
                scaled += gw * ((load(row + j) - mean) * rstd);
            }
            const float a = sum(plain) / width, b = sum(scaled) / width;
            for (int j = 0; j < width; j += LANES) {
                vec normed = (load(row + j) - mean) * rstd, gj = load(g + j);
                vec out = (gj * load(weight + j) - a - normed * b) * rstd;
                if (residual) out += load(residual + i * width + j);
                store(grad_x + i * width + j, out);
                store(total + j, load(total + j) + gj * normed);
                store(total + width + j, load(total + width + j) + gj);
                store(total + 2 * width + j, load(total + 2 * width + j) + out);
            }
        }
    }
    return 0;
}

/* The tanh approximation of GELU: y sigmoid(2u), 2u = 2 sqrt(2/pi) (y + 0.044715 y^3). */
#define SLOPE 1.5957691216057308f
#define CUBIC 0.044715f

/* out = gelu(y + bias), (rows, width). */
int gelu_forward(const float *y, const float *bias, float *out, long rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++)
        for (int j = 0; j < width; j += LANES) {
            vec x = load(y + i * width + j) + load(bias + j);
            store(out + i * width + j, x * sigmoid(SLOPE * x * (1.f + CUBIC * x * x)));
        }
    return 0;
}

/* grad, dL/dgelu, becomes dL/dy; out = gelu(y + bias); sums: of dL/dy. */
int gelu_backward(const float *y, const float *bias, float *grad, float *out, float *sums, long rows, int width,
                  int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *total = sums + (long)omp_get_thread_num() * width;
#pragma omp for schedule(static)
        for (long i = 0; i < rows; i++)
            for (int j = 0; j < width; j += LANES) {
                const long at = i * width + j;
                vec x = load(y + at) + load(bias + j), s = sigmoid(SLOPE * x * (1.f + CUBIC * x * x));
                vec value = x * s;
                vec dy = load(grad + at) * (s + value * (1.f - s) * SLOPE * (1.f + 3 * CUBIC * x * x));
                store(grad + at, dy);
                store(out + at, value);
                store(total + j, load(total + j) + dy);
            }
    }
    return 0;
}

/* log sigmoid(x) = min(x, 0) - log(1 + u), u = exp(-|x|); log by Cephes' polynomial, with what 1 + u lost. */
INLINE vec log_sigmoid(vec x) {
    const vec zero = {};
    vec u = exponential(choose(x > zero, -x, x)), w = 1.f + u, lost = (u - (w - 1.f)) / w;
    ivec large = w > 1.41421356f;
    vec f = choose(large, 0.5f * w, w) - 1.f, e = choose(large, zero + 1.f, zero), z = f * f;
    vec p = 7.0376836292e-2f * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    vec log_w = f + (f * z * p - 2.12194440e-4f * e - 0.5f * z) + 0.693359375f * e;
    return choose(x > zero, zero, x) - (log_w + lost);
}

/* The affine map of a coupling, x and z (batch, n, d). Row r of net (batch, n, d) holds d/2 biases and d/2 raw
 * scales for d/2 values: channels (spatial = 0): those at moved[0..d/2) of token r; spatial: the half r % 2 of
 * token moved[r / 2]. */
INLINE float *values_at(float *image, const long *moved, int spatial, int r, int d) {
    return image + (spatial ? moved[r / 2] * d + r % 2 * (d / 2) : (long)r * d);
}

/* forward (inverse = 0): z = (x + bias) m sigmoid(raw) at the moved values and x elsewhere; inverse: x / scale - bias.
 * logdet (batch): the sum of log scale, with a minus for the inverse. */
int affine_forward(const float *x, const float *net, const long *moved, float *z, float *logdet, long batch, int n,
                   int d, int spatial, int inverse, float m, int threads) {
    const int half = d / 2;
    const float log_m = logf(m);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        float value[ROUND_UP(half)], bias[ROUND_UP(half)], raw[ROUND_UP(half)], log_scale[ROUND_UP(half)];
        memset(value, 0, sizeof value), memset(bias, 0, sizeof bias), memset(raw, 0, sizeof raw);
        float *image = z + b * n * d;
        double total = 0;
        memcpy(image, x + b * n * d, sizeof(float) * n * d);
        for (int r = 0; r < n; r++) {
            const float *row = net + (b * n + r) * d;
            float *at = values_at(image, moved, spatial, r, d);
            for (int j = 0; j < half; j++) value[j] = at[spatial ? j : moved[j]];
            memcpy(bias, row, sizeof(float) * half);
            memcpy(raw, row + half, sizeof(float) * half);
            for (int j = 0; j < half; j += LANES) {
                const vec v = load(value + j), t = load(bias + j), scale = m * sigmoid(load(raw + j));
                store(value + j, inverse ? v / scale - t : (v + t) * scale);
                store(log_scale + j, log_sigmoid(load(raw + j)) + log_m);
            }
            for (int j = 0; j < half; j++) at[spatial ? j : moved[j]] = value[j];
            float row_total = 0;
            for (int j = 0; j < half; j++) row_total += log_scale[j];
            total += row_total;
        }
        logdet[b] = inverse ? -total : total;
    }
    return 0;
}

/* grad_x and grad_net from z, net, and the gradients of z (batch, n, d) and logdet (batch). With s = sigmoid(raw):
 * dx = dz m s, dbias = dx, draw = (dz z + dlogdet) (1 - s). */
int affine_backward(const float *z, const float *net, const long *moved, const float *grad_z,
                    const float *grad_logdet, float *grad_x, float *grad_net, long batch, int n, int d, int spatial,
                    float m, int threads) {
    const int half = d / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        float value[ROUND_UP(half)], grad[ROUND_UP(half)], raw[ROUND_UP(half)];
        memset(value, 0, sizeof value), memset(grad, 0, sizeof grad), memset(raw, 0, sizeof raw);
        float *image = grad_x + b * n * d;
        memcpy(image, grad_z + b * n * d, sizeof(float) * n * d);
        for (int r = 0; r < n; r++) {
            const float *of_z = values_at((float *)z + b * n * d, moved, spatial, r, d);
            float *at = values_at(image, moved, spatial, r, d), *out = grad_net + (b * n + r) * d;
            for (int j = 0; j < half; j++) {
                value[j] = of_z[spatial ? j : moved[j]];
                grad[j] = at[spatial ? j : moved[j]];
            }
            memcpy(raw, net + (b * n + r) * d + half, sizeof(float) * half);
            for (int j = 0; j < half; j += LANES) {
                const vec s = sigmoid(load(raw + j)), g = load(grad + j);
                store(raw + j, (g * load(value + j) + grad_logdet[b]) * (1.f - s));
                store(grad + j, g * (m * s));
            }
            for (int j = 0; j < half; j++) at[spatial ? j : moved[j]] = grad[j];
            memcpy(out, grad, sizeof(float) * half);
            memcpy(out + half, raw, sizeof(float) * half);
        }
    }
    return 0;
}
