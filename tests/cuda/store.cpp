// Carry out steps that tests/cuda_store wrote into files, by the kernel on the host shim: for each one file in, and one out, the arena as it is afterwards.
// Threads take their turns in several orders, which must give the same bytes.
//
// Knows nothing of what is in an arena, nor of what is right.

#include "../../kernels/store.cu"

#include "file.h"
#include "shim/launch.h"

namespace {

/// One layer's part of a step, and how it is launched.
struct Part {
    unsigned blocks;
    size_t shared_bytes;
    SkvStore a{};
    std::vector<SkvLayer> layer;
    std::vector<float> q, k, v, residual;

    explicit Part(File &f) {
        blocks = unsigned(f.number());
        shared_bytes = size_t(f.number());
        for (int64_t *stride : {&a.q_row, &a.q_head, &a.k_row, &a.k_head, &a.v_row, &a.v_head, &a.residual_row})
            *stride = f.number();
        a.n_residual = int32_t(f.number());
        a.n_tokens = int32_t(f.number());
        layer = f.buffer<SkvLayer>();
        q = f.buffer<float>();
        k = f.buffer<float>();
        v = f.buffer<float>();
        residual = f.buffer<float>();
        if (layer.size() != 1)
            fail("the library's SkvLayer has another size");
        if (shared_bytes != skv_store_shared(size_t(layer[0].d_k), size_t(layer[0].d_v)))
            fail("the library asks for other shared memory than the kernel needs");
    }
    void run(uint8_t *arena, const int32_t *plan, shim::Order order) {
        SkvStore call = a;
        call.layer = layer.data();
        call.arena = arena;
        call.plan = plan;
        call.q = q.data();
        call.k = k.data();
        call.v = v.data();
        call.residual = residual.empty() ? nullptr : residual.data();
        shim::launch(dim3(blocks), dim3(SKV_STORE_THREADS), shared_bytes, order, skv_store, call);
    }
};

} // namespace

int main(int argc, char **argv) {
    if (argc < 3 || argc % 2 == 0)
        fail("usage: store IN OUT [IN OUT]...");
    for (int i = 1; i < argc; i += 2) {
        File file(argv[i]);
        const std::vector<uint8_t> before = file.buffer<uint8_t>();
        const std::vector<int32_t> plan = file.buffer<int32_t>();
        std::vector<Part> parts;
        for (int64_t n = file.number(); n > 0; n--)
            parts.emplace_back(file);
        auto run = [&](shim::Order order) {
            std::vector<uint8_t> arena = before;
            for (Part &part : parts)
                part.run(arena.data(), plan.data(), order);
            return arena;
        };
        const std::vector<uint8_t> out = run(shim::ascending);
        for (shim::Order order : {shim::descending, shim::random_order(uint64_t(i))})
            if (run(order) != out)
                fail(std::string(argv[i]) + ": the order of threads matters");
        FILE *f = fopen(argv[i + 1], "wb");
        if (f == nullptr || fwrite(out.data(), 1, out.size(), f) != out.size() || fclose(f) != 0)
            fail(std::string("cannot write ") + argv[i + 1]);
    }
    return 0;
}
