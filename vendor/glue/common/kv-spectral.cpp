#include "kv-spectral.h"

#include "common.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

static const float kv_spectral_ratio_default = 8.0f;

static float parse_number(const std::string & value, float lo, float hi) {
    char * end = nullptr;
    const float res = strtof(value.c_str(), &end);
    if (value.empty() || *end != '\0' || !(res >= lo && res <= hi)) {
        throw std::invalid_argument(string_format("'%s' is not a number from %.10g to %.10g", value.c_str(), lo, hi));
    }
    return res;
}

static float parse_ratio(const std::string & value) {
    if (value.empty() || common_arg_utils::is_falsey(value)) {
        return 0.0f;
    }
    // a ratio of 1 would compress nothing: "1" is the "on" of environment variables
    if (common_arg_utils::is_truthy(value)) {
        return kv_spectral_ratio_default;
    }
    try {
        return parse_number(value, 1.0f, 64.0f);
    } catch (const std::invalid_argument & e) {
        throw std::invalid_argument(std::string(e.what()) + ", on or off");
    }
}

static int32_t parse_window(const std::string & value) {
    return (int32_t) parse_number(value, 0.0f, 1 << 24);
}

static float parse_bits(const std::string & value) {
    return parse_number(value, 0.0f, 8.0f);
}

static int32_t parse_fine(const std::string & value) {
    return value == "auto" ? -1 : (int32_t) parse_number(value, 0.0f, 1 << 24);
}

std::vector<common_arg> common_kv_spectral_args() {
    std::vector<common_arg> res;

    res.push_back(common_arg(
        {"--kv-spectral"}, "[RATIO]",
        string_format("hold the KV cache compressed, in 1/RATIO of the bytes of f16 (a number above 1, up to 64; on = 1 = %g, off = 0; default: off)",
            kv_spectral_ratio_default),
        [](common_params & params, const std::string & value) {
            params.kv_spectral = parse_ratio(value);
        }
    ).set_env("LLAMA_ARG_KV_SPECTRAL"));
    res.back().value_implicit = "on";

    res.push_back(common_arg(
        {"--kv-spectral-window"}, "N",
        string_format("most recent tokens of each sequence that --kv-spectral keeps exact (default: %d)", common_params().kv_spectral_window),
        [](common_params & params, const std::string & value) {
            params.kv_spectral_window = parse_window(value);
        }
    ).set_env("LLAMA_ARG_KV_SPECTRAL_WINDOW"));

    res.push_back(common_arg(
        {"--kv-spectral-bits"}, "B",
        "code bits per element for --kv-spectral instead of a ratio; turns it on (default: 0 = from RATIO)",
        [](common_params & params, const std::string & value) {
            params.kv_spectral_bits = parse_bits(value);
            if (params.kv_spectral_bits > 0.0f && params.kv_spectral == 0.0f) {
                params.kv_spectral = kv_spectral_ratio_default;
            }
        }
    ).set_env("LLAMA_ARG_KV_SPECTRAL_BITS"));

    res.push_back(common_arg(
        {"--kv-spectral-fine"}, "N",
        "tokens behind the window that --kv-spectral keeps most finely; 0 keeps all alike (default: auto = from the context size)",
        [](common_params & params, const std::string & value) {
            params.kv_spectral_fine = parse_fine(value);
        }
    ).set_env("LLAMA_ARG_KV_SPECTRAL_FINE"));

    res.push_back(common_arg(
        {"--kv-spectral-basis"}, "FILE",
        "file of `spectral-kv calibrate` with the bases of --kv-spectral for this model (default: fitted to the first tokens)",
        [](common_params & params, const std::string & value) {
            params.kv_spectral_basis = value;
        }
    ).set_env("LLAMA_ARG_KV_SPECTRAL_BASIS"));

    return res;
}

//
// llama-bench
//

static std::string or_env(const std::string & value, const char * env, const std::string & otherwise) {
    const char * e = getenv(env);

    return !value.empty() ? value : e ? std::string(e) : otherwise;
}

uint16_t common_kv_spectral_bench::setting::config() const {
    return llama_kv_spectral_config(ratio, window, bits, fine, basis.c_str());
}

std::string common_kv_spectral_bench::setting::str() const {
    if (ratio == 0.0f) {
        return "0";
    }
    std::string res = bits > 0.0f ? string_format("%gb", bits) : string_format("%g", ratio);
    if (window != common_params().kv_spectral_window) {
        res += string_format("/w%d", window);
    }
    if (fine != common_params().kv_spectral_fine) {
        res += string_format("/f%d", fine);
    }
    if (!basis.empty()) {
        res += "/basis";
    }
    return res;
}

bool common_kv_spectral_bench::parse(const std::string & arg, int argc, char ** argv, int & i) {
    std::string * dst =
        arg == "--kv-spectral"        ? &ratios :
        arg == "--kv-spectral-window" ? &window :
        arg == "--kv-spectral-bits"   ? &bits   :
        arg == "--kv-spectral-fine"   ? &fine   :
        arg == "--kv-spectral-basis"  ? &basis  : nullptr;

    if (!dst) {
        return false;
    }
    if (++i >= argc) {
        throw std::invalid_argument("expected a value");
    }

    // lists of the same option add up, as they do for the others
    *dst = dst == &ratios && !ratios.empty() ? ratios + "," + argv[i] : argv[i];

    settings();

    return true;
}

std::vector<common_kv_spectral_bench::setting> common_kv_spectral_bench::settings() const {
    std::vector<setting> res;

    try {
        const int32_t n_window = parse_window(or_env(window, "LLAMA_ARG_KV_SPECTRAL_WINDOW", std::to_string(common_params().kv_spectral_window)));
        const float   n_bits   = parse_bits  (or_env(bits,   "LLAMA_ARG_KV_SPECTRAL_BITS",   "0"));
        const int32_t n_fine   = parse_fine  (or_env(fine,   "LLAMA_ARG_KV_SPECTRAL_FINE",   "auto"));

        const std::string file = or_env(basis, "LLAMA_ARG_KV_SPECTRAL_BASIS", "");

        for (const auto & ratio : string_split<std::string>(or_env(ratios, "LLAMA_ARG_KV_SPECTRAL", n_bits > 0.0f ? "on" : "off"), ',')) {
            res.push_back({ parse_ratio(ratio), n_window, n_bits, n_fine, file });
        }
    } catch (const std::invalid_argument & e) {
        fprintf(stderr, "error: --kv-spectral: %s\n", e.what());
        exit(1);
    }

    return res;
}

bool common_kv_spectral_bench::is_default() const {
    const auto all = settings();

    return all.size() == 1 && all[0].ratio == 0.0f;
}
