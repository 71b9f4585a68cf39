// A remote control of llama.cpp for evaluations: several contexts over one model, decoded token by token, with logits, rows of
// the KV cache and tensors of the attention in reach. What is asked and why is the affair of the other end.
//
//   llama-kv-spectral-probe -m MODEL [-t THREADS]
//   llama-kv-spectral-probe -m MODEL --f16|--f32 FILE    writes the model with wider weights, and ends
//
// Commands come on stdin and are answered in order on stdout: one line with a JSON object, followed by as many bytes as its
// "bytes" says (numbers in the byte order of the machine). A command that fails is answered with {"error": "..."} and changes
// nothing, or, where that cannot be, clears its context. Logs go to stderr. The end of stdin ends the program.
//
//   info                                       -> description, hash, n_vocab, n_ctx_train, bos, layers, rope (of the first layer)
//   tokenize    add_special; text              -> i32 tokens
//   detokenize  i32 tokens                     -> text
//   open        n_ctx, n_ubatch, capture, exact, cache: {k, v, rotate} or {ratio, bits, window [, fine] [, basis]}
//                                              -> id, bytes_held, code_bits, ratio
//               exact: rows are kept as they came in, beside the cache, for the errors below
//   close, clear  id
//   decode      id, want: none|last|all [, judge: tokens of this call, ascending]; i32 tokens -> f32 logits, a row per token
//   truncate    id, n                             keeps positions 0 .. n-1
//   rows        id, layer, side: k|v, first, n -> f32 rows
//   set_rows    id, layer, side, first; f32 rows
//   captured    id, layer, tensor: queries|keys|values|attention -> f32, a row per token of the last decode
//               id, layer, tensor: output             -> f32, the rows of the output projection
//               id, layer, tensor: joined|errors      -> f32, a row per token of judge: the sum that the attention goes into (stock
//               caches only), and what the codes change in its output: [whole, values][head][element]
//   branch      id, layer                             -> steps, and the f32 numbers that they need, one after the other: what lies
//               between the output projection and that sum: {op: add|mul, n}, {op: scale, by, plus}, {op: rms_norm|norm, eps}

#include "llama-cpp.h"
#include "llama-ext.h"
#include "llama-kv-spectral.h"

#include "gguf.h"
#include "kv-spectral-errors.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

using json  = nlohmann::ordered_json;
using bytes = std::vector<char>;

// a payload above this is a broken command rather than a wish
static const uint64_t MAX_PAYLOAD = uint64_t(1) << 32;

// what was logged as an error since the command began: llama.cpp's functions return no reasons
static std::string g_errors;

static void log_callback(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_DEBUG) {
        return;
    }
    if (level == GGML_LOG_LEVEL_ERROR) {
        g_errors += text;
    }
    fputs(text, stderr);
}

static std::runtime_error failure(const std::string & what) {
    std::string why = g_errors;
    while (!why.empty() && why.back() == '\n') {
        why.pop_back();
    }
    return std::runtime_error(why.empty() ? what : what + ": " + why);
}

//
// arguments and payloads
//

static uint32_t get_uint(const json & args, const char * key) {
    const auto & value = args.at(key);
    if (!value.is_number_unsigned() || value.get<uint64_t>() > INT32_MAX) {
        throw std::invalid_argument(std::string(key) + " must be a number from 0 to 2147483647");
    }
    return value.get<uint32_t>();
}

static size_t get_choice(const json & args, const char * key, const std::vector<std::string> & choices) {
    const auto it = std::find(choices.begin(), choices.end(), args.at(key).get<std::string>());
    if (it == choices.end()) {
        std::string all;
        for (const auto & c : choices) {
            all += (all.empty() ? "" : ", ") + c;
        }
        throw std::invalid_argument(std::string(key) + " must be one of " + all);
    }
    return it - choices.begin();
}

// tokens of a call of n, in ascending order
static std::vector<size_t> get_judged(const json & args, size_t n) {
    std::vector<size_t> res;
    for (const auto & value : args.value("judge", json::array())) {
        if (!value.is_number_unsigned() || value.get<uint64_t>() >= n || (!res.empty() && value.get<uint64_t>() <= res.back())) {
            throw std::invalid_argument("judge must be ascending numbers below " + std::to_string(n));
        }
        res.push_back(value.get<uint64_t>());
    }
    return res;
}

template <typename T>
static std::vector<T> from_bytes(const bytes & data) {
    if (data.size() % sizeof(T) != 0) {
        throw std::invalid_argument("the payload is not a whole number of elements");
    }
    std::vector<T> res(data.size()/sizeof(T));
    std::copy(data.begin(), data.end(), (char *) res.data());
    return res;
}

template <typename T>
static bytes to_bytes(const std::vector<T> & data) {
    return bytes((const char *) data.data(), (const char *) (data.data() + data.size()));
}

//
// what graphs tell
//

// the cache tensor that a node writes or views, or null
static ggml_tensor * cache_of(const ggml_tensor * t) {
    ggml_tensor * root = t->view_src;
    // all layers of a compressed cache are parts of one tensor
    if (root && strcmp(root->name, "cache_kv_spectral") == 0) {
        root = t->src[0];
    }
    return root && (strncmp(root->name, "cache_k_l", 9) == 0 || strncmp(root->name, "cache_v_l", 9) == 0) ? root : nullptr;
}

static int layer_of(const ggml_tensor * cache) {
    return atoi(cache->name + 9);
}

static bool is_key(const ggml_tensor * cache) {
    return cache->name[6] == 'k';
}

// the node that makes the attention of a layer over a stock cache
static bool is_attention(const ggml_tensor * t) {
    return t->op == GGML_OP_FLASH_ATTN_EXT && cache_of(t->src[1]);
}

// the node that stores the rows of a layer in a compressed cache: arena, k, v, q, plan, k_idxs, result of the attention
static bool is_spectral_append(const ggml_tensor * t) {
    return t->op == GGML_OP_CUSTOM && strncmp(t->name, "spectral_append", 15) == 0;
}

// The node that makes the attention of a layer over a compressed cache, and the op in it that reads the cache: arena, q, k, v,
// plan, mask [, sinks]. Up to 64 tokens there is a second op behind that one.
static const ggml_tensor * spectral_attention(const ggml_tensor * t) {
    if (t->op != GGML_OP_CUSTOM) {
        return nullptr;
    }
    if (t->src[0] && strncmp(t->src[0]->name, "spectral_partials", 17) == 0) {
        return t->src[0];
    }
    return !t->view_src && strncmp(t->name, "spectral_prefill", 16) == 0 ? t : nullptr;
}

enum { SPECTRAL_Q = 1, SPECTRAL_K = 2, SPECTRAL_V = 3, SPECTRAL_MASK = 5, SPECTRAL_SINKS = 6 };

// undoes the Hadamard rotation of quantised values on the result of the attention
static bool is_back_rotation(const ggml_tensor * t) {
    return t->op == GGML_OP_MUL_MAT && strstr(t->src[0]->name, "attn_inp_v_rot") && t->src[1]->view_src && is_attention(t->src[1]->view_src);
}

// the output projection, when a node is the first to work on the result of the attention over a stock cache: sets the layer
static ggml_tensor * output_projection(const ggml_tensor * t, int & il) {
    if (t->op != GGML_OP_MUL_MAT) {
        return nullptr;
    }
    const ggml_tensor * cur = t->src[1];
    while (cur->op == GGML_OP_RESHAPE || cur->op == GGML_OP_VIEW || cur->op == GGML_OP_CONT) {
        cur = cur->src[0];
    }
    if (!is_attention(cur)) {
        return nullptr;
    }
    il = layer_of(cache_of(cur->src[1]));
    return t->src[0];
}

static json describe_rope(const ggml_tensor * rope) {
    const auto param_f32 = [&](int i) {
        float res;
        memcpy(&res, rope->op_params + i, sizeof(res));
        return res;
    };

    std::vector<float> factors;
    if (const ggml_tensor * src = rope->src[2]) {
        if (src->buffer && src->data) {
            factors.resize(ggml_nelements(src));
            ggml_backend_tensor_get(src, factors.data(), 0, ggml_nbytes(src));
        }
    }

    return {
        { "neox",         (rope->op_params[2] & GGML_ROPE_TYPE_NEOX) != 0 },
        { "n_rot",        rope->op_params[1] },
        { "offset",       rope->op_params[15] },
        { "freq_base",    param_f32(5) },
        { "freq_scale",   param_f32(6) },
        { "n_ctx_orig",   rope->op_params[4] },
        { "ext_factor",   param_f32(7) },
        { "beta_fast",    param_f32(9) },
        { "beta_slow",    param_f32(10) },
        { "freq_factors", factors },
    };
}

// a rotation as the compressed cache sees it: null where it stores keys as they are
static json describe_cache_rope(const ggml_tensor * rope) {
    const ggml_tensor * factors = rope ? rope->src[2] : nullptr;
    const bool known = rope && (rope->op_params[2] == GGML_ROPE_TYPE_NORMAL || rope->op_params[2] == GGML_ROPE_TYPE_NEOX);
    return known && (!factors || (factors->buffer && factors->data)) ? describe_rope(rope) : json();
}

// the rotation that made the keys which a node stores, or null
static const ggml_tensor * find_rope(const ggml_tensor * k) {
    while (k && (k->op == GGML_OP_RESHAPE || k->op == GGML_OP_VIEW || k->op == GGML_OP_CONT) && ggml_nelements(k) == ggml_nelements(k->src[0])) {
        k = k->src[0];
    }
    return k && k->op == GGML_OP_ROPE ? k : nullptr;
}

static bool is_vector(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE && t->buffer && t->type == GGML_TYPE_F32 && ggml_nelements(t) == t->ne[0];
}

// What lies between the output projection of a layer and the sum with the residual stream that it goes into.
struct branch {
    json               steps = json::array();
    std::vector<float> numbers;
    std::string        joint;   // the name of the sum
    std::string        refusal; // why this is not known; empty if it is

    void add_vector(const char * op, const ggml_tensor * t) {
        steps.push_back({ { "op", op }, { "n", t->ne[0] } });
        numbers.resize(numbers.size() + t->ne[0]);
        ggml_backend_tensor_get(t, numbers.data() + numbers.size() - t->ne[0], 0, ggml_nbytes(t));
    }

    // takes the node that comes next; false where it is none that can be described
    bool add_node(const ggml_tensor * t, const ggml_tensor * from) {
        const ggml_tensor * other = t->src[0] == from ? t->src[1] : t->src[0];
        float params[2];
        memcpy(params, t->op_params, sizeof(params));

        switch (t->op) {
            case GGML_OP_RESHAPE:
            case GGML_OP_VIEW:
            case GGML_OP_CONT:
                return true;
            case GGML_OP_GET_ROWS: // the tokens with output
                return t->src[0] == from;
            case GGML_OP_ADD:
            case GGML_OP_MUL:
                if (is_vector(other)) {
                    add_vector(t->op == GGML_OP_ADD ? "add" : "mul", other);
                    return true;
                }
                return false;
            case GGML_OP_SCALE:
                steps.push_back({ { "op", "scale" }, { "by", params[0] }, { "plus", params[1] } });
                return true;
            case GGML_OP_NORM:
            case GGML_OP_RMS_NORM:
                steps.push_back({ { "op", t->op == GGML_OP_NORM ? "norm" : "rms_norm" }, { "eps", params[0] } });
                return true;
            default:
                return false;
        }
    }

    // users: the nodes that read a node
    branch(const ggml_tensor * projection, const std::map<const ggml_tensor *, std::vector<const ggml_tensor *>> & users) {
        const auto only_user = [&](const ggml_tensor * t) {
            const auto it = users.find(t);
            return it != users.end() && it->second.size() == 1 ? it->second[0] : nullptr;
        };

        const ggml_tensor * t    = projection;
        const ggml_tensor * next = only_user(t);
        while (next && add_node(next, t)) {
            t    = next;
            next = only_user(t);
        }
        if (!next || next->op != GGML_OP_ADD) {
            refusal = std::string("what follows the output projection is not known: ") + (next ? ggml_op_name(next->op) : "used more than once");
            return;
        }
        // where attention and feed-forward run side by side there are several sums, one after the other
        while (const ggml_tensor * sum = only_user(next)) {
            if (sum->op != GGML_OP_ADD) {
                break;
            }
            next = sum;
        }
        joint = next->name;
    }
};

//
// contexts
//

enum capture_kind { QUERIES, KEYS, VALUES, ATTENTION, N_CAPTURES };

struct context {
    llama_context_ptr ctx;

    bool capture = false;
    bool exact   = false;

    std::map<int, std::array<std::vector<float>, N_CAPTURES>> captured;

    // what the description of the model says about them
    json layers;

    // the rows as they came in, if exact
    std::map<int, exact_rows> rows;

    // tokens of the current ubatch: those that are judged, and those that have an output
    std::vector<size_t> judged;
    std::vector<size_t> outputs;

    // of the judged tokens
    std::map<int, std::vector<float>> errors;
    std::map<int, std::vector<float>> joined;

    std::map<int, branch>      branches;
    std::map<std::string, int> joints; // the layers of these sums

    // by layer; in a compressed cache the arenas are the keys
    std::map<int, ggml_tensor *> k;
    std::map<int, ggml_tensor *> v;

    // the output projections, by layer
    std::map<int, ggml_tensor *> output;

    uint32_t n_pos() const { return llama_memory_seq_pos_max(llama_get_memory(ctx.get()), 0) + 1; }

    size_t tensor_bytes() const {
        size_t res = 0;
        for (const auto * side : { &k, &v }) {
            for (const auto & [_, t] : *side) {
                res += ggml_nbytes(t);
            }
        }
        return res;
    }

    // appends a tensor whose rows are in dimension 0, heads and tokens in the other ones
    void read(capture_kind what, const ggml_tensor * cache, const ggml_tensor * t, int dim_head, int dim_token) {
        read(captured[layer_of(cache)][what], t, dim_head, dim_token);
    }

    static void read(std::vector<float> & dst, const ggml_tensor * t, int dim_head, int dim_token) {
        const int64_t n = t->ne[0];
        const auto to_float = ggml_get_type_traits(t->type)->to_float;

        std::vector<char> raw(ggml_row_size(t->type, n));

        for (int64_t i = 0; i < t->ne[dim_token]; ++i) {
            for (int64_t h = 0; h < t->ne[dim_head]; ++h) {
                ggml_backend_tensor_get(t, raw.data(), i*t->nb[dim_token] + h*t->nb[dim_head], raw.size());

                dst.resize(dst.size() + n);
                if (t->type == GGML_TYPE_F32) {
                    memcpy(dst.data() + dst.size() - n, raw.data(), raw.size());
                } else {
                    to_float(raw.data(), dst.data() + dst.size() - n, n);
                }
            }
        }
    }

    static void keep(std::vector<ggml_fp16_t> & dst, const std::vector<float> & src, size_t n) {
        dst.resize(dst.size() + n);
        ggml_fp32_to_fp16_row(src.data() + src.size() - n, dst.data() + dst.size() - n, n);
    }

    // forgets the rows of positions from n on
    void truncate_rows(size_t n) {
        for (auto & [il, r] : rows) {
            const auto & l = layers.at(il);
            r.k.resize(std::min(r.k.size(), n*l.at("n_head_kv").get<size_t>()*l.at("d_k").get<size_t>()));
            r.v.resize(std::min(r.v.size(), n*l.at("n_head_kv").get<size_t>()*l.at("d_v").get<size_t>()));
        }
    }

    attention_view view(int il, const ggml_tensor * q, const ggml_tensor * mask, int dim_head, int dim_token) const {
        const auto & l = layers.at(il);
        return { q, mask, dim_head, dim_token, l.at("n_head"), l.at("n_head_kv"), l.at("d_k"), l.at("d_v"), l.at("scale"), l.at("softcap") };
    }

    void judge_stock(const ggml_tensor * t) {
        const int il = layer_of(cache_of(t->src[1]));
        if (!judged.empty() && !t->src[4]) {
            append(errors[il], errors_of_cache(view(il, t->src[0], t->src[3], 2, 1), rows[il], k.at(il), v.at(il), judged));
        }
    }

    void judge_rotation(int il, const ggml_tensor * rotation) {
        const auto & l = layers.at(il);
        auto & all = errors[il];
        rotate_back(all, all.size() - std::min(all.size(), 2*judged.size()*l.at("n_head").get<size_t>()*l.at("d_v").get<size_t>()), rotation);
    }

    void judge_spectral(const ggml_tensor * t) {
        const ggml_tensor * op = spectral_attention(t);

        const int il = atoi(strrchr(op->name, '-') + 1);

        std::vector<float> now;
        read(now, op->src[SPECTRAL_K], 1, 2);
        keep(rows[il].k, now, now.size());
        now.clear();
        read(now, op->src[SPECTRAL_V], 1, 2);
        keep(rows[il].v, now, now.size());

        if (!judged.empty() && !op->src[SPECTRAL_SINKS]) {
            attention_replay replay(t, op != t, SPECTRAL_Q, SPECTRAL_MASK);
            append(errors[il], errors_of_ops(view(il, op->src[SPECTRAL_Q], op->src[SPECTRAL_MASK], 1, 2), rows[il], t, replay, judged));
        }
    }

    static void append(std::vector<float> & all, const std::vector<float> & now) {
        all.insert(all.end(), now.begin(), now.end());
    }

    // the sum may have the tokens with output only
    void read_joined(const ggml_tensor * t) {
        auto & dst = joined[joints.at(t->name)];

        const bool has_all = t->ne[1] != (int64_t) outputs.size();
        for (const size_t j : judged) {
            const size_t i = has_all ? j : std::lower_bound(outputs.begin(), outputs.end(), j) - outputs.begin();
            dst.resize(dst.size() + t->ne[0]);
            ggml_backend_tensor_get(t, dst.data() + dst.size() - t->ne[0], i*t->nb[1], t->ne[0]*sizeof(float));
        }
    }

    static bool callback(ggml_tensor * t, bool ask, void * user_data) {
        auto & self = *(context *) user_data;

        const bool stores   = t->op == GGML_OP_SET_ROWS && cache_of(t);
        const bool attends  = self.exact && spectral_attention(t);
        const bool is_joint = !self.judged.empty() && self.joints.count(t->name) > 0;

        if (ask) {
            return stores || attends || is_joint || is_attention(t) || is_back_rotation(t) || is_spectral_append(t);
        }

        if (stores) {
            const capture_kind what = is_key(cache_of(t)) ? KEYS : VALUES;
            self.read(what, cache_of(t), t->src[0], 2, 1);
            if (self.exact) {
                const int il = layer_of(cache_of(t));
                self.keep(what == KEYS ? self.rows[il].k : self.rows[il].v, self.captured[il][what], ggml_nelements(t->src[0]));
            }
        } else if (is_joint) {
            self.read_joined(t);
        } else if (attends) {
            self.judge_spectral(t);
        } else if (is_attention(t)) {
            self.read(QUERIES,   cache_of(t->src[1]), t->src[0], 2, 1);
            self.read(ATTENTION, cache_of(t->src[1]), t, 1, 2);
            if (self.exact) {
                self.judge_stock(t);
            }
        } else if (is_back_rotation(t)) {
            const ggml_tensor * cache = cache_of(t->src[1]->view_src->src[1]);
            auto & dst = self.captured[layer_of(cache)][ATTENTION];
            dst.resize(dst.size() - ggml_nelements(t));
            self.read(ATTENTION, cache, t, 2, 1);
            self.judge_rotation(layer_of(cache), t->src[0]);
        } else {
            self.read(KEYS,      cache_of(t), t->src[1], 1, 2);
            self.read(VALUES,    cache_of(t), t->src[2], 1, 2);
            self.read(QUERIES,   cache_of(t), t->src[3], 1, 2);
            self.read(ATTENTION, cache_of(t), t->src[6], 2, 1);
        }

        return true;
    }
};

//
// probe
//

struct probe {
    llama_model_ptr   model;
    const std::string path; // its file
    const int         n_threads;

    json info;

    std::map<uint32_t, std::unique_ptr<context>> contexts;
    uint32_t next_id = 0;

    probe(llama_model_ptr && m, const std::string & path, int n_threads) : model(std::move(m)), path(path), n_threads(n_threads) {
        info = describe();
    }

    const llama_vocab * vocab() const { return llama_model_get_vocab(model.get()); }

    llama_context_params base_params(uint32_t n_ctx, uint32_t n_ubatch) const {
        auto params = llama_context_default_params();
        params.n_ctx           = n_ctx;
        params.n_batch         = n_ubatch;
        params.n_ubatch        = n_ubatch;
        params.n_threads       = n_threads;
        params.n_threads_batch = n_threads;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        // a cell per position in every layer, so that the cell of a row is its position
        params.swa_full        = true;
        // on the CPU, where no fused kernel leaves tensors out that are to be read
        params.offload_kqv     = false;
        params.op_offload      = false;
        return params;
    }

    // the graph knows the layers better than the metadata do: heads per layer, and how keys are rotated
    json describe() const {
        llama_context_ptr ctx { llama_init_from_model(model.get(), base_params(256, 1)) };
        ggml_cgraph * gf = ctx ? llama_graph_reserve(ctx.get(), 1, 1, 1) : nullptr;
        if (!gf) {
            throw failure("this model has no context with flash attention");
        }

        char description[256] = "";
        llama_model_desc(model.get(), description, sizeof(description));

        json layers = json::array();
        for (int il = 0; il < llama_model_n_layer(model.get()); ++il) {
            layers.push_back({ { "n_head", 0 }, { "n_head_kv", 0 }, { "d_k", 0 }, { "d_v", 0 }, { "scale", 0.0f }, { "softcap", 0.0f }, { "rope", nullptr } });
        }

        json rope;
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            const ggml_tensor * t = ggml_graph_node(gf, i);

            if (is_attention(t)) {
                const ggml_tensor * q = t->src[0];
                const ggml_tensor * k = t->src[1];
                const ggml_tensor * v = t->src[2];
                float scale   = 0.0f;
                float softcap = 0.0f;
                memcpy(&scale,   t->op_params + 0, sizeof(scale));
                memcpy(&softcap, t->op_params + 2, sizeof(softcap));
                layers.at(layer_of(cache_of(k))).update({
                    { "n_head", q->ne[2] }, { "n_head_kv", k->ne[2] }, { "d_k", k->ne[0] }, { "d_v", v->ne[0] },
                    { "scale", scale }, { "softcap", softcap },
                });
            }
            if (t->op == GGML_OP_SET_ROWS && cache_of(t) && is_key(cache_of(t))) {
                layers.at(layer_of(cache_of(t)))["rope"] = describe_cache_rope(find_rope(t->src[0]));
            }
            if (rope.is_null() && t->op == GGML_OP_SET_ROWS && cache_of(t) && is_key(cache_of(t))) {
                if (const ggml_tensor * r = find_rope(t->src[0])) {
                    rope = describe_rope(r);
                }
            }
        }
        if (rope.is_null()) {
            rope = {
                { "neox", false }, { "n_rot", 0 }, { "offset", 0 }, { "freq_base", 0.0f }, { "freq_scale", 1.0f }, { "n_ctx_orig", 0 },
                { "ext_factor", 0.0f }, { "beta_fast", 0.0f }, { "beta_slow", 0.0f }, { "freq_factors", json::array() },
            };
        }

        return {
            { "description", description },
            { "hash",        llama_kv_spectral_model_hash(*model) },
            { "n_vocab",     llama_vocab_n_tokens(vocab()) },
            { "n_ctx_train", llama_model_n_ctx_train(model.get()) },
            { "bos",         llama_vocab_get_add_bos(vocab()) ? json(llama_vocab_bos(vocab())) : json() },
            { "layers",      layers },
            { "rope",        rope },
        };
    }

    // llama.cpp aborts where it is asked for the texts of such a vocabulary
    void check_vocab() const {
        if (llama_vocab_type(vocab()) == LLAMA_VOCAB_TYPE_NONE) {
            throw std::invalid_argument("this model has no vocabulary");
        }
    }

    context & get(const json & args) {
        const auto it = contexts.find(get_uint(args, "id"));
        if (it == contexts.end()) {
            throw std::invalid_argument("there is no context with this id");
        }
        return *it->second;
    }

    std::vector<llama_token> get_tokens(const bytes & in) const {
        auto res = from_bytes<llama_token>(in);
        for (const auto t : res) {
            if (t < 0 || t >= llama_vocab_n_tokens(vocab())) {
                throw std::invalid_argument("token " + std::to_string(t) + " is not in the vocabulary");
            }
        }
        return res;
    }

    bytes tokenize(const json & args, const bytes & text) const {
        const bool add_special = args.at("add_special").get<bool>();

        check_vocab();

        // never more tokens than bytes, but for those around the text
        std::vector<llama_token> tokens(text.size() + 8);
        const int n = llama_tokenize(vocab(), text.data(), text.size(), tokens.data(), tokens.size(), add_special, true);
        if (n < 0) {
            throw failure("the text cannot be tokenized");
        }
        tokens.resize(n);
        return to_bytes(tokens);
    }

    // piece by piece, so that texts can be put together where tokens were taken apart
    bytes detokenize(const bytes & in) const {
        check_vocab();

        bytes text;
        bytes piece(64);
        for (const auto token : get_tokens(in)) {
            int n = llama_token_to_piece(vocab(), token, piece.data(), piece.size(), 0, true);
            if (n < 0) {
                piece.resize(-n);
                n = llama_token_to_piece(vocab(), token, piece.data(), piece.size(), 0, true);
            }
            text.insert(text.end(), piece.begin(), piece.begin() + n);
        }
        return text;
    }

    json open(const json & args) {
        const auto & cache = args.at("cache");

        const uint32_t n_ctx    = get_uint(args, "n_ctx");
        const uint32_t n_ubatch = get_uint(args, "n_ubatch");
        if (n_ctx == 0 || n_ubatch == 0) {
            throw std::invalid_argument("n_ctx and n_ubatch must not be 0");
        }

        auto res = std::make_unique<context>();
        res->exact   = args.at("exact").get<bool>();
        res->capture = args.at("capture").get<bool>() || res->exact;
        res->layers  = info.at("layers");

        auto params = base_params(n_ctx, std::min(n_ctx, n_ubatch));
        if (res->capture) {
            params.cb_eval           = context::callback;
            params.cb_eval_user_data = res.get();
        }

        bool rotate = true;
        if (cache.contains("ratio")) {
            const uint32_t fine  = cache.contains("fine") ? get_uint(cache, "fine") : UINT32_MAX;
            const auto     basis = cache.value("basis", "");
            params.kv_spectral = llama_kv_spectral_config(cache.at("ratio").get<float>(), get_uint(cache, "window"), cache.at("bits").get<float>(), fine, basis.c_str());
            if (params.kv_spectral == 0) {
                throw std::invalid_argument("ratio must be a number from 1 to 64");
            }
        } else {
            params.type_k = get_type(cache, "k");
            params.type_v = get_type(cache, "v");
            rotate        = cache.at("rotate").get<bool>();
        }

        // read by the constructor of the cache and nowhere else
        set_env("LLAMA_ATTN_ROT_DISABLE", rotate ? "0" : "1");
        res->ctx.reset(llama_init_from_model(model.get(), params));
        if (!res->ctx) {
            throw failure("the context cannot be made");
        }

        ggml_cgraph * gf = llama_graph_reserve(res->ctx.get(), params.n_ubatch, 1, params.n_ubatch);
        if (!gf) {
            throw failure("the context has no graph");
        }
        std::map<const ggml_tensor *, std::vector<const ggml_tensor *>> users;
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            for (const ggml_tensor * src : ggml_graph_node(gf, i)->src) {
                if (src) {
                    users[src].push_back(ggml_graph_node(gf, i));
                }
            }
        }
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (ggml_tensor * t = cache_of(ggml_graph_node(gf, i))) {
                (is_key(t) ? res->k : res->v)[layer_of(t)] = t;
            }
            int il = -1;
            if (ggml_tensor * t = output_projection(ggml_graph_node(gf, i), il)) {
                res->output[il] = t;
                const auto & b = res->branches.emplace(il, branch(ggml_graph_node(gf, i), users)).first->second;
                if (res->capture && b.refusal.empty()) {
                    res->joints[b.joint] = il;
                }
            }
        }

        uint64_t held = res->tensor_bytes();
        json code_bits;

        llama_kv_spectral_info compressed;
        if (llama_kv_spectral_get_info(res->ctx.get(), compressed)) {
            held     += compressed.bytes_tables;
            code_bits = compressed.code_bits;
        }

        uint64_t f16 = 0;
        for (const auto & l : info.at("layers")) {
            f16 += l.at("n_head_kv").get<uint64_t>()*(l.at("d_k").get<uint64_t>() + l.at("d_v").get<uint64_t>())*sizeof(ggml_fp16_t);
        }
        f16 *= llama_n_ctx(res->ctx.get());

        const uint32_t id = next_id++;
        contexts[id] = std::move(res);

        return { { "id", id }, { "bytes_held", held }, { "code_bits", code_bits }, { "ratio", (double) f16/held } };
    }

    // the types that -ctk and -ctv take
    static ggml_type get_type(const json & cache, const char * key) {
        static const std::vector<ggml_type> types = {
            GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
        };
        std::vector<std::string> names;
        for (const auto type : types) {
            names.push_back(ggml_type_name(type));
        }
        return types[get_choice(cache, key, names)];
    }

    static void set_env(const char * name, const char * value) {
#ifdef _WIN32
        _putenv_s(name, value);
#else
        setenv(name, value, 1);
#endif
    }

    bytes decode(const json & args, const bytes & in) {
        context & c = get(args);

        llama_context * ctx = c.ctx.get();

        const auto   want    = get_choice(args, "want", { "none", "last", "all" });
        const auto   tokens  = get_tokens(in);
        const auto   first   = c.n_pos();
        const size_t n_vocab = llama_vocab_n_tokens(vocab());

        if (tokens.empty() || tokens.size() > llama_n_ctx(ctx) - first) {
            throw std::invalid_argument(std::to_string(tokens.size()) + " tokens at position " + std::to_string(first) + " of " +
                    std::to_string(llama_n_ctx(ctx)));
        }

        const auto judged = get_judged(args, tokens.size());
        if (!judged.empty() && !c.capture) {
            throw std::invalid_argument("this context was opened without capture");
        }

        c.captured.clear();
        c.errors.clear();
        c.joined.clear();
        c.truncate_rows(first);

        bytes res;
        const size_t n_step = llama_n_ubatch(ctx);
        for (size_t i = 0; i < tokens.size(); i += n_step) {
            const size_t n = std::min(n_step, tokens.size() - i);

            std::vector<llama_token>    token(tokens.begin() + i, tokens.begin() + i + n);
            std::vector<llama_pos>      pos(n);
            std::vector<int32_t>        n_seq(n, 1);
            llama_seq_id                zero = 0;
            std::vector<llama_seq_id *> seq(n, &zero);
            std::vector<int8_t>         output(n, want == 2);

            for (size_t j = 0; j < n; ++j) {
                pos[j] = first + i + j;
            }
            if (want == 1 && i + n == tokens.size()) {
                output[n - 1] = 1;
            }
            const std::vector<int8_t> wanted = output;

            // the last layer goes on with tokens that have an output only
            c.judged.clear();
            for (const size_t j : judged) {
                if (j >= i && j < i + n) {
                    c.judged.push_back(j - i);
                    output[j - i] = 1;
                }
            }
            c.outputs.clear();
            for (size_t j = 0; j < n; ++j) {
                if (output[j]) {
                    c.outputs.push_back(j);
                }
            }

            llama_batch batch = {};
            batch.n_tokens = n;
            batch.token    = token.data();
            batch.pos      = pos.data();
            batch.n_seq_id = n_seq.data();
            batch.seq_id   = seq.data();
            batch.logits   = output.data();

            if (const int err = llama_decode(ctx, batch)) {
                auto * mem = llama_get_memory(ctx);
                if (!llama_memory_seq_rm(mem, 0, first, -1)) {
                    llama_memory_clear(mem, true);
                }
                throw failure("llama_decode failed with " + std::to_string(err));
            }
            for (size_t j = 0; j < n; ++j) {
                if (wanted[j]) {
                    const char * logits = (const char *) llama_get_logits_ith(ctx, j);
                    res.insert(res.end(), logits, logits + n_vocab*sizeof(float));
                }
            }
        }
        return res;
    }

    void truncate(const json & args) {
        context & c = get(args);

        const uint32_t n = get_uint(args, "n");
        if (n > c.n_pos()) {
            throw std::invalid_argument("there are only " + std::to_string(c.n_pos()) + " positions");
        }
        if (!llama_memory_seq_rm(llama_get_memory(c.ctx.get()), 0, n, -1)) {
            throw failure("this cache cannot go back to a position");
        }
    }

    // the part of a cache that n rows from args.first on take
    struct row_range {
        ggml_tensor * cache;
        size_t        offset;
        size_t        n_elements;
    };

    row_range get_rows(const json & args, size_t n) {
        context & c = get(args);

        const auto & side = get_choice(args, "side", { "k", "v" }) == 0 ? c.k : c.v;

        const auto   it    = side.find(get_uint(args, "layer"));
        const size_t first = get_uint(args, "first");

        llama_kv_spectral_info compressed;
        if (it == side.end() || it->second->type != GGML_TYPE_F16 || llama_kv_spectral_get_info(c.ctx.get(), compressed)) {
            throw std::invalid_argument("only layers of a stock f16 cache have rows that can be read and written");
        }
        if (first + n > c.n_pos()) {
            throw std::invalid_argument("there are only " + std::to_string(c.n_pos()) + " positions");
        }
        return { it->second, first*it->second->nb[1], n*it->second->ne[0] };
    }

    bytes read_rows(const json & args) {
        const auto r = get_rows(args, get_uint(args, "n"));

        std::vector<ggml_fp16_t> raw(r.n_elements);
        std::vector<float>       res(r.n_elements);
        ggml_backend_tensor_get(r.cache, raw.data(), r.offset, raw.size()*sizeof(raw[0]));
        ggml_fp16_to_fp32_row(raw.data(), res.data(), raw.size());
        return to_bytes(res);
    }

    void write_rows(const json & args, const bytes & in) {
        const auto   data   = from_bytes<float>(in);
        const size_t n_row  = get_rows(args, 0).cache->ne[0];
        if (data.size() % n_row != 0) {
            throw std::invalid_argument("a row has " + std::to_string(n_row) + " elements");
        }
        const auto r = get_rows(args, data.size()/n_row);

        std::vector<ggml_fp16_t> raw(data.size());
        ggml_fp32_to_fp16_row(data.data(), raw.data(), data.size());
        ggml_backend_tensor_set(r.cache, raw.data(), r.offset, raw.size()*sizeof(raw[0]));
    }

    // [n_embd][n_head*d_v]
    bytes get_output(const context & c, uint32_t il) const {
        const auto it = c.output.find(il);
        if (it == c.output.end()) {
            throw std::invalid_argument("the output projection of this layer is only seen in the graph of a stock cache");
        }
        const ggml_tensor * wo = it->second;

        const auto to_float = ggml_get_type_traits(wo->type)->to_float;
        const auto raw      = read_weights(wo);
        if (raw.empty() || (!to_float && wo->type != GGML_TYPE_F32)) {
            throw std::invalid_argument(std::string("the output projection cannot be read: ") + wo->name);
        }

        std::vector<float> res(ggml_nelements(wo));
        for (int64_t i = 0; i < wo->ne[1]; ++i) {
            float *      row = res.data() + i*wo->ne[0];
            const char * src = raw.data() + i*ggml_row_size(wo->type, wo->ne[0]);
            if (to_float) {
                to_float(src, row, wo->ne[0]);
            } else {
                memcpy(row, src, wo->ne[0]*sizeof(float));
            }
        }
        return to_bytes(res);
    }

    // the bytes of a weight; none if they cannot be had
    std::vector<char> read_weights(const ggml_tensor * t) const {
        std::vector<char> res(ggml_nbytes(t));

        // what a CPU backend has repacked cannot be read back: it is still in the file
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
        if (ggml_backend_buffer_is_host(t->buffer) || (dev && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU)) {
            ggml_backend_tensor_get(t, res.data(), 0, res.size());
            return res;
        }
        const std::unique_ptr<gguf_context, void (*)(gguf_context *)> gguf(gguf_init_from_file(path.c_str(), { true, nullptr }), gguf_free);
        const int64_t i = gguf ? gguf_find_tensor(gguf.get(), t->name) : -1;
        if (i < 0 || gguf_get_tensor_type(gguf.get(), i) != t->type || gguf_get_tensor_size(gguf.get(), i) != ggml_nbytes(t)) {
            return {};
        }
        std::ifstream file(path, std::ios::binary);
        file.seekg(gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), i));
        return file.read(res.data(), res.size()) ? res : std::vector<char>();
    }

    json get_branch(const json & args, bytes & out) {
        const context & c = get(args);

        const auto it = c.branches.find(get_uint(args, "layer"));
        if (it == c.branches.end()) {
            throw std::invalid_argument("what lies behind the attention of this layer is only seen in the graph of a stock cache");
        }
        if (!it->second.refusal.empty()) {
            throw std::invalid_argument(it->second.refusal);
        }
        out = to_bytes(it->second.numbers);
        return { { "steps", it->second.steps } };
    }

    bytes get_captured(const json & args) {
        context & c = get(args);

        const auto what = get_choice(args, "tensor", { "queries", "keys", "values", "attention", "output", "joined", "errors" });
        const auto il   = get_uint(args, "layer");
        if (what == N_CAPTURES) {
            return get_output(c, il);
        }
        if (what > N_CAPTURES) {
            const auto & all = what == N_CAPTURES + 1 ? c.joined : c.errors;
            const auto   it  = all.find(il);
            if (it == all.end()) {
                throw std::invalid_argument("nothing of this layer was judged: no tokens were named, no exact rows are kept, or its attention has sinks");
            }
            return to_bytes(it->second);
        }
        const auto it   = c.captured.find(il);
        if (it == c.captured.end()) {
            throw std::invalid_argument(c.capture ? "nothing of this layer is captured" : "this context was opened without capture");
        }
        return to_bytes(it->second[what]);
    }

    json answer(const json & args, const bytes & in, bytes & out) {
        const auto cmd = args.at("cmd").get<std::string>();

        if (cmd == "info") {
            return info;
        }
        if (cmd == "open") {
            return open(args);
        }
        if (cmd == "branch") {
            return get_branch(args, out);
        }
        if (cmd == "tokenize") {
            out = tokenize(args, in);
        } else if (cmd == "detokenize") {
            out = detokenize(in);
        } else if (cmd == "close") {
            get(args);
            contexts.erase(get_uint(args, "id"));
        } else if (cmd == "clear") {
            llama_memory_clear(llama_get_memory(get(args).ctx.get()), true);
        } else if (cmd == "decode") {
            out = decode(args, in);
        } else if (cmd == "truncate") {
            truncate(args);
        } else if (cmd == "rows") {
            out = read_rows(args);
        } else if (cmd == "set_rows") {
            write_rows(args, in);
        } else if (cmd == "captured") {
            out = get_captured(args);
        } else {
            throw std::invalid_argument("there is no such command");
        }
        return json::object();
    }
};

// false at the end of the input
static bool serve(probe & p) {
    std::string line;
    if (!std::getline(std::cin, line)) {
        return false;
    }

    g_errors.clear();

    json  res;
    bytes out;
    try {
        const json args = json::parse(line);

        bytes in;
        if (args.contains("bytes")) {
            if (!args.at("bytes").is_number_unsigned() || args.at("bytes").get<uint64_t>() > MAX_PAYLOAD) {
                throw std::invalid_argument("bytes is no possible size");
            }
            in.resize(args.at("bytes").get<uint64_t>());
            if (!std::cin.read(in.data(), in.size())) {
                return false;
            }
        }
        res = p.answer(args, in, out);
        res["bytes"] = out.size();
    } catch (const std::exception & e) {
        out.clear();
        res = { { "error", e.what() } };
    }

    // names in messages may be anything
    const std::string head = res.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";

    return fwrite(head.data(), 1, head.size(), stdout) == head.size() && fwrite(out.data(), 1, out.size(), stdout) == out.size() && fflush(stdout) == 0;
}

int main(int argc, char ** argv) {
    std::string path;
    std::string wide;
    llama_ftype ftype = LLAMA_FTYPE_ALL_F32;
    int n_threads = 1;

    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "-m") == 0) {
            path = argv[i + 1];
        } else if (strcmp(argv[i], "-t") == 0) {
            n_threads = std::max(1, atoi(argv[i + 1]));
        } else if (strcmp(argv[i], "--f16") == 0 || strcmp(argv[i], "--f32") == 0) {
            wide  = argv[i + 1];
            ftype = strcmp(argv[i], "--f16") == 0 ? LLAMA_FTYPE_MOSTLY_F16 : LLAMA_FTYPE_ALL_F32;
        }
    }
    if (path.empty()) {
        fprintf(stderr, "usage: %s -m MODEL [-t THREADS], then commands on stdin, see the head of kv-spectral-probe.cpp\n", argv[0]);
        return 1;
    }

#ifdef _WIN32
    _setmode(_fileno(stdin),  _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    std::ios::sync_with_stdio(false);

    llama_log_set(log_callback, nullptr);
    ggml_backend_load_all();
    llama_backend_init();

    if (!wide.empty()) {
        auto params = llama_model_quantize_default_params();
        params.nthread          = n_threads;
        params.ftype            = ftype;
        params.allow_requantize = true;
        return llama_model_quantize(path.c_str(), wide.c_str(), &params) == 0 ? 0 : 1;
    }

    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;

    llama_model_ptr model { llama_model_load_from_file(path.c_str(), params) };
    if (!model) {
        return 1;
    }

    try {
        probe p(std::move(model), path, n_threads);
        while (serve(p)) {
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "%s\n", e.what());
        return 1;
    }

    llama_backend_free();

    return 0;
}
