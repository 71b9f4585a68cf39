// Carry out calls by the kernels on the host shim: for each call one file in and one out. Every call is carried out with threads in several orders, which must give
// the same bytes. Knows nothing of what is right.
#pragma once

#include "call.h"
#include "shim/launch.h"

template <class T> const T *or_null(const std::vector<T> &x) {
    return x.empty() ? nullptr : x.data();
}

inline std::vector<float> run(const Call &c, shim::Order order) {
    std::vector<float> partials = shim::poisoned<float>(size_t(c.n_partials)), out = shim::poisoned<float>(size_t(c.n_out));
    SkvAttend a = c.a;
    a.layer = c.layer.data();
    a.arena = c.arena.data();
    a.plan = c.plan.data();
    a.q = or_null(c.q);
    a.k = or_null(c.k);
    a.v = or_null(c.v);
    a.mask = or_null(c.mask);
    a.sinks = or_null(c.sinks);
    a.partials = partials.data();
    a.out = out.data();
    const dim3 grid(unsigned(c.grid[0]), unsigned(c.grid[1]), unsigned(c.grid[2]));
    shim::launch(grid, dim3(SKV_THREADS), size_t(c.shared_bytes), order, c.columns == 8 ? skv_attend_8 : skv_attend_16, a);
    for (float x : partials)
        if (__float_as_uint(x) == 0xffffffffu)
            fail(c.name + ": not all partial results are written");
    shim::launch(dim3(unsigned(c.combine_blocks)), dim3(SKV_THREADS), 0, order, skv_combine, a);
    return out;
}

inline int carry_out(int n, char **files) {
    if (n == 0 || n % 2 != 0)
        fail("usage: attend IN OUT [IN OUT]...");
    for (int i = 0; i < n; i += 2) {
        const Call call(files[i]);
        const std::vector<float> out = run(call, shim::ascending);
        for (shim::Order order : {shim::descending, shim::random_order(uint64_t(i + 1))})
            if (!same_bytes(run(call, order), out))
                fail(call.name + ": the order of threads matters");
        FILE *f = fopen(files[i + 1], "wb");
        if (f == nullptr || fwrite(out.data(), sizeof(float), out.size(), f) != out.size() || fclose(f) != 0)
            fail(std::string("cannot write ") + files[i + 1]);
    }
    return 0;
}
