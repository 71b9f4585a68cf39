// An attention call as tests/cuda_attention writes it into a file: how it is launched, what is in its buffers, and what is right. Knows nothing of what is in an
// arena, nor of where kernels run.
#pragma once

#include "../../kernels/layer.h"
#include "file.h"

#include <math.h>

struct Call {
    std::string name;
    int64_t columns, grid[3], shared_bytes, combine_blocks, n_partials, n_out;
    /// Without pointers.
    SkvAttend a{};
    std::vector<SkvLayer> layer;
    std::vector<uint8_t> arena;
    std::vector<int32_t> plan;
    std::vector<float> q, k, v, sinks;
    std::vector<uint16_t> mask;
    /// What is right, and how far each query head may be off, relative to it; nothing in a call that is for its time alone.
    std::vector<float> want, bounds;
    /// What a device has to read at least.
    int64_t bytes_to_read;

    explicit Call(const char *path) : name(path) {
        File f(path);
        for (int64_t *x : {&columns, &grid[0], &grid[1], &grid[2], &shared_bytes, &combine_blocks, &n_partials, &n_out})
            *x = f.number();
        for (int64_t *stride : {&a.q_row, &a.q_head, &a.k_row, &a.k_head, &a.v_row, &a.v_head, &a.mask_row})
            *stride = f.number();
        a.n_kv = int32_t(f.number());
        a.n_tokens = int32_t(f.number());
        a.splits = int32_t(grid[0]);
        bytes_to_read = f.number();
        layer = f.buffer<SkvLayer>();
        arena = f.buffer<uint8_t>();
        plan = f.buffer<int32_t>();
        q = f.buffer<float>();
        k = f.buffer<float>();
        v = f.buffer<float>();
        mask = f.buffer<uint16_t>();
        sinks = f.buffer<float>();
        want = f.buffer<float>();
        bounds = f.buffer<float>();
        if (layer.size() != 1)
            fail("the library's SkvLayer has another size");
        if (size_t(shared_bytes) != skv_attend_shared(layer[0].d_k, layer[0].d_v, columns))
            fail("the library asks for other shared memory than the kernel needs");
    }

    /// The largest error of a query head, as part of what it may be.
    double error(const std::vector<float> &out) const {
        const size_t d = out.size() / bounds.size();
        double worst = 0;
        for (size_t i = 0; i < bounds.size(); i++) {
            double apart = 0, norm = 0;
            for (size_t j = i * d; j < (i + 1) * d; j++) {
                apart += pow(double(out[j]) - want[j], 2);
                norm += pow(double(want[j]), 2);
            }
            // What is not a number is as wrong as can be.
            const double error = norm > 0 ? sqrt(apart / norm) / bounds[i] : apart > 0 ? INFINITY : 0.0;
            worst = error <= worst ? worst : isnan(error) ? INFINITY : error;
            if (isnan(apart))
                worst = INFINITY;
        }
        return worst;
    }
};

template <class T> bool same_bytes(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
