// What a cache's codes do to the output of the attention, one layer at a time: the same queries attend to the rows as they came
// in (rounded to f16, as a stock cache stores them), and what the cache makes of them is compared with that. Errors of earlier
// layers are in the queries and in the rows, so they are not in the difference.
//
// Everything here is plain arithmetic on one ubatch of one sequence, whose cells are its positions. It must not know who asks.

#pragma once

#include "ggml.h"
#include "ggml-backend.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

// rows of one layer as they came in: [position][KV head][element]
struct exact_rows {
    std::vector<ggml_fp16_t> k;
    std::vector<ggml_fp16_t> v;
};

// Errors are [token][whole, values][head][element]: for each token that was asked for, the whole error of each head's output, then
// the part of the values, which is the error of coded values under the exact weights.

// one attention node, seen as numbers
struct attention_view {
    const ggml_tensor * q;    // f32
    const ggml_tensor * mask; // f16: [cell, token]
    int    q_dim_head;
    int    q_dim_token;
    size_t n_head;
    size_t n_head_kv;
    size_t d_k;
    size_t d_v;
    float  scale;
    float  softcap;

    const float * query(size_t head, size_t token) const {
        return (const float *) ((const char *) q->data + head*q->nb[q_dim_head] + token*q->nb[q_dim_token]);
    }

    float bias(size_t cell, size_t token) const {
        return ggml_fp16_to_fp32(((const ggml_fp16_t *) ((const char *) mask->data + token*mask->nb[1]))[cell]);
    }

    size_t kv_head(size_t head) const { return head/(n_head/n_head_kv); }
};

// in parts, so that a compiler that may not reorder sums can still work on several elements at once
static float dot(const float * a, const float * b, size_t n) {
    std::array<float, 8> sums = {};

    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (size_t j = 0; j < 8; ++j) {
            sums[j] += a[i + j]*b[i + j];
        }
    }
    for (; i < n; ++i) {
        sums[0] += a[i]*b[i];
    }
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

// softmax; hidden rows are -inf and become 0
static void normalize(std::vector<float> & scores) {
    const float largest = *std::max_element(scores.begin(), scores.end());

    double sum = 0.0;
    for (float & s : scores) {
        s = expf(s - largest);
        sum += s;
    }
    for (float & s : scores) {
        s = (float) (s/sum);
    }
}

// what a query gives to each of n rows
static std::vector<float> attention_weights(const attention_view & a, const std::vector<float> & k, size_t n, size_t head, size_t token) {
    const float * q = a.query(head, token);

    std::vector<float> res(n);
    for (size_t c = 0; c < n; ++c) {
        const float bias = a.bias(c, token);
        if (bias == -INFINITY) {
            res[c] = bias;
            continue;
        }
        const float score = a.scale*dot(q, k.data() + (c*a.n_head_kv + a.kv_head(head))*a.d_k, a.d_k);
        res[c] = (a.softcap == 0.0f ? score : a.softcap*tanhf(score/a.softcap)) + bias;
    }
    normalize(res);
    return res;
}

// out += factor * sum of weighted values
static void add_values(const attention_view & a, const std::vector<float> & weights, const std::vector<float> & v, size_t head, float factor, float * out) {
    for (size_t c = 0; c < weights.size(); ++c) {
        const float w = factor*weights[c];
        if (w == 0.0f) {
            continue;
        }
        const float * row = v.data() + (c*a.n_head_kv + a.kv_head(head))*a.d_v;
        for (size_t i = 0; i < a.d_v; ++i) {
            out[i] += w*row[i];
        }
    }
}

static std::vector<float> widened(const std::vector<ggml_fp16_t> & rows) {
    std::vector<float> res(rows.size());
    ggml_fp16_to_fp32_row(rows.data(), res.data(), res.size());
    return res;
}

// the first n rows of a stock cache
static std::vector<float> cached_rows(const ggml_tensor * cache, size_t n) {
    const auto   to_float = ggml_get_type_traits(cache->type)->to_float;
    const size_t width    = cache->ne[0];

    std::vector<char>  raw(ggml_row_size(cache->type, width));
    std::vector<float> res(n*width);
    for (size_t i = 0; i < n; ++i) {
        ggml_backend_tensor_get(cache, raw.data(), i*cache->nb[1], raw.size());
        if (to_float) {
            to_float(raw.data(), res.data() + i*width, width);
        } else {
            memcpy(res.data() + i*width, raw.data(), raw.size());
        }
    }
    return res;
}

// a stock cache: both sides in the same arithmetic, so that nothing but the codes differs
static std::vector<float> errors_of_cache(const attention_view & a, const exact_rows & exact, const ggml_tensor * cache_k, const ggml_tensor * cache_v,
        const std::vector<size_t> & tokens) {
    const size_t n  = exact.k.size()/(a.n_head_kv*a.d_k);
    const auto   k  = widened(exact.k);
    const auto   v  = widened(exact.v);
    const auto   kc = cached_rows(cache_k, n);
    const auto   vc = cached_rows(cache_v, n);

    const size_t size = a.n_head*a.d_v;

    std::vector<float> res(2*size*tokens.size());
    float * out = res.data();
    for (const size_t t : tokens) {
        for (size_t h = 0; h < a.n_head; ++h) {
            const auto weights = attention_weights(a, k, n, h, t);
            float * whole  = out + h*a.d_v;
            float * values = out + h*a.d_v + size;
            add_values(a, attention_weights(a, kc, n, h, t), vc, h,  1.0f, whole);
            add_values(a, weights,                           v,  h, -1.0f, whole);
            add_values(a, weights,                           vc, h,  1.0f, values);
            add_values(a, weights,                           v,  h, -1.0f, values);
        }
        out += 2*size;
    }
    return res;
}

//
// a compressed cache
//

// as ggml keeps them in op_params
struct custom_op {
    ggml_custom_op_t fun;
    int              n_tasks;
    void           * userdata;
};

static void run_custom_op(ggml_tensor * t) {
    custom_op op;
    memcpy(&op, t->op_params, sizeof(op));
    op.fun(t, 0, 1, op.userdata);
}

// Attention ops of a compressed cache, on other queries and another mask of the same shapes. Nothing else is known about them
// than where these two are: in the op that reads the cache, whose result goes through a second op or not.
struct attention_replay {
    ggml_tensor first;
    ggml_tensor second; // unused when there is none
    bool        has_second;
    int         i_q;
    int         i_mask;

    ggml_tensor q;
    ggml_tensor mask;

    std::vector<float>       q_data;
    std::vector<ggml_fp16_t> mask_data;
    std::vector<float>       partials;
    std::vector<float>       out;

    // node: the result of the attention
    attention_replay(const ggml_tensor * node, bool has_second, int i_q, int i_mask) :
        first(has_second ? *node->src[0] : *node), second(*node), has_second(has_second), i_q(i_q), i_mask(i_mask), q(*first.src[i_q]), mask(*first.src[i_mask]) {
        q_data   .resize(ggml_nbytes(&q)/sizeof(float));
        mask_data.resize(ggml_nelements(&mask));
        out      .resize(ggml_nelements(node));

        q.data     = q_data.data();
        mask.nb[1] = mask.ne[0]*sizeof(ggml_fp16_t);
        mask.data  = mask_data.data();

        if (has_second) {
            partials.resize(ggml_nelements(&first));
            first.data  = partials.data();
            replace(second, node->src[0], &first);
            second.data = out.data();
        } else {
            first.data = out.data();
        }
        for (ggml_tensor * t : { &first, &second }) {
            replace(*t, node_mask(node), &mask);
        }
        first.src[i_q] = &q;
    }

    attention_replay(const attention_replay &) = delete;

    const ggml_tensor * node_mask(const ggml_tensor * node) const {
        return (has_second ? node->src[0] : node)->src[i_mask];
    }

    static void replace(ggml_tensor & t, const ggml_tensor * old, ggml_tensor * now) {
        for (auto & src : t.src) {
            if (src == old) {
                src = now;
            }
        }
    }

    size_t n_tokens() const { return q.ne[2]; }

    // the output of a token for queries of zero, whose weights are all in the mask
    const float * run() {
        run_custom_op(&first);
        if (has_second) {
            run_custom_op(&second);
        }
        return out.data();
    }
};

// The output is the op's own. The part of the values comes from the same op on queries of zero: all scores are 0 then, and a mask
// of logarithms makes the weights whatever they shall be. A token has one mask for all heads, so every head takes a token.
static std::vector<float> errors_of_ops(const attention_view & a, const exact_rows & exact, const ggml_tensor * node, attention_replay & replay,
        const std::vector<size_t> & tokens) {
    const size_t n    = exact.k.size()/(a.n_head_kv*a.d_k);
    const auto   k    = widened(exact.k);
    const auto   v    = widened(exact.v);
    const size_t size = a.n_head*a.d_v;

    std::vector<float> res(2*size*tokens.size());

    const size_t n_rows = tokens.size()*a.n_head;
    const size_t n_step = replay.n_tokens();
    const size_t n_mask = replay.mask.ne[0];
    for (size_t i0 = 0; i0 < n_rows; i0 += n_step) {
        const size_t n_used = std::min(n_step, n_rows - i0);
        for (size_t i = 0; i < n_used; ++i) {
            const size_t j = (i0 + i)/a.n_head;
            const size_t h = (i0 + i)%a.n_head;

            float * whole  = res.data() + 2*size*j + h*a.d_v;
            float * values = whole + size;

            auto weights = attention_weights(a, k, n, h, tokens[j]);
            memcpy(whole, (const float *) node->data + size*tokens[j] + h*a.d_v, a.d_v*sizeof(float));
            add_values(a, weights, v, h, -1.0f, whole);

            // the weights that the mask can express
            ggml_fp16_t * mask = replay.mask_data.data() + i*n_mask;
            std::fill(mask, mask + n_mask, ggml_fp32_to_fp16(-INFINITY));
            for (size_t c = 0; c < n; ++c) {
                mask[c]    = ggml_fp32_to_fp16(std::max(logf(weights[c]), weights[c] > 0.0f ? -60000.0f : -INFINITY));
                weights[c] = ggml_fp16_to_fp32(mask[c]);
            }
            normalize(weights);
            add_values(a, weights, v, h, -1.0f, values);
        }
        // tokens that are not needed repeat the first one
        for (size_t i = n_used; i < n_step; ++i) {
            std::copy_n(replay.mask_data.begin(), n_mask, replay.mask_data.begin() + i*n_mask);
        }

        const float * out = replay.run();
        for (size_t i = 0; i < n_used; ++i) {
            const size_t j = (i0 + i)/a.n_head;
            const size_t h = (i0 + i)%a.n_head;

            float * values = res.data() + 2*size*j + size + h*a.d_v;
            for (size_t e = 0; e < a.d_v; ++e) {
                values[e] += out[size*i + h*a.d_v + e];
            }
        }
    }
    return res;
}

// does to errors from the first one on what a node does to the output of the attention: a matrix [n, n] on each n elements
static void rotate_back(std::vector<float> & errors, size_t first, const ggml_tensor * rotation) {
    const size_t n = rotation->ne[0];
    const auto * m = (const float *) rotation->data;

    std::vector<float> block(n);
    for (size_t i = first; i + n <= errors.size(); i += n) {
        std::copy_n(errors.begin() + i, n, block.begin());
        for (size_t r = 0; r < n; ++r) {
            errors[i + r] = dot(m + r*n, block.data(), n);
        }
    }
}
