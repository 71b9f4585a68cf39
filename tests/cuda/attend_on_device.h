// Carry out calls on a device, for tests/gpu/run.sh. Each is compared with what is right, then repeated, then replayed from a captured graph whose inputs changed; a
// call for its time alone is timed. Knows nothing of what is in an arena.
#pragma once

#include "call.h"

#include <algorithm>
#include <memory>

#define CUDA(call)                                                                                                                     \
    do {                                                                                                                               \
        const cudaError_t status_ = (call);                                                                                            \
        if (status_ != cudaSuccess)                                                                                                    \
            fail(std::string(#call) + ": " + cudaGetErrorString(status_));                                                             \
    } while (0)

constexpr int REPEATS = 100;
/// Arenas that are read in turn cover more than this, so that none is left in a cache.
constexpr size_t BEYOND_CACHES = size_t(512) << 20;

/// Device memory; none for no elements.
template <class T> class Memory {
  public:
    explicit Memory(size_t n) {
        if (n != 0)
            CUDA(cudaMalloc(&at, n * sizeof(T)));
    }
    explicit Memory(const std::vector<T> &x) : Memory(x.size()) { put(x); }
    ~Memory() { cudaFree(at); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    /// There must be room.
    void put(const std::vector<T> &x) {
        if (!x.empty())
            CUDA(cudaMemcpy(at, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get(size_t n) const {
        std::vector<T> x(n);
        CUDA(cudaMemcpy(x.data(), at, n * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
    /// All bits set: NaN as a float.
    void poison(size_t n) { CUDA(cudaMemset(at, 0xff, n * sizeof(T))); }

    T *at = nullptr;
};

/// A call in device memory. Others that are launched alike can take its place.
class OnDevice {
  public:
    explicit OnDevice(const Call &c, size_t plan_ints = 0)
        : call(&c), layer(c.layer), arena(c.arena), plan(std::max(plan_ints, c.plan.size())), q(c.q), k(c.k), v(c.v), mask(c.mask), sinks(c.sinks),
          partials(size_t(c.n_partials)), out(size_t(c.n_out)) {
        plan.put(c.plan);
        poison();
        CUDA(cudaFuncSetAttribute(kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize, int(c.shared_bytes)));
    }
    void replace(const Call &c) {
        call = &c;
        layer.put(c.layer);
        arena.put(c.arena);
        plan.put(c.plan);
        q.put(c.q);
        k.put(c.k);
        v.put(c.v);
        mask.put(c.mask);
        sinks.put(c.sinks);
        poison();
    }
    void launch(cudaStream_t stream, const uint8_t *other_arena = nullptr) {
        SkvAttend a = call->a;
        a.layer = layer.at;
        a.arena = other_arena != nullptr ? other_arena : arena.at;
        a.plan = plan.at;
        a.q = q.at;
        a.k = k.at;
        a.v = v.at;
        a.mask = mask.at;
        a.sinks = sinks.at;
        a.partials = partials.at;
        a.out = out.at;
        const dim3 grid(unsigned(call->grid[0]), unsigned(call->grid[1]), unsigned(call->grid[2]));
        kernel()<<<grid, SKV_THREADS, size_t(call->shared_bytes), stream>>>(a);
        skv_combine<<<unsigned(call->combine_blocks), SKV_THREADS, 0, stream>>>(a);
        CUDA(cudaGetLastError());
    }
    std::vector<float> run() {
        poison();
        launch(nullptr);
        return result();
    }
    std::vector<float> result() {
        CUDA(cudaDeviceSynchronize());
        return out.get(size_t(call->n_out));
    }

  private:
    const Call *call;
    Memory<SkvLayer> layer;
    Memory<uint8_t> arena;
    Memory<int32_t> plan;
    Memory<float> q, k, v;
    Memory<uint16_t> mask;
    Memory<float> sinks, partials, out;

    void (*kernel() const)(SkvAttend) { return call->columns == 8 ? skv_attend_8 : skv_attend_16; }
    void poison() {
        partials.poison(size_t(call->n_partials));
        out.poison(size_t(call->n_out));
    }
};

/// Whether a graph of one call can be replayed with the inputs of the other: all that is not in device memory is the same.
inline bool are_launched_alike(const Call &a, const Call &b) {
    const auto sizes = [](const Call &c) { return std::vector<size_t>{c.arena.size(), c.q.size(), c.k.size(), c.v.size(), c.mask.size(), c.sinks.size()}; };
    return memcmp(&a.columns, &b.columns, sizeof(int64_t) * 8) == 0 && memcmp(&a.a, &b.a, sizeof a.a) == 0 && sizes(a) == sizes(b);
}

inline void check_repeats(const Call &c, int repeats) {
    OnDevice d(c);
    const std::vector<float> out = d.run();
    const double error = c.error(out);
    if (!(error < 1.0))
        fail(c.name + ": the error is " + std::to_string(error) + " of what it may be");
    for (int i = 0; i < repeats; i++)
        if (!same_bytes(d.run(), out))
            fail(c.name + ": run " + std::to_string(i) + " gives other bytes");
    printf("%s: %.2f of the error that it may have\n", c.name.c_str(), error);
}

/// A graph is captured with one call and replayed with the other.
inline void check_graph(const Call &first, const Call &second) {
    OnDevice d(first, second.plan.size());
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CUDA(cudaStreamCreate(&stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    d.launch(stream);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&replay, graph, 0));
    for (const Call *c : {&first, &second, &first}) {
        d.replace(*c);
        CUDA(cudaGraphLaunch(replay, stream));
        if (!same_bytes(d.result(), OnDevice(*c).run()))
            fail(c->name + ": replayed from the graph of " + first.name + ", it gives other bytes");
    }
    CUDA(cudaGraphExecDestroy(replay));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
}

/// Milliseconds of one of `n` runs, after some that do not count.
template <class Run> float time_of(int n, Run run) {
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i < n; i++)
        run(i);
    CUDA(cudaEventRecord(begin));
    for (int i = 0; i < n; i++)
        run(i);
    CUDA(cudaEventRecord(end));
    CUDA(cudaEventSynchronize(end));
    float ms = 0;
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    return ms / float(n);
}

/// Bytes that the device copies in a second, reading and writing counted.
inline double bandwidth() {
    Memory<uint8_t> from(BEYOND_CACHES), to(BEYOND_CACHES);
    const float ms = time_of(10, [&](int) { CUDA(cudaMemcpyAsync(to.at, from.at, BEYOND_CACHES, cudaMemcpyDeviceToDevice)); });
    return 2.0 * BEYOND_CACHES / (1e-3 * ms);
}

inline void time_call(const Call &c) {
    OnDevice d(c);
    std::vector<std::unique_ptr<Memory<uint8_t>>> arenas;
    for (size_t bytes = 0; bytes <= BEYOND_CACHES; bytes += size_t(c.bytes_to_read))
        arenas.emplace_back(new Memory<uint8_t>(c.arena));
    const int n = std::max(REPEATS, int(arenas.size()));
    const float ms = time_of(n, [&](int i) { d.launch(nullptr, arenas[size_t(i) % arenas.size()]->at); });
    const double rate = double(c.bytes_to_read) / (1e-3 * ms), possible = bandwidth();
    printf("%s: %.1f us, %.1f MB, %.0f GB/s: %.0f %% of the %.0f GB/s that a copy reaches\n", c.name.c_str(), 1e3 * ms, 1e-6 * double(c.bytes_to_read), 1e-9 * rate,
           100 * rate / possible, 1e-9 * possible);
}

inline int carry_out(int n, char **arguments) {
    // Under a tool that makes everything slow, all is done once.
    const bool once = n > 0 && strcmp(arguments[0], "--once") == 0;
    std::vector<std::unique_ptr<Call>> calls;
    for (int i = once ? 1 : 0; i < n; i++)
        calls.emplace_back(new Call(arguments[i]));
    if (calls.empty())
        fail("usage: attend [--once] CALL...");
    int graphs = 0;
    for (size_t i = 0; i < calls.size(); i++) {
        const Call &c = *calls[i];
        if (c.want.empty()) {
            if (!once)
                time_call(c);
            continue;
        }
        check_repeats(c, once ? 0 : REPEATS);
        for (size_t j = i + 1; !once && j < calls.size(); j++)
            if (!calls[j]->want.empty() && are_launched_alike(c, *calls[j])) {
                check_graph(c, *calls[j]);
                graphs++;
                break;
            }
    }
    printf("%zu calls, %d graphs with other inputs: all well\n", calls.size(), graphs);
    return once || graphs > 0 ? 0 : 1;
}
