#pragma once

#include "llama-kv-cache.h"

#include <memory>
#include <vector>

struct llama_model;

// Refuses models and settings that a compressed KV cache cannot serve, with a sentence that says why and what to do.
// Turns flash attention on when it was left to be chosen automatically.
bool llama_kv_spectral_check(const llama_model & model, llama_context_params & params);

// what a compressed cache says about itself beyond its tensors
struct llama_kv_spectral_info {
    uint64_t bytes_tables; // the host tables, which are not part of any ggml buffer
    double   code_bits;    // per element
};

// false when the cache of the context is not compressed
LLAMA_API bool llama_kv_spectral_get_info(const llama_context * ctx, llama_kv_spectral_info & res);

// Tells models apart, by their shapes and norms: these are small, F32 in every quantisation and never repacked, so all files
// of one model have the same number, and a calibration serves them all.
LLAMA_API uint64_t llama_kv_spectral_model_hash(const llama_model & model);

//
// llama_kv_spectral
//

// The compressed form of a llama_kv_cache, owned by it. All rows of a layer, keys and values, exact and coded, live in one
// I8 tensor per layer (the "arena"); this class keeps the tables that say where the row of a cell is. The library that does
// the work is spectral-kv (spectral_kv_llama.h); without it (CMake: LLAMA_KV_SPECTRAL=OFF) nothing can create this class.
//
// Life of an ubatch: plan() decides on the host what moves where; the plan is a graph input, so that reused graphs and
// ubatches in flight see their own; the graph attends and then appends; commit() makes the plan the new state of the tables.
class llama_kv_spectral {
public:
    using layer_filter_cb = llama_memory_i::layer_filter_cb;
    using slot_info       = llama_kv_cache::slot_info;

    // config: a handle from llama_kv_spectral_config()
    llama_kv_spectral(llama_kv_cache & kv, uint16_t config, uint32_t kv_size, const layer_filter_cb & filter);
    ~llama_kv_spectral();

    // create the arena of a layer; called for all layers that pass the filter, in ascending order
    void add_layer(ggml_context * ctx, uint32_t il);

    // bytes of the host tables, which are not part of any ggml buffer
    size_t table_bytes() const;

    // forget everything (the arenas have been zeroed)
    void reset();

    // the arenas are about to be copied from stream ssrc to stream sdst
    void copy_stream(uint32_t ssrc, uint32_t sdst);

    // per ubatch, see above; the cells hold the tokens of the ubatch already when plan() is called
    bool plan  (const slot_info & sinfo);
    void commit(const slot_info & sinfo);

    ggml_tensor * build_input_plan(ggml_context * ctx, const llama_ubatch & ubatch) const;

    void set_input_plan(ggml_tensor * dst, const slot_info & sinfo);

    // the data part of a saved state; a stock cache fails on it with a mismatched key type, and so does this one on a stock state
    void state_write(llama_io_write_i & io, const llama_kv_cache::cell_ranges_t & cr);
    bool state_read (llama_io_read_i  & io, uint32_t strm, const slot_info & sinfo);

    struct impl;

    impl & get_impl() const { return *pimpl; }

private:
    std::unique_ptr<impl> pimpl;
};
