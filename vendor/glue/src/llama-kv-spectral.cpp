#include "llama-kv-spectral.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <mutex>
#include <stdexcept>
#include <string>

//
// settings
//

// llama_context_params has room for 16 bits only, so the settings themselves live in a registry that never shrinks
struct llama_kv_spectral_settings {
    float    ratio;
    uint32_t window;
    float    bits;
    uint32_t fine; // UINT32_MAX = from the context size

    std::string basis; // file of a calibration, empty for none

    uint32_t n_ubatch = 0; // most tokens of a graph; the check fills it in

    bool operator==(const llama_kv_spectral_settings & other) const {
        return ratio == other.ratio && window == other.window && bits == other.bits && fine == other.fine && basis == other.basis &&
            n_ubatch == other.n_ubatch;
    }
};

static std::mutex                              g_settings_mutex;
static std::vector<llama_kv_spectral_settings> g_settings;

// the number of these settings, 0 if there are too many
static uint16_t settings_put(const llama_kv_spectral_settings & settings) {
    std::lock_guard<std::mutex> lock(g_settings_mutex);

    for (size_t i = 0; i < g_settings.size(); ++i) {
        if (g_settings[i] == settings) {
            return i + 1;
        }
    }

    if (g_settings.size() == UINT16_MAX) {
        LLAMA_LOG_ERROR("%s: kv_spectral: too many different settings in one process\n", __func__);
        return 0;
    }

    g_settings.push_back(settings);

    return g_settings.size();
}

uint16_t llama_kv_spectral_config(float ratio, uint32_t window, float bits, uint32_t fine, const char * basis) {
    if (ratio == 0.0f) {
        return 0;
    }

    return settings_put({ ratio, window, bits, fine, basis ? basis : "" });
}

uint64_t llama_kv_spectral_model_hash(const llama_model & model) {
    const auto & hparams = model.hparams;

    // FNV-1a
    uint64_t res = 0xcbf29ce484222325;

    const auto add = [&](const void * data, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            res = (res ^ ((const uint8_t *) data)[i])*0x100000001b3;
        }
    };
    const auto add_norm = [&](const ggml_tensor * t) {
        if (t && t->buffer && t->data && !hparams.no_alloc) {
            std::vector<uint8_t> data(ggml_nbytes(t));
            ggml_backend_tensor_get(t, data.data(), 0, data.size());
            add(data.data(), data.size());
        }
    };

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const uint32_t shape[] = { il, hparams.n_embd, hparams.n_head(il), hparams.n_head_kv(il), hparams.n_embd_head_k(il), hparams.n_embd_head_v(il) };
        add(shape, sizeof(shape));

        const auto & l = model.layers[il];
        for (const ggml_tensor * t : { l.attn_norm, l.attn_norm_b, l.attn_post_norm, l.attn_q_norm, l.attn_k_norm }) {
            add_norm(t);
        }
    }
    add_norm(model.output_norm);

    return res;
}

#ifdef LLAMA_KV_SPECTRAL

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-hybrid-iswa.h"

#include "spectral_kv_llama.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

// the structs of the library, as it fills them
template<typename T> static T skv_new(skv_status (*init)(T *, size_t)) {
    T res;
    init(&res, sizeof(res));
    return res;
}

using skv_calibration_ptr = std::unique_ptr<skv_calibration, void (*)(skv_calibration *)>;

// null when no file was asked for; throws a sentence for the user
static skv_calibration_ptr load_calibration(const llama_kv_spectral_settings & settings, const llama_model & model) {
    skv_calibration_ptr res(nullptr, skv_calibration_free);

    const char * path = settings.basis.c_str();

    // without weights there is nothing to compare with, and nothing but sizes is asked for
    if (settings.basis.empty() || model.hparams.no_alloc) {
        return res;
    }

    std::vector<uint8_t> data;

    std::unique_ptr<FILE, int (*)(FILE *)> file(ggml_fopen(path, "rb"), fclose);
    for (size_t n = 1; file && n > 0;) {
        const size_t n_old = data.size();
        data.resize(n_old + 1024*1024);
        n = fread(data.data() + n_old, 1, data.size() - n_old, file.get());
        data.resize(n_old + n);
    }
    if (!file || ferror(file.get())) {
        throw std::runtime_error(format("the basis file '%s' cannot be read", path));
    }

    skv_calibration * handle = nullptr;
    const skv_status status = skv_calibration_read(data.data(), data.size(), &handle);
    res.reset(handle);
    if (status != SKV_STATUS_OK) {
        throw std::runtime_error(format("the basis file '%s': %s", path, skv_last_error()));
    }

    uint64_t hash = 0;
    if (skv_calibration_model_hash(handle, &hash) != SKV_STATUS_OK || hash != llama_kv_spectral_model_hash(model)) {
        throw std::runtime_error(format("the basis file '%s' was calibrated on another model; make one for this model with `spectral-kv calibrate`", path));
    }

    return res;
}

static bool settings_get(uint16_t config, llama_kv_spectral_settings & res) {
    std::lock_guard<std::mutex> lock(g_settings_mutex);

    if (config == 0 || config > g_settings.size()) {
        return false;
    }

    res = g_settings[config - 1];

    return true;
}

// one condition for the geometry, the arenas and the check
static bool layer_is_compressed(const llama_hparams & hparams, uint32_t il, const llama_kv_spectral::layer_filter_cb & filter) {
    return hparams.has_kv(il) && (!filter || filter(il)) && hparams.n_head_kv(il) > 0;
}

//
// llama_kv_spectral_check
//

// why the model cannot have a compressed cache, or null
static const char * refuse_arch(const llama_model & model) {
    switch (model.arch) {
        case LLM_ARCH_GROK:
            return "Grok needs -fa off, and a compressed KV cache needs flash attention";
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER:
            return "encoder-decoder models add a bias to the attention scores, which the compressed attention does not do";
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_QWEN4EXP:
            return "this architecture attends sparsely, through an index over its own cache layout";
        case LLM_ARCH_KIMI_LINEAR:
        case LLM_ARCH_KIMI_K3:
        case LLM_ARCH_BAILINGMOE3:
        case LLM_ARCH_GLM5_NEXT:
            return "this architecture caches latent keys only (MLA), which are compressed already";
        case LLM_ARCH_GEMMA4_ASSISTANT:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_DFLASH:
            return "this is a draft model that works on the KV cache of another model";
        default:
            break;
    }

    const auto & hparams = model.hparams;

    if (hparams.is_mla()) {
        return "this model caches latent keys only (MLA), which are compressed already";
    }
    if (llama_model_has_encoder(&model)) {
        return "encoder-decoder models attend to a cache that is not a token history";
    }
    if (llm_arch_is_recurrent(model.arch)) {
        return "this is a recurrent model, it has no KV cache";
    }
    if (llm_arch_is_diffusion(model.arch) || !hparams.causal_attn) {
        return "this model does not attend causally, so it has no KV cache";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return "this model uses ALiBi position biases, which are not supported yet";
    }
    if (hparams.n_layer_kv_from_start >= 0) {
        return "this model has layers that reuse the KV cache of other layers, which is not supported yet";
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return "-sm tensor splits the heads of a layer over devices; use -sm layer or -sm none";
    }
    for (const auto & dev : model.devices) {
        const std::string reg = ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev.dev));
        if (reg == "RPC") {
            return "RPC devices cannot run the compressed attention; leave --rpc away";
        }
    }

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (layer_is_compressed(hparams, il, nullptr) && !hparams.is_swa(il)) {
            return nullptr;
        }
    }

    return "no layer of this model attends to the whole context (all use a sliding window), so there is nothing to compress";
}

bool llama_kv_spectral_check(const llama_model & model, llama_context_params & params) {
    std::string why;

    llama_kv_spectral_settings settings;

    if (!settings_get(params.kv_spectral, settings)) {
        why = "llama_context_params.kv_spectral is not a handle from llama_kv_spectral_config()";
    } else if (!(settings.ratio >= 1.0f && settings.ratio <= 64.0f)) {
        why = format("the ratio must be a number from 1 to 64 (is %g)", settings.ratio);
    } else if (!(settings.bits >= 0.0f && settings.bits <= 8.0f)) {
        why = format("the code bits per element must be a number from 0 to 8 (is %g)", settings.bits);
    } else if (skv_abi_version() != SKV_ABI_VERSION) {
        why = format("the library has ABI version %u and llama.cpp was built for %u; rebuild both", skv_abi_version(), (uint32_t) SKV_ABI_VERSION);
    } else if (const char * arch = refuse_arch(model)) {
        why = arch;
    } else if (params.ctx_type == LLAMA_CONTEXT_TYPE_MTP) {
        why = "MTP contexts are not supported; compress the target context only";
    } else if (params.ctx_other != nullptr) {
        why = "a context that shares the memory of another one (ctx_other) is not supported; compress the target context only";
    } else if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        why = "flash attention is off, and a compressed KV cache needs it; leave -fa away";
    } else if (params.type_k != GGML_TYPE_F16 || params.type_v != GGML_TYPE_F16) {
        why = "it replaces -ctk and -ctv; leave them at f16";
    }

    // before anything is allocated; the cache reads it again
    if (why.empty()) {
        try {
            load_calibration(settings, model);
        } catch (const std::exception & e) {
            why = e.what();
        }
    }

    if (!why.empty()) {
        LLAMA_LOG_ERROR("%s: kv_spectral: %s\n", __func__, why.c_str());
        return false;
    }

    // the cache is made for the longest graph that there will be
    settings.n_ubatch = params.n_ubatch == 0 ? params.n_batch : std::min(params.n_ubatch, params.n_batch);

    params.kv_spectral = settings_put(settings);
    if (params.kv_spectral == 0) {
        return false;
    }

    // the probe for automatic flash attention looks at a decode graph, in which a compressed cache has no such node
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    return true;
}

//
// llama_kv_spectral::impl
//

// query tokens per stream up to which the attention works on the compressed rows; above, it rebuilds them a tile at a time
#define SPECTRAL_MAX_DECODE_TOKENS SKV_MAX_QUERIES

// what stands before the plan of each stream in the input tensor
enum spectral_header {
    SPECTRAL_STREAM,
    SPECTRAL_USED, // ints of the plan

    SPECTRAL_HEADER_SIZE = 4,
};

// in place of the type of K in a saved state: no ggml_type, so that a stock cache refuses to read it
#define SPECTRAL_STATE_TYPE (-0x534B56)

// adds the time of its life to a counter
struct spectral_timer {
    uint64_t & ns;

    const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();

    explicit spectral_timer(uint64_t & ns) : ns(ns) {}

    ~spectral_timer() { ns += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count(); }

    spectral_timer(const spectral_timer &) = delete;
};

struct llama_kv_spectral::impl {
    // user data of the ops: graphs are reused, so everything here lives as long as the cache and is constant during a graph
    struct layer {
        layer(impl & owner, uint32_t il, const llama_hparams & hparams) : owner(owner), il(il),
            n_head(hparams.n_head(il)), n_head_kv(hparams.n_head_kv(il)), d_k(hparams.n_embd_head_k(il)), d_v(hparams.n_embd_head_v(il)) {}

        impl & owner;

        const uint32_t il;
        const uint32_t n_head;
        const uint32_t n_head_kv;
        const uint32_t d_k;
        const uint32_t d_v;

        ggml_tensor * arena = nullptr; // a part of the arena of all layers, for the graph to depend on
        skv_layer   * skv   = nullptr;

        bool calibrated = false; // the calibration is set

        float scale   = 0.0f; // 0 = not seen yet
        float softcap = 0.0f;

        // the RoPE frequency factors, fetched once as they may be on a device
        const ggml_tensor * freq_src = nullptr;
        std::vector<float>  freq;

    };

    struct stream {
        skv_table * table = nullptr;

        std::vector<int32_t> plan;
        size_t used    = 0;
        bool   pending = false; // planned and not committed ..
        bool   ran     = false; // .. and perhaps executed, in part or as a whole

        // position and lowest sequence of each cell, -1 when it is empty
        std::vector<int32_t> cell_pos;
        std::vector<int32_t> cell_seq;
        uint32_t n_cells = 0; // those from here on are -1

        skv_cells cells() const {
            auto res = skv_new(skv_cells_init);
            res.pos     = cell_pos.data();
            res.seq     = cell_seq.data();
            res.n_cells = cell_pos.size();

            return res;
        }
    };

    impl(llama_kv_cache & kv) : kv(kv) {}

    ~impl();

    llama_kv_cache & kv;

    llama_kv_spectral_settings settings = {};

    skv_calibration_ptr calibration { nullptr, skv_calibration_free }; // null when the bases are fitted

    size_t        arena_bytes = 0;       // of one stream
    ggml_tensor * arena       = nullptr; // of all streams

    uint8_t * arena_of(int32_t s) const { return (uint8_t *) arena->data + s*arena->nb[2]; }

    skv_geometry  * geom   = nullptr;
    skv_size_report report = skv_new(skv_size_report_init);

    std::vector<std::unique_ptr<layer>> layers; // as kv.layers
    std::vector<stream>                 streams;

    // ops cannot fail: the first error is logged and makes the next ubatch fail
    std::atomic<bool> failed = false;

    FILE * log = nullptr; // env: LLAMA_KV_SPECTRAL_LOG

    uint64_t n_commits = 0;
    uint64_t ns_host   = 0; // of the calling thread between graphs: snapshots, plans, commits

    bool is_paged = false; // use_huge_pages() was called

    // to be called by the thread that made the call
    bool ok(skv_status status, const char * what, const layer * l = nullptr) {
        if (status == SKV_STATUS_OK) {
            return true;
        }
        if (!failed.exchange(true)) {
            const std::string where = l ? format(" in layer %u", l->il) : "";
            LLAMA_LOG_ERROR("kv_spectral: %s%s failed: %s\n", what, where.c_str(), skv_last_error());
        }
        return false;
    }

    // what holds the rows of a stream; points to `ptrs`
    skv_stream stored(uint32_t strm, std::vector<const skv_layer *> & ptrs) const {
        for (const auto & l : layers) {
            ptrs.push_back(l->skv);
        }

        auto res = skv_new(skv_stream_init);
        res.layers      = ptrs.data();
        res.n_layers    = ptrs.size();
        res.arena       = arena_of(strm);
        res.arena_bytes = arena_bytes;

        return res;
    }

    layer & get_layer(int32_t il) { return *layers[kv.map_layer_ids.at(il)]; }

    size_t plan_ints(size_t n_tokens) const {
        // graphs are reserved for more tokens than a stream may have cells, but never run with them
        size_t res = 0;
        if (skv_geometry_plan_ints(geom, std::min<size_t>(n_tokens, kv.get_size()), &res) != SKV_STATUS_OK) {
            throw std::runtime_error("kv_spectral: cannot size the plan of an ubatch");
        }
        return res;
    }

    void use_huge_pages();
    void snapshot(uint32_t strm);
    bool recover();

    skv_stats stats() const;
    uint64_t  bytes_held() const;

    void log_commit(const slot_info & sinfo);

    void set_model(layer & l, const ggml_tensor * k);

    bool get_projection(const layer & l, std::vector<float> & data, skv_projection & res) const;

    const ggml_tensor * find_residual(const layer & l, const ggml_tensor * k) const;
};

llama_kv_spectral::impl::~impl() {
    if (n_commits > 0) {
        const auto st = stats();

        LLAMA_LOG_INFO("kv_spectral: sealed %" PRIu64 " rows in prefill and %" PRIu64 " in decode; attended %" PRIu64 " coded and %" PRIu64
                " exact rows, rebuilt %" PRIu64 "; held %.1f MiB against %.1f MiB f16, ratio %.2f; encode %.1f ms, attend %.1f ms, host %.1f ms\n",
                (uint64_t) st.sealed_prefill, (uint64_t) st.sealed_decode, (uint64_t) st.attended_coded, (uint64_t) st.attended_exact, (uint64_t) st.reconstructed,
                bytes_held()/1024.0/1024.0, report.bytes_f16/1024.0/1024.0, (double) report.bytes_f16/bytes_held(),
                st.ns_encode/1e6, st.ns_attend/1e6, ns_host/1e6);
    }
    for (auto & l : layers) {
        skv_layer_free(l->skv);
    }
    for (auto & st : streams) {
        skv_table_free(st.table);
    }
    skv_geometry_free(geom);
    if (log) {
        fclose(log);
    }
}

// Attention walks through all codes in every step: with small pages address translation misses, and prefetches wait for it.
// A hint: where there are no huge pages nothing changes.
void llama_kv_spectral::impl::use_huge_pages() {
    is_paged = true;
#ifdef __linux__
    // tiles lie in the order in which they are filled: what is not in use yet need not become memory
    if (arena->data && ggml_backend_buffer_is_host(arena->buffer)) {
        const uintptr_t page = 2*1024*1024;
        const uintptr_t i0   = ((uintptr_t) arena->data + page - 1)/page*page;
        const uintptr_t i1   = ((uintptr_t) arena->data + ggml_nbytes(arena))/page*page;
        if (i0 < i1) {
            madvise((void *) i0, i1 - i0, MADV_HUGEPAGE);
        }
    }
#endif
}

// the sequence that all cells in use are in while none of them is in a lower one, or -1
static llama_seq_id lowest_of_all(const llama_kv_cells & cells) {
    for (llama_seq_id seq = 0; seq < LLAMA_MAX_SEQ; ++seq) {
        const size_t n = cells.seq_pos_get(seq).size();
        if (n > 0) {
            return n == cells.get_used() ? seq : -1;
        }
    }
    return -1;
}

// Nobody tells which cells have changed, so all of them are looked at before each step. Their sets of sequences are most of what llama.cpp
// keeps of cells, and are left alone where there is but one answer.
void llama_kv_spectral::impl::snapshot(uint32_t strm) {
    const auto & cells = kv.v_cells[strm];

    auto & st = streams[strm];

    const uint32_t n = cells.used_max_p1();

    const llama_seq_id lowest = lowest_of_all(cells);

    for (uint32_t i = 0; i < n; ++i) {
        st.cell_pos[i] = cells.is_empty(i) ? -1 : cells.pos_get(i);
    }

    for (uint32_t i = 0; i < n; ++i) {
        llama_seq_id seq = st.cell_pos[i] < 0 ? -1 : std::max(lowest, 0);
        if (lowest < 0 && seq >= 0) {
            while (!cells.seq_has(i, seq)) {
                ++seq;
            }
        }

        st.cell_seq[i] = seq;
    }

    for (uint32_t i = n; i < st.n_cells; ++i) {
        st.cell_pos[i] = -1;
        st.cell_seq[i] = -1;
    }

    st.n_cells = n;
}

// a graph that failed or was aborted may have moved rows in some layers: finish that in all, so that the tables fit again
bool llama_kv_spectral::impl::recover() {
    for (size_t s = 0; s < streams.size(); ++s) {
        auto & st = streams[s];

        if (st.pending && st.ran) {
            auto step = skv_new(skv_step_init);
            step.arena       = arena_of(s);
            step.arena_bytes = arena_bytes;
            step.plan        = st.plan.data();
            step.plan_ints   = st.used;

            for (auto & l : layers) {
                if (!ok(skv_layer_replay(l->skv, &step), "recovery after an aborted graph", l.get())) {
                    return false;
                }
            }
            if (!ok(skv_table_commit_replayed(st.table), "recovery after an aborted graph")) {
                return false;
            }
        }

        st.pending = false;
        st.ran     = false;
    }

    return true;
}

skv_stats llama_kv_spectral::impl::stats() const {
    skv_stats res = skv_new(skv_stats_init);

    for (const auto & l : layers) {
        auto cur = skv_new(skv_stats_init);
        if (skv_layer_stats(l->skv, &cur) != SKV_STATUS_OK) {
            continue;
        }

        res.appended_prefill += cur.appended_prefill;
        res.appended_decode  += cur.appended_decode;
        res.sealed_prefill   += cur.sealed_prefill;
        res.sealed_decode    += cur.sealed_decode;
        res.attended_exact   += cur.attended_exact;
        res.attended_coded   += cur.attended_coded;
        res.reconstructed    += cur.reconstructed;
        res.fits             += cur.fits;
        res.moved            += cur.moved;
        res.recoded          += cur.recoded;
        res.ns_encode        += cur.ns_encode;
        res.ns_attend        += cur.ns_attend;
    }

    return res;
}

uint64_t llama_kv_spectral::impl::bytes_held() const {
    return report.bytes_tables + ggml_nbytes(arena);
}

void llama_kv_spectral::impl::log_commit(const slot_info & sinfo) {
    const auto st = stats();

    fprintf(log, "{\"n_tokens\":%zu,\"path\":\"%s\",\"appended_prefill\":%" PRIu64 ",\"appended_decode\":%" PRIu64
            ",\"sealed_prefill\":%" PRIu64 ",\"sealed_decode\":%" PRIu64 ",\"attended_exact\":%" PRIu64 ",\"attended_coded\":%" PRIu64
            ",\"reconstructed\":%" PRIu64 ",\"fits\":%" PRIu64 ",\"ns_encode\":%" PRIu64 ",\"ns_attend\":%" PRIu64
            ",\"ns_host\":%" PRIu64 ",\"bytes_held\":%" PRIu64 ",\"bytes_f16\":%" PRIu64 ",\"ratio\":%.4f,\"code_bits\":%.4f}\n",
            sinfo.n_stream()*sinfo.size(), sinfo.size() <= SPECTRAL_MAX_DECODE_TOKENS ? "decode" : "prefill",
            (uint64_t) st.appended_prefill, (uint64_t) st.appended_decode, (uint64_t) st.sealed_prefill, (uint64_t) st.sealed_decode,
            (uint64_t) st.attended_exact, (uint64_t) st.attended_coded, (uint64_t) st.reconstructed, (uint64_t) st.fits,
            (uint64_t) st.ns_encode, (uint64_t) st.ns_attend,
            ns_host, bytes_held(), (uint64_t) report.bytes_f16, (double) report.bytes_f16/bytes_held(), report.code_bits);
    fflush(log);
}

// The graph is the only place that knows how a layer rotates its keys: hparams say nothing about NoPE layers, per-layer
// scaling or what happens after the rotation. A wrong answer would cost compression, never correctness.
void llama_kv_spectral::impl::set_model(layer & l, const ggml_tensor * k) {
    // without arenas there is nothing to rotate, and the weights cannot be read
    if (kv.hparams.no_alloc) {
        return;
    }

    const ggml_tensor * node = k;
    while ((node->op == GGML_OP_RESHAPE || node->op == GGML_OP_VIEW || node->op == GGML_OP_CONT) && ggml_are_same_shape(node, node->src[0]) &&
            (node->op != GGML_OP_VIEW || (node->view_offs == node->src[0]->view_offs && ggml_are_same_stride(node, node->src[0])))) {
        node = node->src[0];
    }

    const auto param_f32 = [&](int i) {
        float res;
        memcpy(&res, node->op_params + i, sizeof(res));
        return res;
    };

    auto rope = skv_new(skv_rope_init);

    if (node->op == GGML_OP_ROPE && ggml_are_same_shape(node, k)) {
        const int32_t mode = node->op_params[2];

        // the sections of M-RoPE rotate by positions that the cells do not keep
        rope.pairing =
            mode == GGML_ROPE_TYPE_NORMAL ? SKV_PAIRING_ADJACENT :
            mode == GGML_ROPE_TYPE_NEOX   ? SKV_PAIRING_HALVES   : SKV_PAIRING_NONE;
    }

    if (rope.pairing != SKV_PAIRING_NONE) {
        rope.n_dims     = node->op_params[1];
        rope.offset     = node->op_params[15];
        rope.n_ctx_orig = node->op_params[4];
        rope.freq_base  = param_f32(5);
        rope.freq_scale = param_f32(6);
        rope.ext_factor = param_f32(7);
        rope.beta_fast  = param_f32(9);
        rope.beta_slow  = param_f32(10);

        if (const ggml_tensor * src = node->src[2]) {
            if (!src->buffer || !src->data) {
                rope.pairing = SKV_PAIRING_NONE; // computed by the graph, so unknown here
            } else {
                if (l.freq_src != src) {
                    l.freq.resize(ggml_nelements(src));
                    ggml_backend_tensor_get(src, l.freq.data(), 0, ggml_nbytes(src));
                    l.freq_src = src;
                }
                rope.freq_factors   = l.freq.data();
                rope.n_freq_factors = l.freq.size();
            }
        }
    }

    if (rope.pairing == SKV_PAIRING_NONE) {
        rope = skv_new(skv_rope_init);
    }

    skv_status status = skv_layer_set_rope(l.skv, &rope);
    if (status == SKV_STATUS_OK) {
        status = skv_layer_set_scoring(l.skv, l.scale, l.softcap);
    }
    if (status == SKV_STATUS_OK && calibration && !l.calibrated) {
        status = skv_layer_set_calibration(l.skv, calibration.get(), l.il);
        l.calibrated = status == SKV_STATUS_OK;
    }
    if (status != SKV_STATUS_OK) {
        throw std::runtime_error(format("kv_spectral: layer %u: %s", l.il, skv_last_error()));
    }
}

// evenly spaced rows of the output projection, scaled so that they stand for all of it
bool llama_kv_spectral::impl::get_projection(const layer & l, std::vector<float> & data, skv_projection & res) const {
    const ggml_tensor * wo = kv.model.layers[l.il].wo;

    if (!wo || !wo->buffer || !wo->data || wo->ne[0] != (int64_t) l.n_head*l.d_v) {
        return false;
    }

    // weights that a CPU backend has repacked cannot be read back
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(wo->buffer));
    if (!ggml_backend_buffer_is_host(wo->buffer) && (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU)) {
        return false;
    }

    const auto to_float = ggml_get_type_traits(wo->type)->to_float;
    if (!to_float && wo->type != GGML_TYPE_F32) {
        return false;
    }

    const int64_t n_rows = std::min<int64_t>(wo->ne[1], 1024);
    const float   scale  = sqrtf((float) wo->ne[1]/n_rows);

    data.resize(n_rows*wo->ne[0]);

    std::vector<char> raw(ggml_row_size(wo->type, wo->ne[0]));

    for (int64_t i = 0; i < n_rows; ++i) {
        float * row = data.data() + i*wo->ne[0];

        ggml_backend_tensor_get(wo, raw.data(), i*wo->ne[1]/n_rows*wo->nb[1], raw.size());

        if (to_float) {
            to_float(raw.data(), row, wo->ne[0]);
        } else {
            memcpy(row, raw.data(), raw.size());
        }
        for (int64_t j = 0; j < wo->ne[0]; ++j) {
            row[j] *= scale;
        }
    }

    res = skv_new(skv_projection_init);
    res.data   = data.data();
    res.n_rows = n_rows;

    return true;
}

bool llama_kv_spectral_get_info(const llama_context * ctx, llama_kv_spectral_info & res) {
    const llama_memory_i * mem = llama_get_memory(ctx);

    // the part of the memory that attends to the whole context
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(mem)) {
        mem = hybrid->get_mem_attn();
    } else if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(mem)) {
        mem = hybrid->get_mem_attn();
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa *>(mem)) {
        mem = iswa->get_base();
    }

    const auto * kv = dynamic_cast<const llama_kv_cache *>(mem);
    if (!kv || !kv->get_spectral()) {
        return false;
    }

    const auto & report = kv->get_spectral()->get_impl().report;

    res.bytes_tables = report.bytes_tables;
    res.code_bits    = report.code_bits;

    return true;
}

//
// ops
//

// The sources of the ops. The tensors of the ubatch hold its streams one after the other.
//   attend:      arena, q, k, v, plan, mask [, sinks]
//   combine:     partials, mask [, sinks]
//   prefill:     as attend
//   check:       result of the prefill, in place
//   append:      arena, k, v, q, plan, k_idxs, result of the attention [, residual stream]

using spectral_layer = llama_kv_spectral::impl::layer;

static skv_rows get_rows(const ggml_tensor * t, int64_t s, int64_t ns) {
    const int64_t n = t->ne[2]/ns;

    auto res = skv_new(skv_rows_init);
    res.data        = (const float *) ((const char *) t->data + s*n*t->nb[2]);
    res.n_rows      = n;
    res.row_stride  = t->nb[2];
    res.head_stride = t->nb[1];

    return res;
}

// a step of one stream, with the rows that it points to
struct spectral_step {
    skv_rows q;
    skv_rows k;
    skv_rows v;
    skv_step skv = skv_new(skv_step_init);

    spectral_step(const spectral_layer & l, const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * plans, int64_t s, int64_t ns) :
        q(get_rows(q, s, ns)), k(get_rows(k, s, ns)), v(get_rows(v, s, ns)) {
        const int32_t * p = (const int32_t *) ((const char *) plans->data + s*plans->nb[1]);

        skv.arena       = l.owner.arena_of(p[SPECTRAL_STREAM]);
        skv.arena_bytes = l.owner.arena_bytes;
        skv.plan        = p + SPECTRAL_HEADER_SIZE;
        skv.plan_ints   = p[SPECTRAL_USED];
        skv.q           = &this->q;
        skv.k           = &this->k;
        skv.v           = &this->v;
    }

    spectral_step(const spectral_step &) = delete;
};

static skv_attention get_attention(const spectral_layer & l, const ggml_tensor * mask, const ggml_tensor * sinks, int64_t s) {
    auto res = skv_new(skv_attention_init);
    res.scale           = l.scale;
    res.softcap         = l.softcap;
    res.mask            = (const uint16_t *) ((const char *) mask->data + s*mask->nb[3]);
    res.mask_row_stride = mask->nb[1];
    res.n_kv            = mask->ne[0];
    res.sinks           = sinks ? (const float *) sinks->data : nullptr;

    return res;
}

static void op_attend(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & l = *(spectral_layer *) userdata;

    const ggml_tensor * mask = dst->src[5];

    const int64_t ns = mask->ne[3];
    const size_t  n  = dst->ne[0];

    for (int64_t s = 0; s < ns; ++s) {
        const spectral_step step(l, dst->src[1], dst->src[2], dst->src[3], dst->src[4], s, ns);

        auto attention = get_attention(l, mask, dst->src[6], s);
        attention.partials   = (float *) dst->data + s*n;
        attention.n_partials = n;

        l.owner.ok(skv_layer_attend(l.skv, &step.skv, &attention, ith, nth), "attention", &l);
    }
}

// ops cannot fail: NaN is what tells the caller that this ubatch is lost
static void set_nan_if_failed(const spectral_layer & l, float * out, size_t n_out, int ith, int nth) {
    if (l.owner.failed) {
        std::fill(out + n_out*ith/nth, out + n_out*(ith + 1)/nth, NAN);
    }
}

static void op_combine(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & l = *(spectral_layer *) userdata;

    const ggml_tensor * partials = dst->src[0];
    const ggml_tensor * mask     = dst->src[1];

    const int64_t ns = mask->ne[3];

    const size_t n_tok = dst->ne[1]/ns;
    const size_t n_out = n_tok*dst->ne[0];

    for (int64_t s = 0; s < ns; ++s) {
        auto attention = get_attention(l, mask, dst->src[2], s);
        attention.partials   = (float *) partials->data + s*partials->ne[0];
        attention.n_partials = partials->ne[0];
        attention.out        = (float *) dst->data + s*n_out;
        attention.n_out      = n_out;

        l.owner.ok(skv_layer_combine(l.skv, &attention, n_tok, ith, nth), "attention", &l);

        set_nan_if_failed(l, attention.out, n_out, ith, nth);
    }
}

static void op_prefill(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & l = *(spectral_layer *) userdata;

    const ggml_tensor * mask = dst->src[5];

    const int64_t ns = mask->ne[3];

    const size_t n_out = dst->ne[1]/ns*dst->ne[0];

    for (int64_t s = 0; s < ns; ++s) {
        const spectral_step step(l, dst->src[1], dst->src[2], dst->src[3], dst->src[4], s, ns);

        auto attention = get_attention(l, mask, dst->src[6], s);
        attention.out   = (float *) dst->data + s*n_out;
        attention.n_out = n_out;

        l.owner.ok(skv_layer_prefill(l.skv, &step.skv, &attention, ith, nth), "attention", &l);
    }
}

static void op_check(ggml_tensor * dst, int ith, int nth, void * userdata) {
    set_nan_if_failed(*(spectral_layer *) userdata, (float *) dst->data, ggml_nelements(dst), ith, nth);
}

static void op_append(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & l = *(spectral_layer *) userdata;

    const ggml_tensor * plans = dst->src[4];

    const int64_t ns = plans->ne[1];

    // only threads that look at heads for a fit need it
    std::vector<float> wo_data;
    skv_projection     wo = {};
    bool               has_wo = false;

    for (int64_t s = 0; s < ns; ++s) {
        spectral_step step(l, dst->src[3], dst->src[1], dst->src[2], plans, s, ns);

        auto x = skv_new(skv_rows_init);
        if (const ggml_tensor * residual = dst->src[7]) {
            const int64_t n = residual->ne[1]/ns;

            x.data       = (const float *) ((const char *) residual->data + s*n*residual->nb[1]);
            x.n_rows     = n;
            x.row_stride = residual->nb[1];

            step.skv.residual   = &x;
            step.skv.n_residual = residual->ne[0];
        }

        if (!has_wo) {
            int32_t wants = 0;
            l.owner.ok(skv_layer_wants_projection(l.skv, &step.skv, ith, nth, &wants), "reading of the plan", &l);
            has_wo = wants != 0 && !l.calibrated && l.owner.get_projection(l, wo_data, wo);
        }
        step.skv.projection = has_wo ? &wo : nullptr;

        l.owner.ok(skv_layer_append(l.skv, &step.skv, ith, nth), "storing of K and V", &l);
    }
}

// The residual stream that the attention's output joins: what K was computed from, before the norm if there is one. Null where the graph looks
// different, or where the output is normed on its way: then the size of the stream says nothing about an error in it.
const ggml_tensor * llama_kv_spectral::impl::find_residual(const layer & l, const ggml_tensor * k) const {
    if (kv.model.layers[l.il].attn_post_norm) {
        return nullptr;
    }

    const auto is_weight = [](const ggml_tensor * t) { return t && t->op == GGML_OP_NONE && !(t->flags & GGML_TENSOR_FLAG_INPUT); };

    // up to the product with a weight
    const ggml_tensor * node = k;
    while (node && !(node->op == GGML_OP_MUL_MAT && is_weight(node->src[0]))) {
        node = node->src[0];
    }
    // and through scale and shift of a norm
    const ggml_tensor * x = node ? node->src[1] : nullptr;
    while (x && (x->op == GGML_OP_MUL || x->op == GGML_OP_ADD) && is_weight(x->src[1])) {
        x = x->src[0];
    }
    if (x && (x->op == GGML_OP_RMS_NORM || x->op == GGML_OP_NORM)) {
        x = x->src[0];
    }

    return x && x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[0] == kv.hparams.n_embd && x->ne[1] == k->ne[2] ? x : nullptr;
}

ggml_tensor * llm_graph_context::build_attn_spectral(
        llama_kv_spectral & kv,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * k_idxs,
        ggml_tensor * plan,
        ggml_tensor * kq_mask,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il) const {
    auto & sp = kv.get_impl();
    auto & l  = sp.get_layer(il);

    GGML_ASSERT(k && v && "layers that reuse the cache of another layer are refused");
    GGML_ASSERT(kq_mask->type == GGML_TYPE_F16);

    // the ops are constant while graphs are reused, so they find the scale in the layer
    const float softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    if (l.scale != 0.0f && (l.scale != kq_scale || l.softcap != softcap)) {
        throw std::runtime_error(format("kv_spectral: layer %d: the attention scale has changed", il));
    }
    l.scale   = kq_scale;
    l.softcap = softcap;

    sp.set_model(l, k);

    const ggml_tensor * residual = sp.find_residual(l, k);

    for (ggml_tensor ** t : { &q, &k, &v }) {
        if ((*t)->type != GGML_TYPE_F32) {
            *t = ggml_cast(ctx0, *t, GGML_TYPE_F32);
        } else if ((*t)->nb[0] != sizeof(float)) {
            *t = ggml_cont(ctx0, *t);
        }
    }

    const int64_t n_tok  = kq_mask->ne[1];
    const int64_t ns     = kq_mask->ne[3];

    ggml_tensor * args[] = { l.arena, q, k, v, plan, kq_mask, sinks };
    const int n_args = sinks ? 7 : 6;

    ggml_tensor * cur;

    // this choice may depend on nothing that the reuse of graphs does not check
    if (n_tok <= SPECTRAL_MAX_DECODE_TOKENS) {
        size_t n_partial = 0;
        if (skv_layer_partial_floats(l.skv, n_tok, &n_partial) != SKV_STATUS_OK) {
            throw std::runtime_error("kv_spectral: cannot size the attention");
        }

        ggml_tensor * partials = ggml_custom_4d(ctx0, GGML_TYPE_F32, n_partial, ns, 1, 1, args, n_args, op_attend, GGML_N_TASKS_MAX, &l);
        ggml_backend_sched_set_tensor_backend(sched, partials, backend_cpu);
        cb(partials, "spectral_partials", il);

        ggml_tensor * args_out[] = { partials, kq_mask, sinks };
        cur = ggml_custom_4d(ctx0, GGML_TYPE_F32, l.n_head*l.d_v, n_tok*ns, 1, 1, args_out, sinks ? 3 : 2, op_combine, GGML_N_TASKS_MAX, &l);
    } else {
        cur = ggml_custom_4d(ctx0, GGML_TYPE_F32, l.n_head*l.d_v, n_tok*ns, 1, 1, args, n_args, op_prefill, GGML_N_TASKS_MAX, &l);
        ggml_backend_sched_set_tensor_backend(sched, cur, backend_cpu);
        cb(cur, "spectral_prefill", il);

        // that one thread failed is known to all of them only after this op
        cur = ggml_custom_inplace(ctx0, cur, nullptr, 0, op_check, GGML_N_TASKS_MAX, &l);
    }
    ggml_backend_sched_set_tensor_backend(sched, cur, backend_cpu);

    ggml_build_forward_expand(gf, cur);

    // after the attention, which reads the rows of the ubatch from k and v: its result is a source for backends that reorder
    ggml_tensor * args_stored[] = { k, v, q, plan, k_idxs, cur, const_cast<ggml_tensor *>(residual) };
    ggml_tensor * stored = ggml_custom_inplace(ctx0, l.arena, args_stored, residual ? 7 : 6, op_append, GGML_N_TASKS_MAX, &l);
    ggml_backend_sched_set_tensor_backend(sched, stored, backend_cpu);
    cb(stored, "spectral_append", il);

    ggml_build_forward_expand(gf, stored);

    return cur;
}

//
// llama_kv_spectral
//

llama_kv_spectral::llama_kv_spectral(llama_kv_cache & kv, uint16_t config, uint32_t kv_size, const layer_filter_cb & filter) :
    pimpl(std::make_unique<impl>(kv)) {
    const auto & hparams = kv.hparams;

    if (!settings_get(config, pimpl->settings)) {
        throw std::runtime_error("kv_spectral: unknown settings");
    }
    const auto & settings = pimpl->settings;

    pimpl->calibration = load_calibration(settings, kv.model);

    std::vector<skv_layer_shape> shapes;

    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!layer_is_compressed(hparams, il, filter)) {
            continue;
        }

        pimpl->layers.push_back(std::make_unique<impl::layer>(*pimpl, il, hparams));

        const auto & l = *pimpl->layers.back();

        auto shape = skv_new(skv_layer_shape_init);
        shape.n_head    = l.n_head;
        shape.n_head_kv = l.n_head_kv;
        shape.d_k       = l.d_k;
        shape.d_v       = l.d_v;

        shapes.push_back(shape);
    }

    if (shapes.empty()) {
        throw std::runtime_error("kv_spectral: this cache has no layers to compress; leave --kv-spectral away");
    }

    const auto check = [](skv_status status) {
        if (status != SKV_STATUS_OK) {
            throw std::runtime_error(std::string("kv_spectral: ") + skv_last_error());
        }
    };

    auto cfg = skv_new(skv_config_init);
    cfg.n_cells   = kv_size;
    cfg.n_streams = kv.n_stream;
    cfg.n_seqs    = kv.n_stream == 1 ? kv.n_seq_max : 1;
    cfg.n_tokens  = std::max(settings.n_ubatch, 1u);
    cfg.window    = settings.window;
    cfg.ratio     = settings.ratio;
    cfg.bits      = settings.bits;
    cfg.fine_rows = settings.fine;

    cfg.calibrated = !settings.basis.empty();

    check(skv_geometry_create(&cfg, shapes.data(), shapes.size(), &pimpl->geom));

    auto & report = pimpl->report;
    check(skv_geometry_report(pimpl->geom, &report));

    check(skv_geometry_arena_bytes(pimpl->geom, &pimpl->arena_bytes));
    for (size_t i = 0; i < pimpl->layers.size(); ++i) {
        check(skv_layer_create(pimpl->geom, i, &pimpl->layers[i]->skv));
    }

    const std::string asked = settings.bits > 0.0f ? format("asked %g bits", settings.bits) : format("asked %g", settings.ratio);

    // sizes are all that is asked of such a cache
    if (hparams.no_alloc) {
        return;
    }

    const double mib_held = (report.bytes_arenas + report.bytes_tables)/1024.0/1024.0;
    const double mib_f16  = report.bytes_f16/1024.0/1024.0;

    // a warning, because tools do not show less than that of libllama by default
    if (report.tiles == 0) {
        const std::string more = pimpl->calibration ? "" : format(", at least %u rows before the first fit", report.fit_rows);

        LLAMA_LOG_WARN("kv_spectral: %u cells are no more than what stays exact (window %u%s): all rows are f16, %.1f MiB\n",
                kv_size, report.window, more.c_str(), mib_held);
    } else {
        const bool missed = settings.bits == 0.0f && report.ratio < 0.98*settings.ratio;

        LLAMA_LOG_WARN("kv_spectral: %u cells, %u streams, window %u, sinks %u: %.2f bits per element, %.1f MiB held against %.1f MiB f16, ratio %.1f (%s%s)\n",
                kv_size, kv.n_stream, report.window, report.sinks, report.code_bits, mib_held, mib_f16, report.ratio, asked.c_str(),
                missed ? ", not reached: what is not code (exact rows, bases, tables) is too large a part of this context size" : "");
    }

    pimpl->streams.resize(kv.n_stream);
    for (auto & st : pimpl->streams) {
        check(skv_table_create(pimpl->geom, &st.table));

        st.cell_pos.resize(kv_size, -1);
        st.cell_seq.resize(kv_size, -1);
    }

    const char * LLAMA_KV_SPECTRAL_LOG = getenv("LLAMA_KV_SPECTRAL_LOG");
    if (LLAMA_KV_SPECTRAL_LOG) {
        pimpl->log = ggml_fopen(LLAMA_KV_SPECTRAL_LOG, "a");
        if (!pimpl->log) {
            LLAMA_LOG_WARN("kv_spectral: cannot open LLAMA_KV_SPECTRAL_LOG=%s\n", LLAMA_KV_SPECTRAL_LOG);
        }
    }
}

llama_kv_spectral::~llama_kv_spectral() = default;

void llama_kv_spectral::add_layer(ggml_context * ctx, uint32_t il) {
    if (!ctx) {
        throw std::runtime_error("failed to create ggml context for kv cache");
    }

    auto & kv = pimpl->kv;

    const size_t i = kv.layers.size();

    // a layer without KV heads (n_head_kv == 0) has no arena
    if (i >= pimpl->layers.size() || pimpl->layers[i]->il != il) {
        return;
    }

    auto & l  = *pimpl->layers[i];
    auto & sp = *pimpl;

    // one for all layers, in the context of the first of them
    if (!sp.arena) {
        sp.arena = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, sp.arena_bytes, 1, kv.n_stream);
        ggml_set_name(sp.arena, "cache_kv_spectral");
    }

    // copies of streams and sums of sizes go through layers: each has its part, the last one the rest
    const size_t n_part = sp.arena_bytes/sp.layers.size()/GGML_MEM_ALIGN*GGML_MEM_ALIGN;
    const size_t n_own  = i + 1 < sp.layers.size() ? n_part : sp.arena_bytes - n_part*i;

    l.arena = ggml_view_3d(ctx, sp.arena, n_own, 1, kv.n_stream, sp.arena->nb[1], sp.arena->nb[2], n_part*i);
    ggml_format_name(l.arena, "cache_k_l%d", il);

    std::vector<ggml_tensor *> k_stream;
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        k_stream.push_back(ggml_view_2d(ctx, sp.arena, n_own, 1, sp.arena->nb[1], n_part*i + s*sp.arena->nb[2]));
    }

    kv.map_layer_ids[il] = i;
    kv.layers.push_back({ il, l.arena, nullptr, k_stream, std::vector<ggml_tensor *>(kv.n_stream, nullptr) });
}

size_t llama_kv_spectral::table_bytes() const {
    return pimpl->report.bytes_tables;
}

void llama_kv_spectral::reset() {
    for (auto & st : pimpl->streams) {
        pimpl->ok(skv_table_reset(st.table), "reset");

        st.pending = false;
        st.ran     = false;
    }

    pimpl->failed = false;
}

void llama_kv_spectral::copy_stream(uint32_t ssrc, uint32_t sdst) {
    if (!pimpl->recover()) {
        return;
    }

    pimpl->ok(skv_table_clone_from(pimpl->streams[sdst].table, pimpl->streams[ssrc].table), "copy of a stream");
}

bool llama_kv_spectral::plan(const slot_info & sinfo) {
    const spectral_timer timer(pimpl->ns_host);

    // an error spoils what is stored; once all of that was removed, there is nothing left to mistrust
    if (pimpl->failed) {
        uint32_t n_used = 0;
        for (const auto & cells : pimpl->kv.v_cells) {
            n_used += cells.get_used();
        }
        if (n_used == sinfo.n_stream()*sinfo.size()) {
            reset();
        }
    }

    if (pimpl->failed || !pimpl->recover()) {
        LLAMA_LOG_ERROR("%s: kv_spectral: the cache is not usable after an earlier error; clear it to go on\n", __func__);
        return false;
    }

    if (!pimpl->is_paged) {
        pimpl->use_huge_pages();
    }

    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        const uint32_t strm = sinfo.strm[s];

        auto & st = pimpl->streams[strm];

        pimpl->snapshot(strm);

        st.plan.resize(pimpl->plan_ints(sinfo.size()));

        const auto cells = st.cells();
        if (skv_table_plan(st.table, &cells, sinfo.idxs[s].data(), sinfo.idxs[s].size(), st.plan.data(), st.plan.size(), &st.used) != SKV_STATUS_OK) {
            LLAMA_LOG_ERROR("%s: kv_spectral: no place for the tokens: %s\n", __func__, skv_last_error());
            return false;
        }

        st.pending = true;
    }

    return true;
}

void llama_kv_spectral::commit(const slot_info & sinfo) {
    // rows of a graph that went wrong are not taken over
    if (pimpl->failed) {
        return;
    }

    bool ran = false;

    for (const uint32_t strm : sinfo.strm) {
        const spectral_timer timer(pimpl->ns_host);

        auto & st = pimpl->streams[strm];

        // a graph without the attention (training) leaves the plan to be dropped by the next one
        if (st.pending && st.ran) {
            pimpl->ok(skv_table_commit(st.table), "commit");
            ran = true;
        }

        st.pending = false;
        st.ran     = false;
    }

    if (ran) {
        pimpl->n_commits++;

        if (pimpl->log) {
            pimpl->log_commit(sinfo);
        }
    }
}

ggml_tensor * llama_kv_spectral::build_input_plan(ggml_context * ctx, const llama_ubatch & ubatch) const {
    const int64_t ns = pimpl->kv.n_stream == 1 ? 1 : ubatch.n_seqs_unq;

    // one column per stream; the size may depend on nothing that the reuse of graphs does not check
    ggml_tensor * plan = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, SPECTRAL_HEADER_SIZE + pimpl->plan_ints(ubatch.n_tokens/ns), ns);

    ggml_set_input(plan);
    ggml_set_name(plan, "attn_inp_spectral_plan");

    return plan;
}

void llama_kv_spectral::set_input_plan(ggml_tensor * dst, const slot_info & sinfo) {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(dst->ne[1] == (int64_t) sinfo.n_stream());

    const spectral_timer timer(pimpl->ns_host);

    for (size_t s = 0; s < sinfo.n_stream(); ++s) {
        auto & st = pimpl->streams[sinfo.strm[s]];

        GGML_ASSERT(st.pending && SPECTRAL_HEADER_SIZE + st.used <= (size_t) dst->ne[0]);

        int32_t * p = (int32_t *) ((char *) dst->data + s*dst->nb[1]);

        p[SPECTRAL_STREAM] = sinfo.strm[s];
        p[SPECTRAL_USED]   = st.used;

        memcpy(p + SPECTRAL_HEADER_SIZE, st.plan.data(), st.used*sizeof(int32_t));

        st.ran = true;
    }
}

void llama_kv_spectral::state_write(llama_io_write_i & io, const llama_kv_cache::cell_ranges_t & cr) {
    if (pimpl->failed || !pimpl->recover()) {
        throw std::runtime_error("kv_spectral: the cache is not usable after an earlier error");
    }

    std::vector<uint32_t> cells;
    for (const auto & range : cr.data) {
        for (uint32_t i = range.first; i < range.second; ++i) {
            cells.push_back(i);
        }
    }

    std::vector<const skv_layer *> layers;
    const auto stream = pimpl->stored(cr.strm, layers);

    const skv_table * table = pimpl->streams[cr.strm].table;

    std::vector<uint8_t> buf;
    size_t size = 0;

    skv_status status = skv_state_write(table, &stream, cells.data(), cells.size(), nullptr, 0, &size);
    if (status == SKV_STATUS_OK) {
        buf.resize(size);
        status = skv_state_write(table, &stream, cells.data(), cells.size(), buf.data(), buf.size(), &size);
    }
    if (status != SKV_STATUS_OK) {
        throw std::runtime_error(format("kv_spectral: cannot save the state: %s", skv_last_error()));
    }

    // the head of a stock state, up to where a stock cache compares the type of K
    const uint32_t v_trans = 0;
    const uint32_t n_layer = layers.size();
    const int32_t  type    = SPECTRAL_STATE_TYPE;
    const uint64_t n_bytes = size;

    io.write(&v_trans, sizeof(v_trans));
    io.write(&n_layer, sizeof(n_layer));
    io.write(&type,    sizeof(type));
    io.write(&n_bytes, sizeof(n_bytes));
    io.write(buf.data(), size);
}

bool llama_kv_spectral::state_read(llama_io_read_i & io, uint32_t strm, const slot_info & sinfo) {
    if (pimpl->failed || !pimpl->recover()) {
        LLAMA_LOG_ERROR("%s: kv_spectral: the cache is not usable after an earlier error\n", __func__);
        return false;
    }

    uint32_t v_trans;
    uint32_t n_layer;
    int32_t  type;
    uint64_t n_bytes;

    io.read(&v_trans, sizeof(v_trans));
    io.read(&n_layer, sizeof(n_layer));
    io.read(&type,    sizeof(type));

    if (type != SPECTRAL_STATE_TYPE) {
        LLAMA_LOG_ERROR("%s: kv_spectral: this state was saved without --kv-spectral and cannot be read with it\n", __func__);
        return false;
    }
    if (n_layer != pimpl->layers.size()) {
        LLAMA_LOG_ERROR("%s: kv_spectral: mismatched layer count (%u instead of %zu)\n", __func__, n_layer, pimpl->layers.size());
        return false;
    }

    io.read(&n_bytes, sizeof(n_bytes));

    // piece by piece, so that a size from a damaged file meets the end of the file before the end of memory
    std::vector<uint8_t> buf;
    while (buf.size() < n_bytes) {
        const size_t n_old = buf.size();
        buf.resize(n_old + std::min<uint64_t>(n_bytes - n_old, 16*1024*1024));
        io.read(buf.data() + n_old, buf.size() - n_old);
    }

    std::vector<const skv_layer *> layers;
    const auto stream = pimpl->stored(strm, layers);

    auto & st = pimpl->streams[strm];

    pimpl->snapshot(strm);

    const auto cells = st.cells();
    if (skv_state_read(st.table, &stream, &cells, sinfo.idxs[0].data(), sinfo.idxs[0].size(), buf.data(), buf.size()) != SKV_STATUS_OK) {
        LLAMA_LOG_ERROR("%s: kv_spectral: cannot restore the state: %s\n", __func__, skv_last_error());
        return false;
    }

    return true;
}

#else // LLAMA_KV_SPECTRAL

// The flag is always there; without the library it ends in the check, so none of the rest is ever called.

bool llama_kv_spectral_check(const llama_model &, llama_context_params &) {
    LLAMA_LOG_ERROR("%s: kv_spectral: llama.cpp was built without LLAMA_KV_SPECTRAL; build it with -DLLAMA_KV_SPECTRAL=ON and "
            "LLAMA_KV_SPECTRAL_LIB and LLAMA_KV_SPECTRAL_INCLUDE set, or leave --kv-spectral away\n", __func__);
    return false;
}

bool llama_kv_spectral_get_info(const llama_context *, llama_kv_spectral_info &) {
    return false;
}

struct llama_kv_spectral::impl {};

llama_kv_spectral::llama_kv_spectral(llama_kv_cache &, uint16_t, uint32_t, const layer_filter_cb &) {}

llama_kv_spectral::~llama_kv_spectral() = default;

void   llama_kv_spectral::add_layer  (ggml_context *, uint32_t) {}
size_t llama_kv_spectral::table_bytes() const { return 0; }
void   llama_kv_spectral::reset      () {}
void   llama_kv_spectral::copy_stream(uint32_t, uint32_t) {}
bool   llama_kv_spectral::plan       (const slot_info &) { return false; }
void   llama_kv_spectral::commit     (const slot_info &) {}

ggml_tensor * llama_kv_spectral::build_input_plan(ggml_context *, const llama_ubatch &) const { return nullptr; }

void llama_kv_spectral::set_input_plan(ggml_tensor *, const slot_info &) {}
void llama_kv_spectral::state_write   (llama_io_write_i &, const llama_kv_cache::cell_ranges_t &) {}
bool llama_kv_spectral::state_read    (llama_io_read_i  &, uint32_t, const slot_info &) { return false; }

ggml_tensor * llm_graph_context::build_attn_spectral(llama_kv_spectral &, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *,
        ggml_tensor *, ggml_tensor *, float, int) const {
    return nullptr;
}

#endif // LLAMA_KV_SPECTRAL
