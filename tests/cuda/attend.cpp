// Carry out attention calls that tests/cuda_attention.rs wrote into files, by the kernels on the host shim: for each call one file in and one out. Every call is
// carried out with threads in several orders, which must give the same bytes.
//
// Knows nothing of what is in an arena, nor of what is right.

#include "../../kernels/attend.cu"

#include "shim/launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string>

namespace {

[[noreturn]] void fail(const std::string &what) {
    fprintf(stderr, "%s\n", what.c_str());
    exit(1);
}

/// What stands in a file: a header of ints, then buffers, each with its bytes in front.
struct File {
    std::vector<uint8_t> bytes;
    size_t at = 0;

    explicit File(const char *path) {
        FILE *f = fopen(path, "rb");
        if (f == nullptr)
            fail(std::string("cannot open ") + path);
        fseek(f, 0, SEEK_END);
        bytes.resize(size_t(ftell(f)));
        rewind(f);
        if (fread(bytes.data(), 1, bytes.size(), f) != bytes.size())
            fail(std::string("cannot read ") + path);
        fclose(f);
    }
    int64_t number() {
        int64_t x;
        if (bytes.size() - at < sizeof x)
            fail("the file ends early");
        memcpy(&x, &bytes[at], sizeof x);
        at += sizeof x;
        return x;
    }
    /// A buffer of its own, so that what lies outside of it is seen to be read; nothing for one that is not there.
    template <class T> std::vector<T> buffer() {
        const size_t n = size_t(number());
        if (n % sizeof(T) != 0 || bytes.size() - at < n)
            fail("the file ends early");
        std::vector<T> out(n / sizeof(T));
        if (n != 0)
            memcpy(static_cast<void *>(out.data()), &bytes[at], n);
        at += n;
        return out;
    }
};

template <class T> const T *or_null(const std::vector<T> &x) {
    return x.empty() ? nullptr : x.data();
}

/// A call, and how it is launched.
struct Call {
    dim3 grid;
    int64_t columns, shared_bytes, combine_blocks, n_partials, n_out;
    SkvAttend a{};
    std::vector<SkvLayer> layer;
    std::vector<uint8_t> arena;
    std::vector<int32_t> plan;
    std::vector<float> q, k, v, sinks, want, bounds;
    std::vector<uint16_t> mask;

    explicit Call(File &f) {
        columns = f.number();
        grid.x = unsigned(f.number());
        grid.y = unsigned(f.number());
        grid.z = unsigned(f.number());
        shared_bytes = f.number();
        combine_blocks = f.number();
        n_partials = f.number();
        n_out = f.number();
        for (int64_t *stride : {&a.q_row, &a.q_head, &a.k_row, &a.k_head, &a.v_row, &a.v_head, &a.mask_row})
            *stride = f.number();
        a.n_kv = int32_t(f.number());
        a.n_tokens = int32_t(f.number());
        a.splits = int32_t(grid.x);
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
        a.layer = layer.data();
        a.arena = arena.data();
        a.plan = plan.data();
        a.q = or_null(q);
        a.k = or_null(k);
        a.v = or_null(v);
        a.mask = or_null(mask);
        a.sinks = or_null(sinks);
    }

    std::vector<float> run(shim::Order order) {
        std::vector<float> partials = shim::poisoned<float>(size_t(n_partials)), out = shim::poisoned<float>(size_t(n_out));
        a.partials = partials.data();
        a.out = out.data();
        shim::launch(grid, dim3(SKV_THREADS), size_t(shared_bytes), order, columns == 8 ? skv_attend_8 : skv_attend_16, a);
        shim::launch(dim3(unsigned(combine_blocks)), dim3(SKV_THREADS), 0, order, skv_combine, a);
        return out;
    }
};

} // namespace

int main(int argc, char **argv) {
    if (argc < 3 || argc % 2 == 0)
        fail("usage: attend IN OUT [IN OUT]...");
    for (int i = 1; i < argc; i += 2) {
        File file(argv[i]);
        Call call(file);
        const std::vector<float> out = call.run(shim::ascending);
        for (shim::Order order : {shim::descending, shim::random_order(uint64_t(i))}) {
            const std::vector<float> again = call.run(order);
            if (memcmp(again.data(), out.data(), out.size() * sizeof(float)) != 0)
                fail(std::string(argv[i]) + ": the order of threads matters");
        }
        FILE *f = fopen(argv[i + 1], "wb");
        if (f == nullptr || fwrite(out.data(), sizeof(float), out.size(), f) != out.size() || fclose(f) != 0)
            fail(std::string("cannot write ") + argv[i + 1]);
    }
    return 0;
}
