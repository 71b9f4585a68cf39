/* Shared by the C tests: checks, reproducible model-like rows, and attention written anew in double. */

#ifndef COMMON_H
#define COMMON_H

#include "spectral_kv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_CELLS 1024
#define N_HEAD 8
#define N_HEAD_KV 2
#define GROUP (N_HEAD / N_HEAD_KV)
#define D 64
#define SCALE 0.125f
/* Floats of one row of all heads. */
#define Q_ROW (N_HEAD * D)
#define KV_ROW (N_HEAD_KV * D)
/* f16 of minus infinity: hides a cell. */
#define HIDDEN 0xfc00u

/* The last failure must name this. */
static inline void says(const char *part) {
    if (strstr(skv_last_error(), part) == NULL) {
        fprintf(stderr, "\"%s\" does not say \"%s\"\n", skv_last_error(), part);
        exit(1);
    }
}

/* Not assert(): it must count in every build. */
#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

#define BELOW(limit, value) \
    do { \
        double value_ = (value); \
        if (!(value_ < (limit))) { \
            fprintf(stderr, "%s:%d: %s is %g, not below %g\n", __FILE__, __LINE__, #value, value_, (double)(limit)); \
            exit(1); \
        } \
    } while (0)

#define STATUS(want, call) \
    do { \
        skv_status got_ = (call); \
        if (got_ != (want)) { \
            fprintf(stderr, "%s:%d: %s gives %d (%s: %s), not %s\n", __FILE__, __LINE__, #call, (int)got_, skv_status_str(got_), skv_last_error(), #want); \
            exit(1); \
        } \
    } while (0)

#define OK(call) STATUS(SKV_STATUS_OK, call)

static inline void *allocate(size_t bytes) {
    void *p = calloc(1, bytes);
    CHECK(p != NULL);
    return p;
}

/* Uniform in [-1, 1), a pure function of its arguments: any row can be made again. */
static inline float noise(uint32_t a, uint32_t b) {
    uint32_t x = a * 2654435761u ^ (b + 1u) * 2246822519u;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    x *= 3266489917u;
    x ^= x >> 16;
    return (float)(x >> 8) / 8388608.0f - 1.0f;
}

/* Rotate one head as ggml's NEOX rope does. */
static inline void rotate(float *head, int32_t position) {
    for (int i = 0; i < D / 2; i++) {
        double angle = position * pow(10000.0, -2.0 * i / D);
        double a = head[i], b = head[i + D / 2];
        head[i] = (float)(a * cos(angle) - b * sin(angle));
        head[i + D / 2] = (float)(b * cos(angle) + a * sin(angle));
    }
}

static inline skv_rope neox(void) {
    skv_rope rope;
    OK(skv_rope_init(&rope, sizeof rope));
    rope.pairing = SKV_PAIRING_HALVES;
    rope.n_dims = D;
    return rope;
}

static inline skv_layer_shape shape(void) {
    skv_layer_shape s;
    OK(skv_layer_shape_init(&s, sizeof s));
    s.n_head = N_HEAD;
    s.n_head_kv = N_HEAD_KV;
    s.d_k = s.d_v = D;
    return s;
}

static inline skv_config config(void) {
    skv_config c;
    OK(skv_config_init(&c, sizeof c));
    c.n_cells = N_CELLS;
    c.window = 64;
    return c;
}

/* Query, key and value of the token at a position in a layer: a mean, a decaying spectrum, keys and queries roped. */
static inline void make_row(uint32_t layer, int32_t position, float *q, float *k, float *v) {
    uint32_t seed = layer * 100000u + (uint32_t)position + 1u;
    for (uint32_t i = 0; i < Q_ROW; i++)
        q[i] = noise(seed, i) + 0.4f * noise(layer, 7000u + i);
    for (uint32_t i = 0; i < KV_ROW; i++) {
        float deviation = 2.0f * expf(-(float)(i % D) / 12.0f) + 0.05f;
        k[i] = deviation * noise(seed, 1000u + i) + noise(layer, 8000u + i);
        v[i] = deviation * noise(seed, 2000u + i) + 0.3f * noise(layer, 9000u + i);
    }
    for (int h = 0; h < N_HEAD; h++)
        rotate(q + h * D, position);
    for (int h = 0; h < N_HEAD_KV; h++)
        rotate(k + h * D, position);
}

/* The smallest calibration: of a model with no layers. */
#define EMPTY_CALIBRATION_BYTES 28

static inline void make_empty_calibration(uint64_t model_hash, uint8_t *out) {
    uint32_t version = 4, n_layers = 0, crc = UINT32_MAX;
    memcpy(out, "SKVBASIS", 8);
    memcpy(out + 8, &version, 4);
    memcpy(out + 12, &model_hash, 8);
    memcpy(out + 20, &n_layers, 4);
    for (int i = 0; i < 24 * 8; i++) {
        crc ^= i % 8 == 0 ? out[i / 8] : 0u;
        crc = crc >> 1 ^ (crc & 1u ? 0xedb88320u : 0u);
    }
    crc = ~crc;
    memcpy(out + 24, &crc, 4);
}

static inline double from_half(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double x = exponent == 0 ? ldexp(mantissa, -24) : ldexp(mantissa + 1024, exponent - 25);
    return h & 0x8000 ? -x : x;
}

/* Attention of one query token over dense f16 rows. `hidden`, one f16 per row, may be NULL. */
static inline void naive_attention(const float *q, const uint16_t *k, const uint16_t *v, size_t n_rows, const uint16_t *hidden, double *out) {
    double *score = allocate((n_rows + 1) * sizeof *score);
    for (int h = 0; h < N_HEAD; h++) {
        int kv = h / GROUP;
        double most = -INFINITY, sum = 0.0;
        for (size_t r = 0; r < n_rows; r++) {
            double dot = 0.0;
            for (int i = 0; i < D; i++)
                dot += (double)q[h * D + i] * from_half(k[r * KV_ROW + kv * D + i]);
            score[r] = hidden != NULL && hidden[r] == HIDDEN ? -INFINITY : dot * SCALE;
            most = fmax(most, score[r]);
        }
        memset(out + h * D, 0, D * sizeof *out);
        for (size_t r = 0; r < n_rows; r++) {
            if (score[r] == -INFINITY)
                continue;
            double weight = exp(score[r] - most);
            sum += weight;
            for (int i = 0; i < D; i++)
                out[h * D + i] += weight * from_half(v[r * KV_ROW + kv * D + i]);
        }
        for (int i = 0; i < D && sum > 0.0; i++)
            out[h * D + i] /= sum;
    }
    free(score);
}

/* The largest root-mean-square error of a head of one token, relative to the head's size. */
static inline double head_error(const float *got, const double *want) {
    double worst = 0.0;
    for (int h = 0; h < N_HEAD; h++) {
        double error = 0.0, size = 0.0;
        for (int i = h * D; i < (h + 1) * D; i++) {
            error += (got[i] - want[i]) * (got[i] - want[i]);
            size += want[i] * want[i];
        }
        worst = fmax(worst, sqrt(error / fmax(size, 1e-12)));
    }
    return worst;
}

#endif
