/* The header from C++: objects with owners, and statuses as the enumeration they are. */

#include "spectral_kv_llama.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

static_assert(sizeof(skv_status) == sizeof(int32_t), "a status is an int in C");

struct deleter {
    void operator()(skv_cache *cache) const { skv_cache_free(cache); }
    void operator()(skv_geometry *geometry) const { skv_geometry_free(geometry); }
};

static void check(bool condition, const char *what) {
    if (!condition) {
        std::fprintf(stderr, "%s\n", what);
        std::exit(1);
    }
}

int main() {
    constexpr size_t n_rows = 40, d = 32;
    skv_config config{};
    check(skv_config_init(&config, sizeof config) == SKV_STATUS_OK, "skv_config_init");
    config.n_cells = 1024;
    const skv_layer_shape shape{sizeof shape, 1, 1, d, d};

    skv_geometry *made = nullptr;
    check(skv_geometry_create(&config, &shape, 1, &made) == SKV_STATUS_OK, "skv_geometry_create");
    const std::unique_ptr<skv_geometry, deleter> geometry(made);
    skv_size_report report{};
    skv_size_report_init(&report, sizeof report);
    check(skv_geometry_report(geometry.get(), &report) == SKV_STATUS_OK && report.bytes_f16 == 1024 * 2 * d * 2, "skv_geometry_report");

    skv_rope rope{};
    check(skv_rope_init(&rope, sizeof rope) == SKV_STATUS_OK && rope.pairing == SKV_PAIRING_NONE, "skv_rope_init");
    skv_cache *raw = nullptr;
    check(skv_cache_create(&config, &shape, &rope, 0.0f, 0.0f, nullptr, &raw) == SKV_STATUS_OK, skv_last_error());
    const std::unique_ptr<skv_cache, deleter> cache(raw);

    std::vector<float> q(n_rows * d, 1.0f), k(n_rows * d, 0.5f), v(n_rows * d), out(d);
    std::vector<int32_t> positions(n_rows);
    for (size_t i = 0; i < n_rows; i++) {
        positions[i] = static_cast<int32_t>(i);
        for (size_t j = 0; j < d; j++)
            v[i * d + j] = static_cast<float>(i);
    }
    check(skv_cache_append(cache.get(), positions.data(), n_rows, q.data(), k.data(), v.data()) == SKV_STATUS_OK, skv_last_error());
    /* With a scale of 0 every row has the same weight. */
    check(skv_cache_attend(cache.get(), q.data(), 1, nullptr, nullptr, out.data()) == SKV_STATUS_OK, skv_last_error());
    check(std::fabs(out[d - 1] - (n_rows - 1) / 2.0f) < 1e-3f, "the mean of the values");

    const skv_status status = skv_cache_append(cache.get(), nullptr, 1, q.data(), k.data(), v.data());
    check(status == SKV_STATUS_NULL && std::string(skv_status_str(status)).find("NULL") != std::string::npos, "SKV_STATUS_NULL");
    return 0;
}
