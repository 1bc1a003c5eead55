/* A ViT block's attention, LayerNorm and tanh-GELU, and a coupling's affine map, in float32, for kernels.py.
 *
 * Compilers turn the vectors below into whatever the CPU has (AVX-512, AVX2, NEON, ...). Rows are split
 * over the threads in fixed parts, so results do not depend on timing. NaN in gives NaN out. Widths of
 * rows are multiples of 16, those of heads need not be. `sums` (threads, width) get column sums added,
 * each thread its own row. Functions take the memory that they work in.
 */
#include <math.h>
#include <omp.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#define TALL 12 /* rows of a tile of C: its accumulators fit the registers */
#else
#define LANES 8
#define TALL 6
#endif
#define WIDE 2 /* vectors of a row of a tile */
#define PANEL (WIDE * LANES)
#define INLINE static inline __attribute__((always_inline))
#define ROUND_UP(n) (((n) + LANES - 1) / LANES * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* The larger, the smaller of two; x where it is NaN. */
#ifdef __AVX512F__
INLINE vec at_least(vec low, vec x) { return (vec)_mm512_max_ps((__m512)low, (__m512)x); }
INLINE vec at_most(vec high, vec x) { return (vec)_mm512_min_ps((__m512)high, (__m512)x); }
#elif defined __AVX__
INLINE vec at_least(vec low, vec x) { return (vec)_mm256_max_ps((__m256)low, (__m256)x); }
INLINE vec at_most(vec high, vec x) { return (vec)_mm256_min_ps((__m256)high, (__m256)x); }
#else
INLINE vec at_least(vec low, vec x) { return choose(x < low, low, x); }
INLINE vec at_most(vec high, vec x) { return choose(x > high, high, x); }
#endif

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

#define LOG2_E 1.44269504f
#define SHIFT 12583039.f /* 1.5 * 2^23 + 127: adding it rounds k, and leaves k + 127 in the low bits */

/* 2^(k + r), |r| <= 1/2: a polynomial in r of least relative error, 2e-9, and k into the exponent. */
INLINE vec two_to(vec k_shifted, vec r) {
    vec p = r * 1.5353361940e-4f + 1.3398874404e-3f;
    p = p * r + 9.6184373575e-3f;
    p = p * r + 5.5503324712e-2f;
    p = p * r + 2.4022647914e-1f;
    p = p * r + 6.9314720286e-1f;
    p = p * r + 1.f;
    return p * (vec)((ivec)k_shifted << 23);
}

/* 2^x, for x up to 127; below -126 that of -126. */
INLINE vec power_of_two(vec x) {
    const vec zero = {};
    x = at_least(zero - 126.f, x);
    vec shifted = x + SHIFT;
    return two_to(shifted, x - (shifted - SHIFT));
}

/* exp to about one unit in the last place, for x cut to [-87.3, 88]: x = k ln 2 + r, ln 2 in two parts. */
INLINE vec exponential(vec x) {
    const vec zero = {};
    x = at_most(zero + 88.f, at_least(zero - 87.3f, x));
    vec shifted = x * LOG2_E + SHIFT, k = shifted - SHIFT;
    return two_to(shifted, (x - k * 0.693359375f + k * 2.12194440e-4f) * LOG2_E);
}

INLINE vec sigmoid(vec x) { return 1.f / (1.f + exponential(-x)); }

/* C[rows x vectors*LANES] = A B, or that added to C; A[i, k] = a[i * row + k * column]. rows and vectors
 * are constants. */
INLINE void tile(int rows, int vectors, int depth, const float *a, long row, long column,
                 const float *b, long b_row, float *c, long c_row, int add) {
    vec total[TALL][WIDE];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) total[i][j] = (vec){};
    for (int k = 0; k < depth; k++) {
        vec line[WIDE];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) line[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            float value = a[i * row + k * column];
#pragma GCC unroll 2
            for (int j = 0; j < vectors; j++) total[i][j] += value * line[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            float *at = c + i * c_row + j * LANES;
            store(at, add ? load(at) + total[i][j] : total[i][j]);
        }
}

/* A tile after the other down C[m x vectors*LANES]; the tile from row i on reads A from i * step on. */
INLINE void stripe(int vectors, int m, int depth, const float *a, long step, long row, long column,
                   const float *b, long b_row, float *c, long c_row, int add) {
    int i = 0;
    for (; i + TALL <= m; i += TALL)
        tile(TALL, vectors, depth, a + i * step, row, column, b, b_row, c + i * c_row, c_row, add);
    a += i * step;
    if (step != row) column = m - i; /* the last of the panels of A is narrower */
    for (; i + 4 <= m; i += 4, a += 4 * row)
        tile(4, vectors, depth, a, row, column, b, b_row, c + i * c_row, c_row, add);
    for (; i < m; i++, a += row)
        tile(1, vectors, depth, a, row, column, b, b_row, c + i * c_row, c_row, add);
}

/* C[m x n] = A B, A[m x depth], n a multiple of LANES, all by rows and in the cache. */
static void multiply(int m, int n, int depth, const float *a, long a_row, const float *b, long b_row,
                     float *c, long c_row) {
    int j = 0;
    for (; j + PANEL <= n; j += PANEL)
        stripe(WIDE, m, depth, a, a_row, a_row, 1, b + j, b_row, c + j, c_row, 0);
    if (j < n) stripe(1, m, depth, a, a_row, a_row, 1, b + j, b_row, c + j, c_row, 0);
}

/* C[m x n] = A^T B, A[depth x m], or with add that added to C. */
static void multiply_transposed(int m, int n, int depth, const float *a, long a_row, const float *b, float *c, int add) {
    for (int j = 0; j < n; j += PANEL)
        if (j + PANEL > n) stripe(1, m, depth, a, 1, 1, a_row, b + j, n, c + j, n, add);
        else if (add) stripe(WIDE, m, depth, a, 1, 1, a_row, b + j, n, c + j, n, 1);
        else stripe(WIDE, m, depth, a, 1, 1, a_row, b + j, n, c + j, n, 0);
}

/* B[depth x n], B[k, j] = b[k * row + j * column], as panels of width columns, one after the other and each row by
 * row; the last may be narrower. width, and column or row where it is 1, are constants. */
INLINE void pack(const float *b, long row, long column, int depth, int n, int width, float *panels) {
    int j = 0;
    for (; j + width <= n; j += width, panels += (long)depth * width)
        if (column == 1)
            for (int k = 0; k < depth; k++) memcpy(panels + k * width, b + k * row + j, sizeof(float) * width);
        else
            for (int i = 0; i < width; i++)
                for (int k = 0; k < depth; k++) panels[k * width + i] = b[k * row + (j + i) * column];
    for (int k = 0; k < depth; k++)
        for (int i = 0; i < n - j; i++) panels[k * (n - j) + i] = b[k * row + (j + i) * column];
}

/* C[m x n] = A B, A[m x depth] by rows, B in panels of PANEL columns. */
static void product(int m, int n, int depth, const float *a, const float *panels, float *c) {
    int j = 0;
    for (; j + PANEL <= n; j += PANEL, panels += (long)depth * PANEL)
        stripe(WIDE, m, depth, a, depth, depth, 1, panels, PANEL, c + j, n, 0);
    if (j < n) stripe(1, m, depth, a, depth, depth, 1, panels, LANES, c + j, n, 0);
}

/* C[m x n] += A^T B, A[depth x m] in panels of TALL columns, B[depth x n] in panels of PANEL. */
static void add_product(int m, int n, int depth, const float *columns, const float *panels, float *c) {
    int j = 0;
    for (; j + PANEL <= n; j += PANEL, panels += (long)depth * PANEL)
        stripe(WIDE, m, depth, columns, depth, 1, TALL, panels, PANEL, c + j, n, 1);
    if (j < n) stripe(1, m, depth, columns, depth, 1, TALL, panels, LANES, c + j, n, 1);
}

#define SCORES(n) (ROUND_UP(n) + LANES) /* floats of a row of n scores: room for what powers adds; no power of two */

/* Rows of scores s, times log2 e, become powers of 2, the largest of a row 1, those of the padding 0. After the
 * padding: 1 / their sum, by which a row's powers are its probabilities. */
static void powers(float *s, int rows, int n) {
    const int n_pad = ROUND_UP(n);
    for (int i = 0; i < rows; i++, s += SCORES(n)) {
        for (int j = n; j < n_pad; j++) s[j] = -INFINITY;
        vec largest = load(s), total = {};
        for (int j = LANES; j < n_pad; j += LANES) largest = at_least(largest, load(s + j));
        const float top = maximum(largest);
        for (int j = 0; j < n_pad; j += LANES) {
            vec power = power_of_two(load(s + j) - top); /* 1e-38 in the padding: nothing beside the largest, 1 */
            total += power;
            store(s + j, power);
        }
        for (int j = n; j < n_pad; j++) s[j] = 0;
        s[n_pad] = 1 / sum(total);
    }
}

typedef struct { /* where one head of an image lies: its first value in a row, and how long rows are */
    long width, in_row, first;
} Head;

/* One of q, k, v (part 0, 1, 2) of a head, with its bias, times scale: rows to copy[n x d_pad], columns to
 * transposed[d x n_pad]; either may be NULL. */
static void gather(const float *qkv, const float *bias, Head at, int part, int n, int d, float scale,
                   float *copy, float *transposed) {
    const float *token = qkv + at.first + part * at.width, *b = bias + at.first + part * at.width;
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

#define QUERIES 128 /* that a head works on at a time: their scores stay in the cache */

/* Floats of work that a head takes. */
static long head_room(int n, int d) {
    return 2L * d * ROUND_UP(n) + 6L * n * ROUND_UP(d) + 2L * QUERIES * SCORES(n);
}

/* One head of one image: out[i, h, :] = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j; qkv (n, 3, heads, d) without its
 * bias (3, heads, d), out (n, heads, d). kept: n rows of powers for attend_backward, or NULL. room: head_room zeros,
 * or what another head left there. */
static void attend(const float *qkv, const float *bias, float *kept, float *out, int head, int n, int heads, int d,
                   float *room) {
    const int n_pad = ROUND_UP(n), d_pad = ROUND_UP(d), p_row = SCORES(n);
    const long keys = (long)d * n_pad, values = (long)n * d_pad;
    float *k_transposed = room, *q = room + 2 * keys, *v = q + values, *o = v + values, *p = q + 6 * values;
    const Head at = {(long)heads * d, 3L * heads * d, (long)head * d};
    gather(qkv, bias, at, 0, n, d, LOG2_E / sqrtf(d), q, NULL);
    gather(qkv, bias, at, 1, n, d, 1, NULL, k_transposed);
    gather(qkv, bias, at, 2, n, d, 1, v, NULL);
    for (int i = 0; i < n; i += QUERIES) {
        const int rows = n - i < QUERIES ? n - i : QUERIES;
        if (kept) p = kept + (long)i * p_row;
        multiply(rows, n_pad, d, q + (long)i * d_pad, d_pad, k_transposed, n_pad, p, p_row);
        powers(p, rows, n);
        multiply(rows, d_pad, n, p, p_row, v, d_pad, o, d_pad);
        for (int r = 0; r < rows; r++) {
            float *to = out + at.first + (i + r) * at.width, *from = o + (long)r * d_pad;
            for (int c = 0; c < d; c++) to[c] = p[(long)r * p_row + n_pad] * from[c];
        }
    }
}

/* grad_qkv from grad_out of one head, and its column sums, the bias's gradient, added to sums (3, heads, d); without
 * kept powers they are computed again. */
static void attend_backward(const float *qkv, const float *bias, const float *kept, const float *grad_out,
                            float *grad_qkv, float *sums, int head, int n, int heads, int d, float *room) {
    const int n_pad = ROUND_UP(n), d_pad = ROUND_UP(d), p_row = SCORES(n);
    const long keys = (long)d * n_pad, values = (long)n * d_pad;
    float *k_transposed = room, *v_transposed = k_transposed + keys, *q = v_transposed + keys, *k = q + values,
          *g = k + values, *grads = g + values, *own = grads + 3 * values, *ds = own + (long)QUERIES * p_row;
    const Head at = {(long)heads * d, 3L * heads * d, (long)head * d};
    gather(qkv, bias, at, 0, n, d, LOG2_E / sqrtf(d), q, NULL);
    gather(qkv, bias, at, 1, n, d, 1, k, k_transposed);
    gather(qkv, bias, at, 2, n, d, 1, NULL, v_transposed);
    for (int i = 0; i < n; i += QUERIES) {
        const int rows = n - i < QUERIES ? n - i : QUERIES;
        const long first = (long)i * d_pad;
        const float *p = kept ? kept + (long)i * p_row : own;
        if (!kept) {
            multiply(rows, n_pad, d, q + first, d_pad, k_transposed, n_pad, own, p_row);
            powers(own, rows, n);
        }
        for (int r = 0; r < rows; r++) { /* g = dL/do / sum: so powers do for probabilities below */
            const float *from = grad_out + at.first + (i + r) * at.width;
            for (int c = 0; c < d; c++) g[first + r * d_pad + c] = p[(long)r * p_row + n_pad] * from[c];
        }
        multiply_transposed(n, d_pad, rows, p, p_row, g + first, grads + 2 * values, i > 0);
        multiply(rows, n_pad, d, g + first, d_pad, v_transposed, n_pad, ds, p_row); /* dL/dp / sum */
        for (int r = 0; r < rows; r++) {
            const float *p_r = p + (long)r * p_row;
            float *ds_r = ds + (long)r * p_row;
            vec dot = {};
            for (int j = 0; j < n_pad; j += LANES) dot += load(p_r + j) * load(ds_r + j);
            const float mean = sum(dot) * p_r[n_pad];
            for (int j = 0; j < n_pad; j += LANES) store(ds_r + j, load(p_r + j) * (load(ds_r + j) - mean));
        }
        multiply(rows, d_pad, n, ds, p_row, k, d_pad, grads + first, d_pad);
        multiply_transposed(n, d_pad, rows, ds, p_row, q + first, grads + values, i > 0);
    }
    const float factors[] = {1 / sqrtf(d), 1 / LOG2_E, 1}; /* q had log2 e */
    for (int part = 0; part < 3; part++)
        for (int i = 0; i < n; i++) {
            const float *from = grads + part * values + (long)i * d_pad;
            float *to = grad_qkv + at.first + i * at.in_row + part * at.width, *total = sums + at.first + part * at.width;
            for (int c = 0; c < d; c++) to[c] = factors[part] * from[c], total[c] += to[c];
        }
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

/* x += add_bias + residual, and out = LayerNorm(x) unless out is NULL. */
static void add_and_norm(float *x, const float *add_bias, const float *residual, const float *weight,
                         const float *bias, float *out, long rows, int width, float eps) {
    for (long i = 0; i < rows; i++) {
        float *row = x + i * width;
        for (int j = 0; j < width; j += LANES)
            store(row + j, load(row + j) + load(add_bias + j) + load(residual + i * width + j));
        if (out) norm_row(row, weight, bias, out + i * width, width, eps);
    }
}

/* grad_x = d LayerNorm(x)^T grad, plus residual unless it is NULL. Added to of_weight, of_bias, and to of_x the column
 * sums of grad_x unless it is NULL. */
static void norm_rows_backward(const float *x, const float *weight, const float *grad, const float *residual,
                               float *grad_x, float *of_weight, float *of_bias, float *of_x, long rows, int width,
                               float eps) {
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
            store(of_weight + j, load(of_weight + j) + gj * normed);
            store(of_bias + j, load(of_bias + j) + gj);
            if (of_x) store(of_x + j, load(of_x + j) + out);
        }
    }
}

/* out = LayerNorm(x), both (rows, width). */
void norm_forward(const float *x, const float *weight, const float *bias, float *out, long rows, int width, float eps,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) norm_row(x + i * width, weight, bias, out + i * width, width, eps);
}

/* Its gradient. sums (threads, 2, width): for weight and bias. */
void norm_backward(const float *x, const float *weight, const float *grad, float *grad_x, float *sums, long rows,
                  int width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        const long first = rows * part / threads * width, count = rows * (part + 1) / threads - rows * part / threads;
        float *total = sums + 2L * part * width;
        norm_rows_backward(x + first, weight, grad + first, NULL, grad_x + first, total, total + width, NULL, count,
                           width, eps);
    }
}

/* The tanh approximation of GELU: y sigmoid(2u), 2u = 2 sqrt(2/pi) (y + 0.044715 y^3). */
#define SLOPE 1.5957691216057308f
#define CUBIC 0.044715f

INLINE vec gelu_power(vec x) {
    const vec zero = {};
    return power_of_two(at_most(zero + 127.f, -SLOPE * LOG2_E * x * (1.f + CUBIC * x * x)));
}

/* out = gelu(y + bias), (rows, width). */
static void gelu(const float *y, const float *bias, float *out, long rows, int width) {
    for (long i = 0; i < rows; i++)
        for (int j = 0; j < width; j += LANES) {
            vec x = load(y + i * width + j) + load(bias + j);
            store(out + i * width + j, x / (1.f + gelu_power(x)));
        }
}

/* grad, dL/dgelu, becomes dL/dy; out = gelu(y + bias); the column sums of dL/dy are added to total. */
static void gelu_backward(const float *y, const float *bias, float *grad, float *out, float *total, long rows,
                          int width) {
    for (long i = 0; i < rows; i++)
        for (int j = 0; j < width; j += LANES) {
            const long at = i * width + j;
            vec x = load(y + at) + load(bias + j), s = 1.f / (1.f + gelu_power(x));
            vec value = x * s;
            vec dy = load(grad + at) * (s + value * (1.f - s) * SLOPE * (1.f + 3 * CUBIC * x * x));
            store(grad + at, dy);
            store(out + at, value);
            store(total + j, load(total + j) + dy);
        }
}

/* A ViT block on h (batch, n, width): its weights, in the order of jet.ViTBlock, and how images are shared out. */
enum { NORM1, NORM1_BIAS, QKV, QKV_BIAS, OUT, OUT_BIAS, NORM2, NORM2_BIAS, FC1, FC1_BIAS, FC2, FC2_BIAS };
#define ROWS 256 /* tokens that a thread works on at a time: their values stay in its cache */

typedef struct {
    long batch, step; /* images; how many at a time */
    int n, width, heads;
    float eps;
} Sizes;

static Sizes sizes_of(long batch, int n, int width, int heads, float eps, int threads) {
    const long most = (batch + threads - 1) / threads, step = ROWS / n;
    return (Sizes){batch, step < 1 ? 1 : step < most ? step : most, n, width, heads, eps};
}

typedef struct { /* what forward keeps of some rows: products without their bias, the residual stream in the middle */
    float *qkv, *attended, *middle, *y, *powers; /* powers may be NULL */
} Kept;

/* Floats a token of its heads' powers, or 0 where they would take more than all else that is kept. */
static long powers_of_token(int n, int width, int heads) {
    const long size = (long)heads * SCORES(n);
    return size <= 9L * width ? size : 0;
}

/* Floats that block_forward keeps for block_backward. */
long block_kept(long batch, int n, int width, int heads) {
    return batch * n * (9L * width + powers_of_token(n, width, heads));
}

static Kept kept_at(float *kept, long rows, long first, int width, long of_token) {
    float *attended = kept + 3 * rows * width, *middle = attended + rows * width, *y = middle + rows * width,
          *powers = y + 4 * rows * width;
    return (Kept){kept + 3 * first * width, attended + first * width, middle + first * width, y + 4 * first * width,
                  of_token ? powers + of_token * first : NULL};
}

/* Those of one head of one image, pair being image * heads + head. */
static float *powers_of(Kept kept, long pair, int n) {
    return kept.powers ? kept.powers + pair * n * SCORES(n) : NULL;
}

static long room_of_thread(Sizes size) {
    return 16 * size.step * size.n * size.width + head_room(size.n, size.width / size.heads);
}

/* A weight (outputs, inputs) in panels: for x W^T (transposed) or for x W. */
static void pack_weight(const float *weight, int outputs, int inputs, int transposed, float *panels) {
    if (transposed) pack(weight, 1, inputs, inputs, outputs, PANEL, panels);
    else pack(weight, inputs, 1, outputs, inputs, PANEL, panels);
}

/* Each thread of a team calls it: the four weights go to panels (12 width^2); returns the thread's own room. */
static float *begin(float *room, const float *const *w, int transposed, Sizes size) {
    const int which[] = {QKV, OUT, FC1, FC2}, outputs[] = {3, 1, 4, 1}, inputs[] = {1, 1, 1, 4}, at[] = {0, 3, 4, 8};
    const long square = (long)size.width * size.width;
    float *own = room + 12 * square + omp_get_thread_num() * room_of_thread(size);
    memset(own, 0, sizeof(float) * head_room(size.n, size.width / size.heads));
#pragma omp for schedule(static)
    for (int i = 0; i < 4; i++)
        pack_weight(w[which[i]], outputs[i] * size.width, inputs[i] * size.width, transposed, room + at[i] * square);
    return own;
}

static void forward_rows(const float *x, const float *const *w, const float *panels, Kept kept, float *out, long images,
                         Sizes size, float *room) {
    const int E = size.width, n = size.n, d = E / size.heads;
    const long rows = images * n, square = (long)E * E;
    float *head = room, *normed = head + head_room(n, d), *activation = normed + rows * E;
    for (long i = 0; i < rows; i++) norm_row(x + i * E, w[NORM1], w[NORM1_BIAS], normed + i * E, E, size.eps);
    product(rows, 3 * E, E, normed, panels, kept.qkv);
    for (long pair = 0; pair < images * size.heads; pair++) {
        const long first = pair / size.heads * n * E;
        attend(kept.qkv + 3 * first, w[QKV_BIAS], powers_of(kept, pair, n), kept.attended + first, pair % size.heads,
               n, size.heads, d, head);
    }
    product(rows, E, E, kept.attended, panels + 3 * square, kept.middle);
    add_and_norm(kept.middle, w[OUT_BIAS], x, w[NORM2], w[NORM2_BIAS], normed, rows, E, size.eps);
    product(rows, 4 * E, E, normed, panels + 4 * square, kept.y);
    gelu(kept.y, w[FC1_BIAS], activation, rows, 4 * E);
    product(rows, E, 4 * E, activation, panels + 8 * square, out);
    add_and_norm(out, w[FC2_BIAS], kept.middle, NULL, NULL, NULL, rows, E, size.eps);
}

/* Floats that block_forward and block_backward work in. */
long block_room(long batch, int n, int width, int heads, int threads) {
    return 12L * width * width + threads * room_of_thread(sizes_of(batch, n, width, heads, 0, threads));
}

/* kept: block_kept floats for block_backward, or NULL. */
void block_forward(const float *h, const float *const *w, float *kept, float *out, float *room, long batch, int n,
                   int width, int heads, float eps, int threads) {
    const Sizes size = sizes_of(batch, n, width, heads, eps, threads);
    const long most = size.step * n, spare = head_room(n, width / heads) + 5 * most * width,
               of_token = powers_of_token(n, width, heads);
#pragma omp parallel num_threads(threads)
    {
        float *own = begin(room, w, 1, size);
#pragma omp for schedule(static)
        for (long image = 0; image < batch; image += size.step) {
            const long images = batch - image < size.step ? batch - image : size.step, first = image * n;
            const Kept at = kept ? kept_at(kept, batch * n, first, width, of_token)
                                 : kept_at(own + spare, most, 0, width, 0);
            forward_rows(h + first * width, w, room, at, out + first * width, images, size, own);
        }
    }
}

/* The gradients of the weights, of one thread: by size those of QKV, OUT, FC1, FC2, then of the vectors. */
typedef struct {
    float *qkv, *out, *fc1, *fc2, *norm1, *norm1_bias, *qkv_bias, *out_bias, *norm2, *norm2_bias, *fc1_bias, *fc2_bias;
} Gradients;

static Gradients gradients_at(float *sums, int width) {
    const long E = width, square = E * E;
    float *v = sums + 12 * square;
    return (Gradients){sums, sums + 3 * square, sums + 4 * square, sums + 8 * square, v, v + E, v + 2 * E, v + 5 * E,
                       v + 6 * E, v + 7 * E, v + 8 * E, v + 12 * E};
}

/* weight's gradient += grad^T x, grad (rows, outputs), x (rows, inputs). */
static void add_gradient(const float *grad, int outputs, const float *x, int inputs, long rows, float *gradient,
                         float *room) {
    pack(grad, outputs, 1, rows, outputs, TALL, room);
    pack(x, inputs, 1, rows, inputs, PANEL, room + rows * outputs);
    add_product(outputs, inputs, rows, room, room + rows * outputs, gradient);
}

static void backward_rows(const float *x, const float *const *w, const float *panels, Kept kept, const float *grad,
                          float *grad_x, Gradients sums, long images, Sizes size, float *room) {
    const int E = size.width, n = size.n, d = E / size.heads;
    const long rows = images * n, square = (long)E * E;
    float *head = room, *activation = head + head_room(n, d), *grad_y = activation + 4 * rows * E,
          *normed = grad_y + 4 * rows * E, *grad_normed = normed + rows * E, *grad_middle = grad_normed + rows * E,
          *packed = grad_middle + rows * E, *grad_qkv = activation, *grad_attended = grad_y; /* two are used again */
    product(rows, 4 * E, E, grad, panels + 8 * square, grad_y);
    gelu_backward(kept.y, w[FC1_BIAS], grad_y, activation, sums.fc1_bias, rows, 4 * E);
    add_gradient(grad, E, activation, 4 * E, rows, sums.fc2, packed);
    for (long i = 0; i < rows; i++) {
        norm_row(kept.middle + i * E, w[NORM2], w[NORM2_BIAS], normed + i * E, E, size.eps);
        for (int j = 0; j < E; j += LANES) store(sums.fc2_bias + j, load(sums.fc2_bias + j) + load(grad + i * E + j));
    }
    add_gradient(grad_y, 4 * E, normed, E, rows, sums.fc1, packed);
    product(rows, E, 4 * E, grad_y, panels + 4 * square, grad_normed);
    norm_rows_backward(kept.middle, w[NORM2], grad_normed, grad, grad_middle, sums.norm2, sums.norm2_bias,
                       sums.out_bias, rows, E, size.eps);
    add_gradient(grad_middle, E, kept.attended, E, rows, sums.out, packed);
    product(rows, E, E, grad_middle, panels + 3 * square, grad_attended);
    for (long pair = 0; pair < images * size.heads; pair++) {
        const long image = pair / size.heads, head_number = pair % size.heads, first = image * n * E;
        if (image + 1 < images) prefetch_share(kept.qkv + 3 * (first + n * E), 3L * n * E, head_number, size.heads);
        attend_backward(kept.qkv + 3 * first, w[QKV_BIAS], powers_of(kept, pair, n), grad_attended + first,
                        grad_qkv + 3 * first, sums.qkv_bias, head_number, n, size.heads, d, head);
    }
    for (long i = 0; i < rows; i++) norm_row(x + i * E, w[NORM1], w[NORM1_BIAS], normed + i * E, E, size.eps);
    add_gradient(grad_qkv, 3 * E, normed, E, rows, sums.qkv, packed);
    product(rows, E, 3 * E, grad_qkv, panels, grad_normed);
    norm_rows_backward(x, w[NORM1], grad_normed, grad_middle, grad_x, sums.norm1, sums.norm1_bias, NULL, rows, E,
                       size.eps);
}

/* The gradients of h and, added to sums (threads, 12 width^2 + 13 width), of the weights, from those of the output. */
void block_backward(const float *h, const float *const *w, float *kept, const float *grad, float *grad_h, float *sums,
                    float *room, long batch, int n, int width, int heads, float eps, int threads) {
    const Sizes size = sizes_of(batch, n, width, heads, eps, threads);
    const long of_token = powers_of_token(n, width, heads);
#pragma omp parallel num_threads(threads)
    {
        float *own = begin(room, w, 0, size);
        const Gradients of = gradients_at(sums + omp_get_thread_num() * (12L * width * width + 13L * width), width);
#pragma omp for schedule(static)
        for (long image = 0; image < batch; image += size.step) {
            const long images = batch - image < size.step ? batch - image : size.step, first = image * n;
            backward_rows(h + first * width, w, room, kept_at(kept, batch * n, first, width, of_token),
                          grad + first * width, grad_h + first * width, of, images, size, own);
        }
    }
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
void affine_forward(const float *x, const float *net, const long *moved, float *z, float *logdet, long batch, int n,
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
}

/* grad_x and grad_net from z, net, and the gradients of z (batch, n, d) and logdet (batch). With s = sigmoid(raw):
 * dx = dz m s, dbias = dx, draw = (dz z + dlogdet) (1 - s). */
void affine_backward(const float *z, const float *net, const long *moved, const float *grad_z,
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
}
